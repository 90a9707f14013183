"""The experts of one layer on Ascend: routing, grouped products, gated activations and the weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import gates, numerics
from ...moe import gate_first
from ...ops import FLOAT, find_kernel, scheme_of
from ...types import ActivationType
from .grouping import Counts, Groups, Pairs, RowMajor, grouped_matmul, owners, send
from .kernels import NPUKernel, npu
from .quantization import is_plain_dynamic, quantize_rows


class QuantExperts:
    """``qcompile::quant_experts``: routed by npu_moe_init_routing_v2, summed by npu_moe_token_unpermute.

    Where their contracts allow, npu_grouped_matmul_swiglu_quant_v2 makes the first product and what follows it, and
    npu_grouped_matmul_finalize_routing the second one and the sum; the latter only for a known number of tokens.
    """

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
        (up_kernel, down_kernel), (up_scheme, down_scheme) = kernels.split("|"), schemes.split("|")
        first, second = _Product(up_kernel, up_scheme, up, dtype), _Product(down_kernel, down_scheme, down, dtype)

        def between(rows: Sequence[Tensor], groups: Counts) -> list[Tensor]:
            """Everything from the sorted rows to what the second product reads."""
            if len(rows) == 1:
                rows = _quantized(rows[0], groups, up_params, first.activation)
            if activation == "silu" and up_bias is None and _is_int8(second.activation):
                joined = first.swiglu_quantized(rows, groups)
                if joined is not None:
                    return joined
            hidden = _biased(first(rows, groups), groups, up_bias)
            return _activated(hidden, groups, activation, down_params, second.activation)

        if down_bias is None and _is_int8(second.activation) and second.sums(ids.shape[0] * ids.shape[1]):
            rows, groups, pairs = send(x, ids, sizes[0], Pairs)
            return second.summed(between(rows, groups), groups, pairs, routing).to(dtype)
        rows, groups, places = send(x, ids, sizes[0], RowMajor)
        result = _biased(second(between(rows, groups), groups), groups, down_bias)
        return places.combine(result, routing).to(dtype)


class _Product:
    """One of the two products: of a kernel, or (scheme and kernel "float") with a float weight [experts, out, in]."""

    def __init__(self, kernel: str, scheme: str, weight: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.scheme = None if scheme == FLOAT else scheme_of(scheme)
        self.activation = self.scheme.activation if self.scheme else None
        self.kernel: NPUKernel | None = None if scheme == FLOAT else find_kernel(kernel)
        self.weight, self.dtype = weight, dtype

    def __call__(self, rows: Sequence[Tensor], groups: Groups) -> Tensor:
        if self.kernel is None or self.scheme is None:
            return grouped_matmul(rows[0], self.weight[0].transpose(1, 2), groups, self.dtype)
        return self.kernel.grouped(rows, groups, self.weight, self.scheme, self.dtype)

    def swiglu_quantized(self, rows: Sequence[Tensor], groups: Counts) -> list[Tensor] | None:
        """The product and the activation after it in one operation, None where there is none."""
        if self.kernel is None or self.scheme is None:
            return None
        return self.kernel.swiglu_quantized(rows, groups, self.weight, self.scheme)

    def sums(self, rows: int | torch.SymInt) -> bool:
        """Whether one operation makes the product and the weighted sum after it."""
        return self.kernel is not None and self.scheme is not None and self.kernel.sums(self.weight, self.scheme, rows)

    def summed(self, rows: Sequence[Tensor], groups: Counts, pairs: Pairs, routing: Tensor) -> Tensor:
        """The product and the weighted sum after it in one operation."""
        assert self.kernel is not None
        assert self.scheme is not None
        return self.kernel.summed(rows, groups, self.weight, self.scheme, pairs, routing)


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
        (rows,), groups, places = send([x], ids, up.shape[0], RowMajor)
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
    if settings is not None and _is_int8(kind):
        codes, scale = npu.npu_dequant_swiglu_quant.default(hidden, activate_left=True, quant_mode=1, **settings)
        return [codes, scale[:, None]]
    return _quantized(_gated(hidden, activation), groups, params, kind)


def _is_int8(kind: ActivationType | None) -> bool:
    """Whether the fused operations quantize so."""
    return kind is not None and kind.bits == 8 and is_plain_dynamic(kind)


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
