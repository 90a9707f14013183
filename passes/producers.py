"""Which channel of which parameter makes each channel of a value: found by dataflow in an exported graph.

A Linear's input can be divided channel by channel where its producer can: the weight of a norm, or the rows of an
earlier Linear from which there is nothing but reshaping, attention and products on the way. The way is not described by
rules for each architecture: numbers that name the producer's channels are sent along it, so that grouped heads, fused
projections and their halves come out right by themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..labels import hinted, moved, op
from ..sites import plain_name
from .base import described

_LAYOUT = {
    "view", "reshape", "_unsafe_view", "transpose", "permute", "contiguous", "clone", "expand", "slice", "select",
    "unsqueeze", "squeeze", "split", "split_with_sizes", "chunk", "unbind", "flatten", "unflatten", "alias", "detach",
}  # fmt: skip
_IDENTITY = {"to", "_to_copy", "dropout", "type_as"}
_NO_READERS = {  # of values: they ask for the shape, dtype or device
    "_assert_tensor_metadata", "sym_size", "new_empty", "new_zeros", "new_ones", "empty_like", "zeros_like",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Parameters whose channels make a value: ``rows`` int64 [n] names the channel of each of its n columns.

    weight   [channels] or [channels, in]; ``offset`` is added to it where it is used (Gemma's ``1 + w``)
    biases   what is added to the product, [channels] each
    """

    weight: str
    rows: Tensor
    biases: tuple[str, ...] = ()
    offset: float = 0.0


def find_source(value: Node) -> Source | str:
    """Where the channels of ``value`` (its last axis) come from; a text says why they cannot be told or scaled."""
    way: list[Node] = []  # from the value up to what the parameters are read by
    biases: list[Node] = []
    node = value
    while True:
        made = _made_by_parameter(node)
        if made is not None:
            break
        added = _added_parameter(node)
        above = added[0] if added else _above(node)
        if above is None:
            return f"{described(node)}, a {op(node) or node.op}, is no product with a parameter"
        biases += [added[1]] if added else []
        way.append(node)
        node = above
    weight, offset, own_biases = made
    labels = _labels(node)
    reached = _send(labels, way[::-1])
    if reached is None:
        return f"the channels of {described(node)} do not reach {described(value)} unmixed"
    rows = reached.reshape(-1, reached.shape[-1])
    if not torch.equal(rows, rows[:1].expand_as(rows)):
        return f"the channels of {described(node)} differ from token to token in {described(value)}"
    used = set(rows[0].tolist())
    if other := _other_reader([node, *way[::-1]], labels, used):
        return f"{described(other)} reads the same channels of {described(node)}"
    if way and biases and not _at_the_end(biases, way, rows[0]):
        return f"a parameter is added to {described(node)} on the way to {described(value)}"
    return Source(_name(weight), rows[0], tuple(map(_name, [*own_biases, *biases])), offset)


def readers(value: Node) -> Iterator[Node]:
    """Whatever reads ``value``, also reshaped, as long as its last axis stays as it is."""
    for user in value.users:
        if op(user) in _NO_READERS:
            continue
        same = isinstance(shape := getattr(user.meta.get("val"), "shape", None), torch.Size) and (
            shape[-1:] == value.meta["val"].shape[-1:]
        )
        if op(user) in _IDENTITY or (
            same and op(user) in ("view", "reshape", "_unsafe_view", "contiguous", "unsqueeze")
        ):
            yield from readers(user)
        else:
            yield user


def stripped(value: Node) -> Node:
    """``value`` before reshapes and casts that leave its last axis as it is."""
    while _keeps_columns(value):
        value = value.args[0]  # type: ignore[assignment]
    return value


def _keeps_columns(node: Node) -> bool:
    """Whether ``node`` is its first argument in another shape or dtype with the same last axis."""
    if op(node) in _IDENTITY:
        return True
    above: Any = node.args[0] if op(node) in ("view", "reshape", "_unsafe_view", "contiguous", "unsqueeze") else None
    return above is not None and above.meta["val"].shape[-1:] == node.meta["val"].shape[-1:]


# ---------------------------------------------------------------------------------------------------------------- ways


def _parameter(node: Any) -> Node | None:
    """The get_attr node that ``node`` is, or is a cast of."""
    while op(node) in _IDENTITY:
        node = node.args[0]
    return node if isinstance(node, Node) and node.op == "get_attr" else None


def _name(node: Node) -> str:
    return plain_name(str(node.target))


def _vector(node: Any, columns: int) -> Node | None:
    found = _parameter(node)
    return found if found is not None and tuple(found.meta["val"].shape) == (columns,) else None


