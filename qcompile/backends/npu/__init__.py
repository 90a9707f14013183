"""Ascend NPUs: what torch_npu computes, under the constraints that are documented for it.

Planning and inspecting need no torch_npu. README.md in this folder says what was verified, and how.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ...errors import UnsupportedError, did_you_mean
from ...kernels import Kernel
from .chips import target
from .integers import Int4Matmul, Int8Int4, Int8Matmul, Int8Static
from .operations import OPERATIONS
from .reference import Dequantize
from .weight_only import Int4WeightOnly, Int8WeightOnly

if TYPE_CHECKING:
    from ...kernels import Operation

__all__ = ["BACKEND", "NPU", "target"]


class NPU:
    """Kernels for Ascend chips; ``target`` says for which one, and whether weights are stored as FRACTAL_NZ."""

    name = "npu"
    kernels: Sequence[Kernel] = (
        Int4WeightOnly(), Int8WeightOnly(), Int8Static(nz=True), Int8Static(), Int4Matmul(nz=True), Int4Matmul(),
        Int8Int4(nz=True), Int8Int4(), Int8Matmul(nz=True), Int8Matmul(), Dequantize(),
    )  # fmt: skip
    operations: Mapping[str, Operation] = OPERATIONS

    def missing(self) -> str:
        """Which package is not installed, or that it sees no chip; "" when one can be used."""
        release = torch.__version__.partition("+")[0]
        if importlib.util.find_spec("torch_npu") is None:
            return (
                f"torch_npu is not installed; it comes with Ascend's CANN toolkit and in the version of torch: "
                f"pip install torch-npu=={release}"
            )
        importlib.import_module("torch_npu")
        if not torch.npu.is_available():  # type: ignore[attr-defined]
            return "torch_npu is installed but sees no Ascend chip"
        return ""

    def kernel(self, name: str) -> Kernel:
        """The kernel called ``name``."""
        for kernel in self.kernels:
            if kernel.name == name:
                return kernel
        known = did_you_mean(name, (kernel.name for kernel in self.kernels))
        raise UnsupportedError(f"the npu backend has no kernel {name!r}.{known}")


BACKEND = NPU()
