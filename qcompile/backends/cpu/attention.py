"""Attention on the CPU, in C++ (``native/attention.h``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native

_WIDTH = 16  # of which the elements of a head are a multiple


class Attend:
    """``qcompile::attend``."""

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str:
        """Why ATen's attention computes it instead; "" when it need not."""
        if not (q.dtype == k.dtype == v.dtype) or q.dtype not in native.DTYPES:
            return f"it computes bfloat16, float16 and float32, all in one of them, not {q.dtype}, {k.dtype}, {v.dtype}"
        widths = q.shape[3], v.shape[3]
        if any(not isinstance(width, int) or width % _WIDTH for width in widths):
            return f"its heads are multiples of {_WIDTH} wide, not {widths[0]} and {widths[1]}"
        one_row = isinstance(q.shape[2], int) and q.shape[2] == 1
        if not one_row and q.dtype == torch.bfloat16 and native.instruction_set() == "amx":
            return "ATen's multiplies bfloat16 of more than one row in AMX tiles"
        return native.unavailable()

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool
    ) -> Tensor:
        """``fused_ops.attend``."""
        scale = q.shape[3] ** -0.5 if scale is None else scale
        return torch.ops.qcompile_cpu.attend.default(q, k, v, mask, scale, causal)
