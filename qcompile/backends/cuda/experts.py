"""The experts of a layer in two kernels: gate, up and their activation; down and the sum over a token's experts.

Rows are (token, slot) pairs, in the order of the router's choice. Which kernels are right depends on their number,
which a dynamic graph does not know, so the ops decide: of few pairs each has a program that finds its expert in the
choice itself, and programs of ``down`` add up the experts of a token; of many, ``expert_order`` says how to sort them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import gates, moe, numerics
from ...ops import FLOAT, find_kernel, scheme_of
from . import tiles
from .layouts import ROWS, round_up
from .ops import define
from .scaled import ScaledKernel
from .targets import current
from .weight_only import WeightOnly


class QuantExperts:
    """``qcompile::quant_experts`` of kernels of this backend."""

    def refuses(self, *arguments: Any) -> str:
        """Why the definition is taken instead, with a product of each kind for itself; "" when it need not."""
        x, _, _, up, up_bias, up_params, down, down_bias, down_params = arguments[:9]
        schemes, kernels, activation, sizes = arguments[9:13]
        if not gates.parse(activation).is_gated:
            return f"its kernels have a gate, and {activation} has none"
        if up_bias is not None or down_bias is not None:
            return "its kernels add no biases"
        if sizes[2] % (ROWS // 2):
            return f"an intermediate size of {sizes[2]} is no multiple of {ROWS // 2}: a tile holds as much gate as up"
        if len(x) > 2:
            return "zero points of activations are corrections between its products"
        each = zip(schemes.split("|"), kernels.split("|"), (up, down), (up_params, down_params), strict=True)
        return next((reason for reason in (_unsuited(*one) for one in each) if reason), "")

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
        """As ``moe.run_experts``, but gate and up are not rounded before their activation."""
        experts, hidden, intermediate = sizes
        (up_scheme, down_scheme), (up_kernel, down_kernel) = schemes.split("|"), kernels.split("|")
        library, (tokens, k) = torch.ops.qcompile_cuda, ids.shape
        for weight, scheme, kernel, part in (
            (up, up_scheme, up_kernel, "gate_up"), (down, down_scheme, down_kernel, "down"),
        ):  # fmt: skip
            group = scheme_of(scheme).weight.scale_columns or 0
            stored = tiles.Weight.of(weight[0], find_kernel(kernel).kind, group, experts, part)
            tiles.splits_in_graph(stored, tokens * k, current())  # none, but the ops will want tiles
        order, ends = library.expert_order(ids, experts)
        inputs = _quantized(x, up_scheme)
        rows = library.gate_up(
            inputs, ids, order, ends, list(up), up_scheme, up_kernel, intermediate, activation, dtype
        )
        splits = 0
        if isinstance(tokens, int) and tokens and tiles.each_row(tokens * k, experts):
            splits = tiles.expert_splits(tokens, k, round_up(hidden, ROWS), current())
        result = library.down(
            _quantized([rows], down_scheme), ids, routing, order, ends, list(down), down_scheme, down_kernel, hidden,
            splits if splits > 1 else 0, dtype,
        )  # fmt: skip
        return result.sum(0).to(dtype) if splits > 1 else result


def _unsuited(scheme: str, kernel: str, weight: Sequence[Tensor], params: Sequence[Tensor]) -> str:
    """Why a projection is not for the kernels here."""
    if scheme == FLOAT:
        return "it has no float projections"
    if not isinstance(find_kernel(kernel), WeightOnly | ScaledKernel):
        return f"{kernel} is no kernel that it has"
    parsed = scheme_of(scheme)
    if params:
        return f"{scheme} has scales or clips of its activations for each expert"
    if parsed.activation is not None and not (parsed.activation.symmetric and parsed.weight.symmetric):
        return f"zero points of {scheme} are corrections between its products"
    return "" if len(weight) == 2 else "its columns are in an order of each expert"


def _quantized(x: Sequence[Tensor], scheme: str) -> list[Tensor]:
    """What a product reads."""
    activation = scheme_of(scheme).activation
    return list(x) if activation is None or len(x) > 1 else numerics.quantize_activation(x[0], activation, ())


def _expert_order(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    if tiles.each_row(ids.numel(), experts):  # which nobody reads
        return _fake_expert_order(ids, experts)
    order, _, ends = moe.route(ids, experts)
    return order, ends


def _fake_expert_order(ids, experts):
    return ids.new_empty((ids.shape[0] * ids.shape[1],)), ids.new_empty((experts,), dtype=torch.int32)


def _gate_up(x, ids, order, ends, weight, scheme, kernel, out, activation, dtype):
    from .device import launch_experts

    return launch_experts.gate_up(
        x, ids, order, ends, weight, scheme_of(scheme), find_kernel(kernel), out, activation, dtype
    )


def _gate_up_cpu(x, ids, order, ends, weight, scheme, kernel, out, activation, dtype):
    token = torch.arange(ids.numel()) // ids.shape[1]
    return gates.gated(
        _each_expert([part[token] for part in x], ids, weight, scheme, kernel, 2 * out, dtype), activation
    )


def _fake_gate_up(x, ids, order, ends, weight, scheme, kernel, out, activation, dtype):
    return x[0].new_empty((ids.shape[0] * ids.shape[1], out), dtype=dtype)


def _down(x, ids, routing, order, ends, weight, scheme, kernel, out, splits, dtype):
    from .device import launch_experts

    return launch_experts.down(
        x, ids, routing, order, ends, weight, scheme_of(scheme), find_kernel(kernel), out, splits, dtype
    )


def _down_cpu(x, ids, routing, order, ends, weight, scheme, kernel, out, splits, dtype):
    rows = _each_expert(x, ids, weight, scheme, kernel, out, dtype).view(*ids.shape, out)
    total = (rows.float() * routing.float()[..., None]).sum(1)
    if splits:  # the whole sum is the first of the partial ones
        return torch.cat([total[None], total.new_zeros((splits - 1, *total.shape))])
    return total.to(dtype)


def _fake_down(x, ids, routing, order, ends, weight, scheme, kernel, out, splits, dtype):
    if splits:
        return x[0].new_empty((splits, ids.shape[0], out), dtype=torch.float32)
    return x[0].new_empty((ids.shape[0], out), dtype=dtype)


def _each_expert(x, ids, weight, scheme, kernel, out, dtype):
    """Rows [tokens * k, in] times the weight of the expert of each; zeros for those of none here."""
    parsed, found, owner = scheme_of(scheme), find_kernel(kernel), ids.reshape(-1)
    result = x[0].new_zeros((owner.shape[0], out), dtype=dtype)
    for expert in owner.unique().tolist():
        if 0 <= expert < weight[0].shape[0]:
            mine, own = owner == expert, [tensor[expert] for tensor in weight]
            rows = [part[mine] for part in x]
            if parsed.activation is None:
                result[mine] = found.linear(rows[0], own, None, parsed, out)
            else:
                result[mine] = found.scaled_linear(rows, own, None, parsed, out, dtype)
    return result


define("expert_order(Tensor ids, int experts) -> (Tensor, Tensor)", _expert_order, _expert_order, _fake_expert_order)
define(
    "gate_up(Tensor[] x, Tensor ids, Tensor order, Tensor ends, Tensor[] weight, str scheme, str kernel, int out, "
    "str activation, ScalarType dtype) -> Tensor",
    _gate_up,
    _gate_up_cpu,
    _fake_gate_up,
)
define(
    "down(Tensor[] x, Tensor ids, Tensor routing, Tensor order, Tensor ends, Tensor[] weight, str scheme, str kernel, "
    "int out, int splits, ScalarType dtype) -> Tensor",
    _down,
    _down_cpu,
    _fake_down,
)
