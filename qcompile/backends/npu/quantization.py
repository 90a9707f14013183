"""Quantization of activations by Ascend's operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import numerics
from ...ops import activation_of
from ...types import ActivationType
from .kernels import npu, number_of

HALF = (torch.float16, torch.bfloat16)


def quantize_rows(x: Tensor, activation: ActivationType) -> list[Tensor]:
    """npu_dynamic_quant of x [rows, n]: [codes, scale [rows, 1]]; codes of 4 bits are int4 words."""
    number = number_of(torch.quint4x2) if activation.bits == 4 else None
    codes, scale = npu.npu_dynamic_quant.default(x, dst_type=number)
    return [codes, scale[:, None]]


def is_plain_dynamic(activation: ActivationType) -> bool:
    """Whether npu_dynamic_quant computes it."""
    return activation.number == "int" and activation.dynamic and activation.symmetric and not activation.clip


class Quantize:
    """``qcompile::quantize``: npu_dynamic_quant, or npu_quantize with a stored scale.

    The latter divides by a float32 scale. Multiplying by the reciprocal, as others do, wants it in the dtype of the
    activations, which moves codes by up to half a step.
    """

    def refuses(self, x: Tensor, params: Sequence[Tensor], activation: str) -> str:
        """Why plain operations compute it instead; "" when they need not."""
        kind = activation_of(activation)
        if kind.number != "int":
            return f"it quantizes to integers, not to {kind.number}"
        if x.dtype not in HALF:
            return f"it quantizes float16 and bfloat16, not {x.dtype}"
        if kind.clip:
            return "none of them clamps to a share of the largest number"
        if kind.dynamic and not kind.symmetric:
            return "its zero points are not integers"
        if kind.bits == 4 and x.shape[-1] % 8:
            return f"eight int4 numbers are a word, and {x.shape[-1]} is no multiple of 8"
        return ""

    def compute(self, x: Tensor, params: Sequence[Tensor], activation: str) -> list[Tensor]:
        """As ``numerics.quantize_activation``, except that ties of x / scale may be rounded the other way."""
        kind = activation_of(activation)
        rows = x.reshape(-1, x.shape[-1])
        if not kind.dynamic:
            scale, *zero = params
            codes = npu.npu_quantize.default(rows, scale, zero[0] if zero else None, number_of(torch.qint8), 1, True)
            return [codes.view(x.shape)]
        codes, scale = quantize_rows(rows, kind)
        if codes.dtype == torch.int32:
            codes = numerics.unpack_int4(codes)
        return [codes.view(x.shape), scale.view(*x.shape[:-1], 1)]


class QuantizeWords(Quantize):
    """``qcompile::quantize_words``: what npu_dynamic_quant makes of 4 bits by itself."""

    def compute(self, x: Tensor, params: Sequence[Tensor], activation: str) -> list[Tensor]:
        """As ``fused_ops.quantize_words``."""
        words, scale = quantize_rows(x.reshape(-1, x.shape[-1]), activation_of(activation))
        return [words.view(*x.shape[:-1], -1), scale.view(*x.shape[:-1], 1)]
