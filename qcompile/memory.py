"""Memory of this process: how much there is over time, and what is freed handed back to the system."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .types import Moment

_STATM = Path("/proc/self/statm")  # of Linux; its second number is the resident pages


class Timeline:
    """The resident memory of this process, noted whenever ``mark`` is called."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.moments: list[Moment] = []
        self.mark("start")

    def mark(self, what: str) -> None:
        """Note what was just done; nothing where the system does not tell."""
        if _STATM.exists():
            resident = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            self.moments.append(Moment(time.perf_counter() - self._started, resident, what))


def return_memory() -> None:
    """Hand freed memory back to the system: glibc keeps blocks of up to 32 MB, which then pile up beside the model."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def collection_paused() -> Iterator[None]:
    """Keep the garbage collector away from work that makes a million small objects and no garbage: it costs a third."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
