"""What every other kernel falls back to: the weight is dequantized at each call and multiplied as a float one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ...types import Scheme
from . import contract
from .grouping import Groups, grouped_matmul
from .kernels import NPUKernel


class Dequantize(NPUKernel):
    """The kernel named "reference": canonical tensors. It has no float64, which no Ascend chip multiplies.

    Products of quantized activations are computed in float32. Experts are all dequantized for npu_grouped_matmul,
    whether they have rows or not.
    """

    name = "reference"
    rules = (contract.integer_weight,)

    def linear(self, x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, scheme: Scheme, out: int) -> Tensor:
        return F.linear(x, self._dequantize(weight, scheme, x.shape[-1]).to(x.dtype), bias)

    def scaled_linear(
        self,
        x: Sequence[Tensor],
        weight: Sequence[Tensor],
        bias: Tensor | None,
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        restored = self._dequantize(weight, scheme, x[0].shape[-1], torch.float32)
        return F.linear(_activations(x), restored, None if bias is None else bias.float()).to(dtype)

    def grouped(
        self, x: Sequence[Tensor], groups: Groups, weight: Sequence[Tensor], scheme: Scheme, dtype: torch.dtype
    ) -> Tensor:
        rows = x[0] if scheme.activation is None else _activations(x).to(dtype)
        restored = self._dequantize(weight, scheme, rows.shape[-1], torch.float32).to(dtype)
        return grouped_matmul(rows, restored.transpose(-1, -2), groups, dtype)


def _activations(x: Sequence[Tensor]) -> Tensor:
    """What ``[codes, scale]`` or ``[codes, scale, zero]`` stand for, in float32."""
    codes, scale, *zero = x
    return (codes.float() - zero[0].float() if zero else codes.float()) * scale.float()
