"""Memory that is freed, handed back to the system."""

from __future__ import annotations

import ctypes
import sys


def return_memory() -> None:
    """Hand freed memory back to the system: glibc keeps blocks of up to 32 MB, which then pile up beside the model."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
