"""Where divided values meet others: what has to be divided along with them, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from ..labels import hinted, moved, op
from ..sites import plain_name
from .dataflow import FREE, LAYOUT, SAME


def is_ragged(numbers: Tensor, ranks: Tensor, count: int) -> bool:
    """Whether what a rank holds of a value is no block cut along one dimension; copies of heads do not count."""
    cut = 0
    for dim in range(numbers.dim()):
        if (
            numbers.shape[dim] > 1
            and _varies(ranks, dim)
            and _varies(torch.where(numbers < 0, FREE, numbers % count), dim)
        ):
            cut += 1
    return cut > 1


def _varies(values: Tensor, dim: int) -> bool:
    """Whether values differ along a dimension, where there are any."""
    high = values.amax(dim, keepdim=True)
    return not bool(((values == high) | (values == FREE)).all())


def parameter_slices(
    meetings: Sequence[tuple[Tensor, Node]], rank_of: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, int, Tensor, str]]:
    """Parameters that meet divided values along a dimension of theirs: (name, dimension, rank of each index, problem).

    rank_of: the rank of each number (``FREE`` where every rank has the value). A value that is no parameter, or of
    which one element meets several ranks, is a problem.
    """
    for numbers, node in meetings:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.dim():
            continue
        shape = hinted(value.shape)
        ranks = rank_of(numbers)
        lead = ranks.dim() - len(shape)
        for dim, size in enumerate(shape):
            place = dim + lead
            if size == 1 or ranks.shape[place] != size:
                continue
            if not _varies(ranks, place):
                continue
            line = ranks.movedim(place, 0).reshape(size, -1)
            found = _parameter_dim(node, dim)
            if found is None:
                yield "", 0, line[:, 0], f"{node.name}, which is no parameter, would have to be divided as well"
                continue
            name, own, order = found
            spread = line.amax(1)
            if not bool(((line == spread[:, None]) | (line == FREE)).all()):
                yield name, own, spread, f"one element of {name} is used by several ranks"
                continue
            whole = torch.full((int(order.max()) + 1,), FREE)
            whole[order] = spread
            yield name, own, whole, ""


def _parameter_dim(node: Node, dim: int) -> tuple[str, int, Tensor] | None:
    """(parameter, dimension, index in it of each index of ``dim``) if ``node`` is a reshaped parameter."""
    way: list[Node] = []
    source = node
    while source.op == "call_function" and op(source) in LAYOUT | SAME | {"expand"}:
        way.append(source)
        source = source.args[0]  # type: ignore[assignment]
    if source.op != "get_attr":
        return None
    shape = hinted(source.meta["val"].shape)
    for own, size in enumerate(shape):
        labels = torch.arange(size).view(-1, *[1] * (len(shape) - own - 1)).expand(shape).contiguous()
        for step in reversed(way):
            if op(step) in SAME:
                continue
            labels = moved(labels, step)
        line = labels.movedim(dim, 0).reshape(labels.shape[dim], -1)
        if torch.equal(line, line[:, :1].expand_as(line)) and len(set(line[:, 0].tolist())) > 1:
            return plain_name(str(source.target)), own, line[:, 0]
    return None
