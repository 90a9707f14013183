"""What must stay together when a decoder block is divided: found by dataflow in its exported graph.

Every output row of a Linear that reads the residual stream has a number. The numbers travel with the values: reshaping
moves them, elementwise operations and reductions tie those that they mix. Where numbers meet a Linear again, its input
columns belong to them, and its sum ends the way. What is tied is a *unit* (a key/value head with its query heads; a
channel of an MLP): any share of the units computes alone, and the sums of the shares are the block's. An operation that
is not known ties everything that it reads, so that whatever is new to this file stays whole.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..labels import hint, hinted, moved, op
from ..sites import is_experts, plain_name

LAYOUT = {
    "view", "reshape", "_unsafe_view", "transpose", "permute", "contiguous", "clone", "slice", "select", "unsqueeze",
    "squeeze", "split", "split_with_sizes", "chunk", "unbind", "flatten", "unflatten", "alias", "detach", "t", "repeat",
    "repeat_interleave",
}  # fmt: skip
SAME = {"to", "_to_copy", "dropout", "type_as", "copy"}
_REDUCE = {"mean", "sum", "amax", "amin", "var", "norm", "linalg_vector_norm", "prod"}  # along "dim"
_ALONG = {"softmax", "_softmax", "_safe_softmax", "log_softmax", "cumsum", "rms_norm", "layer_norm"}  # shape stays
_SILENT = {"_assert_tensor_metadata", "sym_size", "new_empty", "new_zeros", "new_ones", "empty_like", "zeros_like"}
FREE = -1  # the number of a value that every rank has


@dataclass
class Flow:
    """What the numbers of one block told.

    columns   first number of every Linear whose rows have numbers, by name; rows: how many
    inputs    number of each input column, of every Linear that ends a way
    ties      pairs of numbers that must stay together, int64 [2, n]
    meetings  (numbers, other value): where a numbered value meets a tensor that has none; in the same shape
    mixed     what tied everything: numbers and the reason
    values    every numbered value, by the name of its node
    """

    columns: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    ties: list[Tensor] = field(default_factory=list)
    meetings: list[tuple[Tensor, Node]] = field(default_factory=list)
    mixed: list[tuple[int, str]] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def owner(self, number: int) -> str:
        """The Linear that a number belongs to."""
        number %= max(self.count, 1)
        return next(n for n, first in self.columns.items() if first <= number < first + self.rows[n])


def follow(
    nodes: Sequence[Node], linears: Mapping[Node, str], whole: frozenset[str] = frozenset(), copies: int = 1
) -> Flow:
    """Send numbers through the ``nodes`` of one block, in their order.

    linears: the name of the Linear that a node calls, for those that may be divided; those in ``whole`` are not.
    copies: into how many parts the copies are divided that an expanded key/value head has; numbers of the second part
    are higher by ``Flow.count``, and so on.
    """
    return _Follower(nodes, linears, whole, copies).run()


class _Follower:
    def __init__(self, nodes: Sequence[Node], linears: Mapping[Node, str], whole: frozenset[str], copies: int) -> None:
        self.nodes, self.linears, self.whole, self.copies = nodes, linears, whole, copies
        self.flow = Flow()
        self.numbers: dict[Node, Any] = {}
        self.inside = set(nodes)

    def run(self) -> Flow:
        flow = self.flow
        for node, name in self.linears.items():
            if node in self.inside and name not in self.whole and name not in flow.columns:
                rows = node.args[1].meta["val"].shape[0]  # type: ignore[union-attr]
                flow.columns[name], flow.rows[name] = flow.count, rows
                flow.count += rows
        for node in self.nodes:
            if node.op != "call_function" or op(node) in _SILENT:
                continue
            if (given := self._step(node)) is not None:
                self.numbers[node] = given
                if isinstance(given, Tensor):
                    flow.values[node.name] = given
                if any(user not in self.inside and op(user) not in _SILENT for user in node.users):
                    self._tie_all([given], f"no Linear in its block sums what it makes ({node.name} leaves it)")
        for name in [name for name in flow.columns if name in flow.inputs]:
            del flow.columns[name], flow.rows[name]  # it ends a way: its rows never had numbers
        return flow

    # --------------------------------------------------------------------------------------------------- one operation

    def _step(self, node: Node) -> Any:
        """Numbers of what ``node`` gives, None where it has none."""
        read = [self.numbers[arg] for arg in node.all_input_nodes if arg in self.numbers]
        if node in self.linears:
            return self._linear(node)
        if not read:
            return None
        name = op(node)
        if name in SAME:
            return read[0]
        if name in LAYOUT or node.target is operator.getitem:
            source: Any = node.args[0]
            return moved(self.numbers[source], node)
        if name == "expand":
            return self._expanded(node)
        if name in ("cat", "stack"):
            parts = [self._known(arg) for arg in node.args[0]]  # type: ignore[union-attr]
            result = node.target(parts, *node.args[1:])  # type: ignore[operator]
            for arg in node.args[0]:  # type: ignore[union-attr]
                if arg not in self.numbers:
                    self.flow.meetings.append((result, arg))  # type: ignore[arg-type]
            return result
        if name == "copy_":
            return self._written(node)
        if name in ("max", "min", "aminmax") and isinstance(node.meta["val"], tuple | list):
            along = self._tied_along(read[0], hint(node.args[1]))
            along = (
                along
                if along.dim() == node.meta["val"][0].dim() and _keeps(node)
                else along.squeeze(hint(node.args[1]))
            )
            return [along] * len(node.meta["val"])
        if name == "view_as_complex":
            return self._tied_along(read[0], -1).squeeze(-1)
        if name == "view_as_real":
            return read[0].unsqueeze(-1).repeat_interleave(2, -1)
        if name in _REDUCE or name in _ALONG:
            return self._reduced(node, name)
        if name == "scaled_dot_product_attention":
            return self._attention(node)
        if name in ("matmul", "bmm"):
            return self._product(node)
        if _is_pointwise(node):
            return self._pointwise(node)
        reason = f"{name or str(node.target)} ({plain_name(node.name)}) mixes its channels"
        merged = self._tie_all(read, reason)
        shape = getattr(node.meta.get("val"), "shape", None)
        return None if is_experts(node) or shape is None else torch.full(hinted(shape), merged)

    def _linear(self, node: Node) -> Tensor | None:
        source: Any = node.args[0]
        name = self.linears[node]
        if source in self.numbers:
            labels = self.numbers[source].reshape(-1, self.numbers[source].shape[-1])
            if not torch.equal(labels, labels[:1].expand_as(labels)):
                self._tie_all([labels], f"the channels that {name} reads differ from token to token")
            self.flow.inputs[name] = labels[0]
            return None
        if name in self.whole or name not in self.flow.columns:
            return None
        own = torch.arange(self.flow.rows[name]) + self.flow.columns[name]
        return own.expand(hinted(node.meta["val"].shape)).contiguous()

    def _written(self, node: Node) -> Tensor:
        """Numbers of a copy into a part of a tensor; those of the tensor change with it, as views share memory."""
        way: list[Node] = []
        root: Any = node.args[0]
        while op(root) in ("slice", "select", "view", "unsqueeze", "transpose"):
            way.append(root)
            root = root.args[0]
        if root not in self.numbers:
            self.numbers[root] = torch.full(hinted(root.meta["val"].shape), FREE)
        part = self.numbers[root]
        for step in reversed(way):
            part = moved(part, step)
        part.copy_(self._known(node.args[1]))
        self.flow.values[root.name] = self.numbers[root]
        return part

    def _expanded(self, node: Node) -> Tensor:
        before = self.numbers[node.args[0]]  # type: ignore[index]
        after = before.expand(hinted(node.meta["val"].shape)).clone()
        lead = after.dim() - before.dim()
        for dim in range(lead, after.dim()):
            if dim and before.shape[dim - lead] == 1 < after.shape[dim]:
                after = self._copied(after, dim)
        return after

    def _copied(self, numbers: Tensor, dim: int) -> Tensor:
        """Numbers along whose ``dim`` there are equal copies: each part of them gets its own."""
        size = numbers.shape[dim]
        if self.copies == 1 or size % self.copies:
            return numbers
        part = torch.arange(size) * self.copies // size * self.flow.count
        return torch.where(numbers == FREE, FREE, numbers + part.view(-1, *[1] * (numbers.dim() - dim - 1)))

    def _pointwise(self, node: Node) -> Tensor:
        shape = hinted(node.meta["val"].shape)
        result = torch.full(shape, FREE)
        inputs = node.all_input_nodes
        for labels in (self.numbers[arg].expand(shape) for arg in inputs if arg in self.numbers):
            self._tie(result, labels)
            result = torch.where(result == FREE, labels, result)
        self.flow.meetings += [
            (result, arg) for arg in inputs if arg not in self.numbers and arg.meta.get("val") is not None
        ]
        return result

    def _reduced(self, node: Node, name: str) -> Tensor:
        labels = self.numbers.get(node.args[0])  # type: ignore[arg-type]
        if labels is None:
            return torch.full(hinted(node.meta["val"].shape), self._tie_all(self._read(node), name))
        where = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if name in ("rms_norm", "layer_norm"):
            where = list(range(-len(where), 0))  # type: ignore[arg-type]
        if name in ("norm", "linalg_vector_norm"):
            where = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        dims = [where] if isinstance(where, int) else list(where or range(labels.dim()))  # type: ignore[arg-type]
        merged = labels
        for dim in dims:
            merged = self._tied_along(merged, dim)
        result = merged.expand(hinted(node.meta["val"].shape)) if name in _ALONG else merged
        if name in _REDUCE and result.dim() != node.meta["val"].dim():
            for dim in sorted((d % labels.dim() for d in dims), reverse=True):
                result = result.squeeze(dim)
        for arg in node.all_input_nodes[1:]:
            self.flow.meetings.append((result, arg))
        return result.clone()

    def _attention(self, node: Node) -> Tensor:
        query, key, value = (self._known(arg) for arg in node.args[:3])
        if key.shape[1] != query.shape[1]:
            repeats = query.shape[1] // key.shape[1]
            key, value = (
                self._copied(each.unsqueeze(2).expand(-1, -1, repeats, -1, -1).clone(), 2).flatten(1, 2)
                for each in (key, value)
            )
        scores = [self._tied_along(self._tied_along(each, -1), 2) for each in (query, key)]
        value = self._tied_along(value, 2)
        self._tie(scores[0], scores[1])
        scores[0] = torch.where(scores[0] == FREE, scores[1], scores[0])
        self._tie(scores[0].expand_as(value), value)
        result = torch.where(value == FREE, scores[0].expand_as(value), value)
        result = result.expand(hinted(node.meta["val"].shape)).contiguous()
        for arg, shape in zip(node.args[:2], (query.shape, key.shape), strict=False):
            if arg not in self.numbers:
                heads = (
                    result.amax(-1, keepdim=True).expand(shape) if shape[2] == result.shape[2] else result[:, :, :1, :1]
                )
                self.flow.meetings.append((heads.expand(shape), arg))  # type: ignore[arg-type]
        others = [arg for arg in node.args[3:4] if isinstance(arg, Node)]
        others += [arg for arg in node.kwargs.values() if isinstance(arg, Node)]
        for arg in others:
            if arg in self.numbers:
                self._tie_all([self.numbers[arg], result], "a mask is made by a Linear")
            else:
                self.flow.meetings.append((result, arg))
        return result

    def _product(self, node: Node) -> Tensor:
        """Rows times columns of two values: what is summed over is tied, and both sides of the result."""
        left, right = (self._known(arg) for arg in node.args[:2])
        one, other = node.args[:2]
        if one not in self.numbers:
            self.flow.meetings.append((right.amax(-1).unsqueeze(-2).expand_as(left), one))  # type: ignore[arg-type]
        if other not in self.numbers:
            self.flow.meetings.append((left.amax(-2).unsqueeze(-1).expand_as(right), other))  # type: ignore[arg-type]
        left, right = self._tied_along(left, -1), self._tied_along(right, -2)
        shape = hinted(node.meta["val"].shape)
        left, right = left.expand(shape), right.expand(shape)
        self._tie(left, right)
        return torch.where(right == FREE, left, right).contiguous()

    # ------------------------------------------------------------------------------------------------------------ ties

    def _read(self, node: Node) -> list[Tensor]:
        return [self.numbers[arg] for arg in node.all_input_nodes if arg in self.numbers]

    def _known(self, node: Any) -> Tensor:
        if node in self.numbers:
            return self.numbers[node]
        return torch.full(hinted(node.meta["val"].shape), FREE)

    def _tied_along(self, labels: Tensor, dim: int) -> Tensor:
        """Tie everything along one dimension, of which one element is kept."""
        first = labels.amax(dim, keepdim=True)
        self._tie(first.expand_as(labels), labels)
        return first

    def _tie(self, one: Tensor, other: Tensor) -> None:
        pairs = torch.stack([one.reshape(-1), other.reshape(-1)])
        pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs[0] != FREE) & (pairs[1] != FREE)]
        if pairs.numel():
            self.flow.ties.append(torch.unique(pairs, dim=1))

    def _tie_all(self, labels: Sequence[Any], reason: str) -> int:
        """Tie all numbers of several values; one of them."""
        every = torch.cat([each.reshape(-1) for each in pytree.tree_leaves(list(labels))])
        every = torch.unique(every[every != FREE])
        if not every.numel():
            return FREE
        self._tie(every[:1].expand_as(every), every)
        self.flow.mixed.append((int(every[0]), reason))
        return int(every[0])


def units(flow: Flow, copies: int = 1) -> Tensor:
    """The unit of each number, int64 [count * copies]: the lowest number that it is tied to."""
    unit = torch.arange(flow.count * copies)
    if not flow.ties:
        return unit
    pairs = torch.cat(flow.ties, 1)
    low = pairs[:, (pairs < flow.count).all(0)]
    if copies > 1:  # what was tied before heads were copied is so in every copy; query heads have none
        seen = torch.cat([pairs.reshape(-1), *flow.inputs.values()])
        owners = {flow.owner(int(number)) for number in seen[seen >= flow.count].unique()}
        copied = torch.zeros(flow.count, dtype=torch.bool)
        for name in owners:
            copied[flow.columns[name] : flow.columns[name] + flow.rows[name]] = True
        low = low[:, copied[low].all(0)]
    pairs = torch.cat([pairs, *(low + part * flow.count for part in range(1, copies))], 1)
    pairs = torch.unique(pairs, dim=1)
    while True:
        lowest = unit[pairs].amin(0)
        after = unit.clone()
        after.scatter_reduce_(0, unit[pairs[0]], lowest, "amin").scatter_reduce_(0, unit[pairs[1]], lowest, "amin")
        after.scatter_reduce_(0, pairs[0], lowest, "amin").scatter_reduce_(0, pairs[1], lowest, "amin")
        after = after[after]
        if torch.equal(after, unit):
            return unit
        unit = after


def _is_pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or op(node) in ("masked_fill", "where")


def _keeps(node: Node) -> bool:
    """Whether a reduction keeps its dimension."""
    return bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
