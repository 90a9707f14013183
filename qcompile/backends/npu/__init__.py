"""Ascend NPUs: what torch_npu computes, under the constraints that are documented for it.

Planning and inspecting need no torch_npu. README.md in this folder says what was verified, and how.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from ...errors import UnsupportedError, did_you_mean
from ...kernels import Kernel, Operation
from . import graphs
from .chips import target
from .experts import FloatExperts, QuantExperts
from .int4 import Int4Matmul, Int8Int4
from .int8 import Int8Matmul, Int8Static
from .norms import NORMS
from .quantization import Quantize, QuantizeWords
from .reference import Dequantize
from .weight_only import Int4WeightOnly, Int8WeightOnly

__all__ = ["BACKEND", "NPU", "target"]


class NPU:
    """Kernels for Ascend chips; ``target`` says for which one, and whether weights are stored as FRACTAL_NZ."""

    name = "npu"
    kernels: Sequence[Kernel] = (
        Int4WeightOnly(), Int8WeightOnly(), Int8Static(nz=True), Int8Static(), Int4Matmul(nz=True), Int4Matmul(),
        Int8Int4(nz=True), Int8Int4(), Int8Matmul(nz=True), Int8Matmul(), Dequantize(),
    )  # fmt: skip
    operations: Mapping[str, Operation] = {
        "quantize": Quantize(), "quantize_words": QuantizeWords(), "quant_experts": QuantExperts(),
        "experts": FloatExperts(), **NORMS,
    }  # fmt: skip

    target = staticmethod(target)

    def missing(self) -> str:
        """Which package is not installed, or that it sees no chip; "" when one can be used."""
        if missing := graphs.missing_package():
            return missing
        importlib.import_module("torch_npu")
        if not torch.npu.is_available():  # type: ignore[attr-defined]
            return "torch_npu is installed but sees no Ascend chip"
        return ""

    def finish(self, module: GraphModule, inputs: Sequence[Any], static: Sequence[int], mode: str | None) -> Callable:
        """What runs a lowered graph: ``graphs.finish``."""
        return graphs.finish(module, inputs, static, mode)

    def kernel(self, name: str) -> Kernel:
        """The kernel called ``name``."""
        for kernel in self.kernels:
            if kernel.name == name:
                return kernel
        known = did_you_mean(name, (kernel.name for kernel in self.kernels))
        raise UnsupportedError(f"the npu backend has no kernel {name!r}.{known}")


BACKEND = NPU()
