"""Norms, and a norm joined with a quantization, on Ascend: semantic ops of ``fused_ops``.

Ascend's norms compute in float32 and round once, in the end, where a model may round in between as well. What does not
fit an operation is computed as it is defined; its parts may then be operations of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import activation_of
from .kernels import npu
from .quantization import HALF, is_plain_dynamic


def misfit(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, offset: float) -> str:
    """Why such a norm is none of Ascend's, "" when it is."""
    if x.dtype not in HALF:
        return f"it takes float16 and bfloat16, not {x.dtype}"
    if weight is None or weight.dtype != x.dtype:
        return f"its weight has the dtype of x, {x.dtype}, not {weight.dtype if weight is not None else 'none at all'}"
    if bias is not None or offset:
        return (
            f"its weight is multiplied as it is, without {'a bias' if bias is not None else f'adding {offset} first'}"
        )
    return "its eps is a number that is known beforehand" if eps is None else ""


class RMSNorm:
    """``qcompile::rms_norm``: npu_rms_norm."""

    def refuses(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float | None,
        eps_tensor: Tensor | None,
        offset: float,
        round_first: bool,
    ) -> str:
        """Why it is computed as it is defined instead; "" when it need not."""
        return misfit(x, weight, bias, eps, offset)

    def compute(self, x: Tensor, weight: Tensor, bias: None, eps: float, *rest: Any) -> Tensor:
        """``fused_ops.rms_norm``."""
        return npu.npu_rms_norm.default(x, weight, eps)[0]


class AddRMSNorm:
    """``qcompile::add_rms_norm``: npu_add_rms_norm."""

    def refuses(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float | None,
        eps_tensor: Tensor | None,
        offset: float,
        round_first: bool,
    ) -> str:
        """Why it is computed as it is defined instead; "" when it need not."""
        return misfit(x, weight, bias, eps, offset)

    def compute(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: None, eps: float, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        """``fused_ops.add_rms_norm``."""
        normal, _, total = npu.npu_add_rms_norm.default(x, residual, weight, eps)
        return normal, total


class AddRMSNormQuantize:
    """``qcompile::add_rms_norm_quantize``: npu_add_rms_norm_dynamic_quant, or npu_add_rms_norm_quant."""

    def refuses(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float | None,
        eps_tensor: Tensor | None,
        offset: float,
        round_first: bool,
        params: Sequence[Tensor],
        activation: str,
        keep: bool,
    ) -> str:
        """Why it is computed in two steps instead; "" when it need not."""
        kind = activation_of(activation)
        if reason := misfit(x, weight, bias, eps, offset):
            return reason
        if keep:
            return "it does not give the float result, which something else reads"
        if kind.number != "int" or kind.bits != 8:
            return f"it quantizes to int8, not as {activation}"
        if kind.dynamic:
            return "" if is_plain_dynamic(kind) else f"it quantizes to the largest number of a row, not as {activation}"
        if x.dtype != torch.float16:
            return (
                "beside bfloat16 it would round the stored scale, with which its codes are multiplied unrounded later"
            )
        return ""

    def compute(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: None,
        eps: float,
        eps_tensor: None,
        offset: float,
        round_first: bool,
        params: Sequence[Tensor],
        activation: str,
        keep: bool,
    ) -> list[Tensor]:
        """``fused_ops.add_rms_norm_quantize``."""
        if activation_of(activation).dynamic:
            codes, _, total, scale, _ = npu.npu_add_rms_norm_dynamic_quant.default(
                x, residual, weight, epsilon=eps, output_mask=[True, False]
            )
            return [codes, scale[..., None], total]
        scales, *zeros = [param.expand(weight.shape).contiguous() for param in params]
        codes, _, total = npu.npu_add_rms_norm_quant.default(
            x, residual, weight, scales, zeros[0] if zeros else None, epsilon=eps
        )
        return [codes, total]


NORMS: dict[str, Any] = {
    "rms_norm": RMSNorm(), "add_rms_norm": AddRMSNorm(), "add_rms_norm_quantize": AddRMSNormQuantize(),
}  # fmt: skip
