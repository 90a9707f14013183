"""Norms and what is fused with them, on Ascend: the semantic ops of ``fused_ops``.

Ascend's norms compute in float32 and round once, in the end, where a model may round in between; and the fused ones
never show the float result of a norm. Whatever does not fit an operation is computed as it is defined, and quantized by
Ascend's operations all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import fused_ops, numerics
from ...ops import activation_of
from .kernels import npu
from .operations import HALF, Quantize, is_plain_dynamic

_quantize = Quantize()


def fits(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, offset: float) -> bool:
    """Whether npu_rms_norm and npu_add_rms_norm compute such a norm."""
    is_plain = weight is not None and weight.dtype == x.dtype and bias is None and not offset
    return x.dtype in HALF and is_plain and eps is not None


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    eps_tensor: Tensor | None,
    offset: float,
    round_first: bool,
) -> Tensor:
    """``fused_ops.rms_norm``."""
    if fits(x, weight, bias, eps, offset):
        return npu.npu_rms_norm.default(x, weight, eps)[0]
    return fused_ops.rms_norm(x, weight, bias, eps, eps_tensor, offset, round_first)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    eps_tensor: Tensor | None,
    offset: float,
    round_first: bool,
) -> tuple[Tensor, Tensor]:
    """``fused_ops.add_rms_norm``."""
    if fits(x, weight, bias, eps, offset):
        normal, _, total = npu.npu_add_rms_norm.default(x, residual, weight, eps)
        return normal, total
    return fused_ops.add_rms_norm(x, residual, weight, bias, eps, eps_tensor, offset, round_first)


def quantize(x: Tensor, params: Sequence[Tensor], activation: str) -> list[Tensor]:
    """By Ascend's operations where they can, else as it is defined."""
    if _quantize.refuses(x, params, activation):
        return numerics.quantize_activation(x.contiguous(), activation_of(activation), params)
    return _quantize.compute(x, params, activation)


def rms_norm_quantize(*arguments: Any) -> list[Tensor]:
    """``fused_ops.rms_norm_quantize``."""
    *norm, params, activation, keep = arguments
    normal = rms_norm(*norm)
    return [*quantize(normal, params, activation), *([normal] if keep else [])]


def add_rms_norm_quantize(*arguments: Any) -> list[Tensor]:
    """``fused_ops.add_rms_norm_quantize``: one operation, unless somebody reads the float result.

    A stored scale goes into the operation as float32 beside float16 activations; beside bfloat16 ones it would be
    rounded to bfloat16, so that codes and the scale that they are multiplied with later would disagree.
    """
    *norm, params, activation, keep = arguments
    x, residual, weight, bias, eps, _, offset, _ = norm
    kind = activation_of(activation)
    if not keep and kind.number == "int" and kind.bits == 8 and fits(x, weight, bias, eps, offset):
        if is_plain_dynamic(kind):
            codes, _, total, scale, _ = npu.npu_add_rms_norm_dynamic_quant.default(
                x, residual, weight, epsilon=eps, output_mask=[True, False]
            )
            return [codes, scale[..., None], total]
        if not kind.dynamic and x.dtype == torch.float16:
            every = [param.expand(weight.shape).contiguous() for param in params]
            scales, zeros = every[0], every[1] if len(every) > 1 else None
            codes, _, total = npu.npu_add_rms_norm_quant.default(x, residual, weight, scales, zeros, epsilon=eps)
            return [codes, total]
    normal, total = add_rms_norm(*norm)
    return [*quantize(normal, params, activation), total, *([normal] if keep else [])]


def gated_act_quantize(
    gate: Tensor, up: Tensor, function: str, params: Sequence[Tensor], activation: str, keep: bool
) -> list[Tensor]:
    """``fused_ops.gated_act_quantize``: gate and up of a Linear each come alone, and no operation takes them so."""
    product = fused_ops.gated_act(gate, up, function)
    return [*quantize(product, params, activation), *([product] if keep else [])]


class Always:
    """An operation that finds a way for every call."""

    def __init__(self, compute: Callable) -> None:
        self.compute = compute

    def refuses(self, *arguments: Any) -> str:
        """It never does."""
        return ""


NORMS: dict[str, Any] = {
    function.__name__: Always(function)
    for function in (rms_norm, add_rms_norm, rms_norm_quantize, add_rms_norm_quantize, gated_act_quantize)
}