def _made_by_parameter(node: Node) -> tuple[Node, float, list[Node]] | None:
    """(weight, offset, biases) if the channels of ``node`` are those of a parameter."""
    if op(node) == "linear":
        weight, bias = _parameter(node.args[1]), node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        return None if weight is None else (weight, 0.0, [bias] if isinstance(bias, Node) else [])
    if op(node) in ("rms_norm", "layer_norm"):
        weight, bias = (_parameter(arg) for arg in (*node.args[2:4], None, None)[:2])
        bias = bias if op(node) == "layer_norm" else None
        return None if weight is None else (weight, 0.0, [bias] if bias is not None else [])
    if op(node) != "mul":
        return None
    columns = node.meta["val"].shape[-1]
    for factor in node.args:
        if weight := _vector(factor, columns):
            return weight, 0.0, []
        if op(factor) == "add" and len(factor.args) == 2:  # type: ignore[union-attr]
            left, right = factor.args  # type: ignore[union-attr]
            number, stored = (left, right) if isinstance(left, int | float) else (right, left)
            if isinstance(number, int | float) and (weight := _vector(stored, columns)):
                return weight, float(number), []
    return None


def _added_parameter(node: Node) -> tuple[Node, Node] | None:
    """(the other term, parameter) of an addition of one number per channel."""
    if op(node) != "add" or len(node.args) != 2:
        return None
    columns = node.meta["val"].shape[-1]
    for term, other in (node.args, node.args[::-1]):
        if isinstance(other, Node) and (bias := _vector(term, columns)):
            return other, bias
    return None


def _above(node: Node) -> Node | None:
    """The argument that ``node`` is linear in and that has channels of its own."""
    name = op(node)
    if name in _LAYOUT | _IDENTITY or node.target is operator.getitem:
        return node.args[0] if isinstance(node.args[0], Node) else None
    if name == "scaled_dot_product_attention":
        return node.args[2]  # type: ignore[return-value]
    if name == "matmul":
        return node.args[1] if isinstance(node.args[1], Node) and op(node.args[0]) not in ("", "linear") else None
    if name == "mul":
        return next((arg for arg in node.args if isinstance(arg, Node) and _leads_to_linear(arg)), None)
    return None


def _leads_to_linear(node: Node) -> bool:
    """Whether reshaping alone is between ``node`` and a Linear: the ungated half of a gated activation."""
    while op(node) in _LAYOUT | _IDENTITY or node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return op(node) == "linear"


# -------------------------------------------------------------------------------------------------------------- labels


def _labels(node: Node) -> Tensor:
    """The number of its channel in place of each value of ``node``."""
    shape = hinted(node.meta["val"].shape)
    return torch.arange(shape[-1]).expand(shape)


def _send(labels: Any, way: list[Node]) -> Tensor | None:
    """Labels after the operations of ``way``, None if one mixes channels."""
    for node in way:
        labels = _step(labels, node)
        if labels is None:
            return None
    return labels


def _step(labels: Any, node: Node) -> Any:
    name = op(node)
    if name in _IDENTITY:
        return labels
    if name in _LAYOUT or node.target is operator.getitem:
        return moved(labels, node)
    shape = hinted(node.meta["val"].shape)
    if name in ("mul", "add"):
        return labels.expand(shape)
    if name in ("scaled_dot_product_attention", "matmul"):
        tokens = labels[..., :1, :]
        if not torch.equal(labels, tokens.expand_as(labels)):
            return None
        if tokens.dim() == 4 and tokens.shape[1] != shape[1]:
            tokens = tokens.repeat_interleave(shape[1] // tokens.shape[1], 1)
        return tokens.expand(shape)
    return None


def _other_reader(way: list[Node], labels: Tensor, used: set[int]) -> Node | None:
    """Somebody beside the way who reads one of the ``used`` channels."""
    current: Any = labels
    for node, following in zip(way, [*way[1:], None], strict=True):
        current = current if node is way[0] else _step(current, node)
        for user in node.users if following is not None else ():
            if user is following or op(user) in _NO_READERS:
                continue
            if op(user) not in _LAYOUT and user.target is not operator.getitem:
                return user
            seen = _step(current, user)
            if any(used & set(part.unique().tolist()) for part in (seen if isinstance(seen, tuple | list) else [seen])):
                return user
    return None


def _at_the_end(biases: list[Node], way: list[Node], rows: Tensor) -> bool:
    """Whether what is added has the channels of the producer as they are: then it is scaled alike."""
    return torch.equal(rows, torch.arange(rows.shape[0])) and all(op(node) in {"add", *_IDENTITY} for node in way)
