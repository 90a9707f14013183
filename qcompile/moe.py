"""What the experts of a layer compute: sort by expert, product, gated activation, product, weighted sum.

Plain torch, traceable, without a loop: eager execution calls it as it is, and the pass ``lower`` traces it. The two
products are those of the kernels; everything between them is the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import numerics
from .gates import gated
from .types import Scheme

Product = Callable[[Sequence[Tensor], Tensor], Tensor]  # (rows sorted by expert, ends) -> [rows, out]


def route(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the (token, slot) pairs of ``ids`` int64 [tokens, k] by expert.

    Returns order int64 [tokens * k]: the pair at each sorted place; owner int64 [tokens * k]: its expert; and ends
    int32 [experts]: where the rows of each expert end. The id ``experts`` is that of an expert which another rank has:
    such rows come last and belong to nobody. Any other id that is not in 0 .. experts - 1 makes the result of its token
    undefined. (Set ``QCOMPILE_DEBUG=1`` to have eager calls check them.)
    """
    owner, order = torch.sort(ids.reshape(-1), stable=True)
    every = torch.arange(experts, device=ids.device, dtype=ids.dtype)
    return order, owner, torch.searchsorted(owner, every, right=True, out_int32=True)


def combine(rows: Tensor, order: Tensor, routing: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo the sort and sum each token's experts, weighted: [tokens * k, hidden] -> [tokens, hidden]; in float32."""
    tokens, k = routing.shape
    place = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    results = rows.index_select(0, place).view(tokens, k, rows.shape[-1])
    return (results.float() * routing.float()[..., None]).sum(1).to(dtype)


def run_float_experts(
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
    """What ``qcompile::experts`` computes: ``run_experts`` with float weights in the layout of the model's parameters.

    transposed: weights are [experts, in, out]; interleaved: the rows of ``up`` are gate 0, up 0, gate 1 ...
    """

    def product(weight: Tensor) -> Product:
        return lambda rows, ends: grouped_float(rows[0], ends, weight, transposed)

    def first(rows: Sequence[Tensor], ends: Tensor) -> Tensor:
        hidden = product(up)(rows, ends)
        return gate_first(hidden) if interleaved else hidden

    bias = gate_first(up_bias) if interleaved and up_bias is not None else up_bias
    return run_experts(
        [x], ids, routing, first, bias, (), product(down), down_bias, (), (None, None), activation, up.shape[0], x.dtype
    )


def gate_first(interleaved: Tensor, dim: int = -1) -> Tensor:
    """Order one dimension gate 0, gate 1 ..., up 0, up 1 ... instead of gate 0, up 0, gate 1 ..."""
    dim %= interleaved.dim()
    return interleaved.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def gate_by_gate(first: Tensor, dim: int = -1) -> Tensor:
    """Inverse of ``gate_first``."""
    dim %= first.dim()
    return first.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def grouped_float(rows: Tensor, ends: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """Rows [n, in], sorted by expert, each times the weight [experts, out, in] (or [experts, in, out]) of its own."""
    by_columns = weight if transposed else weight.transpose(1, 2)
    aligned = all(stride * weight.element_size() % 16 == 0 for stride in by_columns.stride() if stride != 1)
    if rows.dtype == weight.dtype == torch.bfloat16 and aligned:
        return torch._grouped_mm(rows, by_columns, offs=ends)
    return torch.ops.qcompile_reference.grouped_float(rows, ends, by_columns)


def _grouped_float(rows: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
    result, start = rows.new_empty((rows.shape[0], weight.shape[-1])), 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(rows[start:end], weight[expert].to(rows.dtype), out=result[start:end])
        start = end
    return result


# grouped_mm takes bfloat16 only; other dtypes need a loop that depends on data, which no graph can hold
torch.library.custom_op("qcompile_reference::grouped_float", _grouped_float, mutates_args=())
torch.library.register_fake(
    "qcompile_reference::grouped_float", lambda rows, ends, weight: rows.new_empty((rows.shape[0], weight.shape[-1]))
)


def run_experts(
    x: Sequence[Tensor],
    ids: Tensor,
    routing: Tensor,
    up: Product,
    up_bias: Tensor | None,
    up_params: Sequence[Tensor],
    down: Product,
    down_bias: Tensor | None,
    down_params: Sequence[Tensor],
    schemes: tuple[Scheme | None, Scheme | None],
    activation: str,
    experts: int,
    dtype: torch.dtype,
    across: Callable[[Tensor], Tensor] = lambda largest: largest,
    is_part: bool = False,
) -> Tensor:
    """The experts of one layer: x [tokens, hidden] -> [tokens, hidden] in ``dtype``.

    x is [float] or, quantized per token already, [codes, scale] or [codes, scale, zero]. Each row goes through
    ``down(act(up(x)))`` of its expert. What a product reads is quantized as its scheme (up, down) says, with the static
    scale or the clip of the row's own expert, from params [experts] each. Biases: [experts, out]. across: as for
    ``numerics.quantize_activation``, where ``down`` has a part of the columns. is_part: whether ids may be ``experts``;
    such rows add nothing.
    """
    order, owner, ends = route(ids, experts)
    foreign = owner == experts if is_part else None
    owner = owner.clamp(max=experts - 1) if is_part else owner
    token = order // ids.shape[1]
    rows = [part.index_select(0, token) for part in x]
    if len(rows) == 1:
        rows = _quantized(rows[0], owner, up_params, schemes[0])
    hidden = up(rows, ends)
    if up_bias is not None:
        hidden = hidden + up_bias.index_select(0, owner)
    result = down(_quantized(gated(hidden, activation), owner, down_params, schemes[1], across), ends)
    if down_bias is not None:
        result = result + down_bias.index_select(0, owner)
    if foreign is not None:  # no product wrote these rows
        result = torch.where(foreign[:, None], 0, result)
    return combine(result, order, routing, dtype)


def _quantized(
    rows: Tensor, owner: Tensor, params: Sequence[Tensor], scheme: Scheme | None,
    across: Callable[[Tensor], Tensor] = lambda largest: largest,
) -> list[Tensor]:  # fmt: skip
    """What a product reads: the float rows, or their codes with what belongs to them."""
    if scheme is None or scheme.activation is None:
        return [rows]
    own = [param.index_select(0, owner)[:, None] for param in params]
    parts = numerics.quantize_activation(rows, scheme.activation, own, across)
    return parts if scheme.activation.dynamic else [*parts, *own]
