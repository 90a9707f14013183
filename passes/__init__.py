"""One file per pass; ``pipeline`` is the ordered list. Installed as ``qcompile.passes``."""
