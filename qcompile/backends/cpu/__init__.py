"""The CPU: our own C++ kernels; ATen's low-bit matrix products where those cannot be built; else the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import Graph

from ...errors import UnsupportedError, did_you_mean
from ...kernels import Kernel
from . import native
from .attention import Attend
from .inductor import kernels_side_by_side
from .kernels import Int4Pack, Int8Pack, IntMM
from .native_kernel import Native
from .replay import Replay


class CPU:
    """Kernels for any x86 or Arm CPU that PyTorch runs on."""

    name = "cpu"
    kernels: Sequence[Kernel] = (Native(), Int4Pack(), Int8Pack(), IntMM(), Kernel())
    operations: Mapping[str, Any] = {"attend": Attend()}
    while_compiling = staticmethod(kernels_side_by_side)

    def missing(self) -> str:
        """A CPU is always there."""
        return ""

    def repeat(self, run: Callable, compiled: Sequence[Any], graph: Graph, weights: Sequence[int]) -> Callable:
        """``run``, repeated without Python where it can be (``replay.py``); the arguments are those of ``Replay``."""
        return run if native.unavailable() else Replay(run, compiled, graph, weights)

    def kernel(self, name: str) -> Kernel:
        """The kernel called ``name``."""
        for kernel in self.kernels:
            if kernel.name == name:
                return kernel
        known = did_you_mean(name, (kernel.name for kernel in self.kernels))
        raise UnsupportedError(f"the cpu backend has no kernel {name!r}.{known}")


BACKEND = CPU()
