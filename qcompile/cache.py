"""Where qcompile keeps what it made on this machine: compiled kernels, tuned tiles."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "QCOMPILE_CACHE_DIR"


def cache_folder() -> Path:
    """``$QCOMPILE_CACHE_DIR``, by default ``~/.cache/qcompile`` (``$XDG_CACHE_HOME``); it need not exist yet."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcompile"
