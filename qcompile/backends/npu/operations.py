"""Ascend's own operations for what stands between matrix products: quantization, routing, gated activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import gates, numerics
from ...moe import gate_first
from ...ops import FLOAT, activation_of, find_kernel, scheme_of
from ...types import ActivationType
from .grouping import Groups, grouped_matmul, owners, send
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


class QuantExperts:
    """``qcompile::quant_experts``: routed by npu_moe_init_routing_v2, summed by npu_moe_token_unpermute."""

    def refuses(self, x: Sequence[Tensor], ids: Tensor, *rest: Any) -> str:
        """Why the plain composition is taken instead; "" when it need not."""
        return "it routes no zero points" if len(x) > 2 else ""

    def compute(
        self,
        x: Sequence[Tensor],
        ids: Tensor,
        routing: Tensor,
        up: Sequence[Tensor],
        up_bias: Tensor | None,
        up_params: Sequence[Tensor],
        down: Sequence[Tensor],
        down_bias: Tensor | None,
        down_params: Sequence[Tensor],
        schemes: str,
        kernels: str,
        activation: str,
        sizes: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor:
        """As ``moe.run_experts``."""
        names = zip(kernels.split("|"), schemes.split("|"), strict=True)
        first, second = (_Product(*name, weight, dtype) for name, weight in zip(names, (up, down), strict=True))
        rows, groups, places = send(x, ids, sizes[0])
        if len(rows) == 1:
            rows = _quantized(rows[0], groups, up_params, first.activation)
        hidden = _biased(first(rows, groups), groups, up_bias)
        rows = _activated(hidden, groups, activation, down_params, second.activation)
        return places.combine(_biased(second(rows, groups), groups, down_bias), routing).to(dtype)


class _Product:
    """One of the two products: of a kernel, or (scheme and kernel "float") with a float weight [experts, out, in]."""

    def __init__(self, kernel: str, scheme: str, weight: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.scheme = None if scheme == FLOAT else scheme_of(scheme)
        self.activation = self.scheme.activation if self.scheme else None
        self.kernel, self.weight, self.dtype = kernel, weight, dtype

    def __call__(self, rows: Sequence[Tensor], groups: Groups) -> Tensor:
        if self.scheme is None:
            return grouped_matmul(rows[0], self.weight[0].transpose(1, 2), groups, self.dtype)
        return find_kernel(self.kernel).grouped(rows, groups, self.weight, self.scheme, self.dtype)


class FloatExperts:
    """``qcompile::experts``: the same with float weights, which npu_grouped_matmul takes transposed or not."""

    def refuses(self, x: Tensor, *rest: Any) -> str:
        """It computes every call."""
        return ""

    def compute(
        self,
        x: Tensor,
        ids: Tensor,
        routing: Tensor,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        activation: str,
        transposed: bool,
        interleaved: bool,
    ) -> Tensor:
        """As ``moe.run_float_experts``."""
        if not transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        (rows,), groups, places = send([x], ids, up.shape[0])
        hidden = _biased(grouped_matmul(rows, up, groups, x.dtype), groups, up_bias)
        hidden = gate_first(hidden) if interleaved else hidden
        result = grouped_matmul(_gated(hidden, activation), down, groups, x.dtype)
        return places.combine(_biased(result, groups, down_bias), routing)


def _biased(rows: Tensor, groups: Groups, bias: Tensor | None) -> Tensor:
    """Rows [n, out], each plus the bias [experts, out] of its own expert."""
    return rows if bias is None else rows + bias.index_select(0, owners(groups, rows.shape[0]))


def _quantized(rows: Tensor, groups: Groups, params: Sequence[Tensor], kind: ActivationType | None) -> list[Tensor]:
    """What a product reads: the float rows, or their codes with what belongs to them."""
    if kind is None:
        return [rows]
    if is_plain_dynamic(kind) and (kind.bits == 8 or rows.shape[-1] % 8 == 0):
        return quantize_rows(rows, kind)
    own = [param.index_select(0, owners(groups, rows.shape[0]))[:, None] for param in params]
    parts = numerics.quantize_activation(rows, kind, own)
    return parts if kind.dynamic else [*parts, *own]


def _activated(
    hidden: Tensor, groups: Groups, activation: str, params: Sequence[Tensor], kind: ActivationType | None
) -> list[Tensor]:
    """The gated activation of rows [n, 2 * intermediate], as the second product reads it."""
    settings = _swiglu_settings(activation)
    if settings is not None and kind is not None and kind.bits == 8 and is_plain_dynamic(kind):
        codes, scale = npu.npu_dequant_swiglu_quant.default(hidden, activate_left=True, quant_mode=1, **settings)
        return [codes, scale[:, None]]
    return _quantized(_gated(hidden, activation), groups, params, kind)


def _gated(hidden: Tensor, activation: str) -> Tensor:
    """The gated activation of rows [n, 2 * intermediate], gate first."""
    return npu.npu_swiglu.default(hidden, -1) if activation == "silu" else gates.gated(hidden, activation)


def _swiglu_settings(activation: str) -> dict[str, Any] | None:
    """How npu_dequant_swiglu_quant is told to compute ``activation``; None for what it cannot, such as gelu."""
    gate = gates.parse(activation)
    if activation == "silu":
        return {}
    if gate.function != "silu" or not gate.is_gated or gate.limit is None:
        return None
    return {"swiglu_mode": 2, "clamp_limit": gate.limit, "glu_alpha": gate.alpha, "glu_bias": gate.shift}


OPERATIONS: dict[str, Any] = {
    "quantize": Quantize(),
    "quantize_words": QuantizeWords(),
    "quant_experts": QuantExperts(),
    "experts": FloatExperts(),
}
