"""NVIDIA GPUs from Ampere on (and, through the same code without inline assembly, AMD's): Triton kernels.

Planning, inspecting and packing need neither a GPU nor Triton. README.md in this folder says what was verified, and
how.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

import torch

from ...errors import UnsupportedError, did_you_mean
from ...kernels import Kernel, Operation
from . import experts, ops, tuning  # noqa: F401  (a graph that was lowered elsewhere calls the ops)
from .scaled import Fp8, Integers
from .targets import target
from .weight_only import WeightOnly

__all__ = ["BACKEND", "CUDA", "target"]


class CUDA:
    """Kernels for GPUs that torch calls "cuda"; ``target`` says for which one to plan."""

    name = "cuda"
    kernels: Sequence[Kernel] = (
        WeightOnly(4, "wgmma"), WeightOnly(4, "mma"), WeightOnly(8, "wgmma"), WeightOnly(8, "mma"), Integers(8),
        Integers(4), Fp8(), Kernel(),
    )  # fmt: skip

    operations: Mapping[str, Operation] = {"quant_experts": experts.QuantExperts()}

    target = staticmethod(target)
    while_lowering = staticmethod(tuning.while_lowering)

    def missing(self) -> str:
        """What CUDA lacks here: a build of torch, a GPU, or Triton; "" when it can be used."""
        if not torch.backends.cuda.is_built():
            return f"this torch ({torch.__version__}) is built without CUDA; pytorch.org/get-started lists others"
        if not torch.cuda.is_available():
            return "torch sees no GPU (nvidia-smi lists those that the driver has; CUDA_VISIBLE_DEVICES can hide them)"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install triton"
        return ""

    def kernel(self, name: str) -> Kernel:
        """The kernel called ``name``."""
        for kernel in self.kernels:
            if kernel.name == name:
                return kernel
        known = did_you_mean(name, (kernel.name for kernel in self.kernels))
        raise UnsupportedError(f"the cuda backend has no kernel {name!r}.{known}")


BACKEND = CUDA()
