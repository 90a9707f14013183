"""``python -m qcompile``, also under torchrun: the command line."""

from .cli import main

main()
