"""The CPU: ATen's low-bit matrix products where they are fast and right, the reference where they are not."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UnsupportedError, did_you_mean
from ...kernels import Kernel
from .kernels import Int4Pack, Int8Pack, IntMM


class CPU:
    """Kernels for any x86 or Arm CPU that PyTorch runs on."""

    name = "cpu"
    kernels: Sequence[Kernel] = (Int4Pack(), Int8Pack(), IntMM(), Kernel())

    def missing(self) -> str:
        """A CPU is always there."""
        return ""

    def kernel(self, name: str) -> Kernel:
        """The kernel called ``name``."""
        for kernel in self.kernels:
            if kernel.name == name:
                return kernel
        known = did_you_mean(name, (kernel.name for kernel in self.kernels))
        raise UnsupportedError(f"the cpu backend has no kernel {name!r}.{known}")


BACKEND = CPU()
