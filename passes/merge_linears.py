"""Make one wide product of Linears that read the same input under the same scheme: q, k and v; gate and up.

Whether that pays is the kernel's to say (``Kernel.merges`` and ``refuses_merging``), and so is how: the op that takes
their place gets the weights of all of them as they are in the model, so that none is copied, held twice or left stale.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from ..ops import find_kernel, scheme_of
from .base import Edit, Result, apply_rules, described, semantic_name
from .matching import RESHAPES, op, value


@dataclass
class MergeLinears:
    """Quantized Linears of one input whose kernel merges."""

    name: str = "merge_linears"
    level: str = "aot"
    numerics: str = "exact"
    expected: int | None = None

    def __call__(self, module: GraphModule) -> Result:
        """Rewrite ``module.graph``; ``matches`` counts wide products."""
        return apply_rules([OneProduct()], module, self.name)


@dataclass
class _Linear:
    """What the two ops have in common."""

    node: Node
    x: tuple[Node, ...]
    weight: list[Node]
    bias: Node | None
    scheme: str
    kernel: str
    out: int
    dtype: torch.dtype

    @classmethod
    def of(cls, node: Node) -> _Linear | None:
        """``node`` if it is one of them."""
        name, arguments = semantic_name(node), cast(Any, node.args)
        if name == "linear":
            x, weight, bias, scheme, kernel, out = arguments
            return cls(node, (x,), weight, bias, scheme, kernel, out, value(node).dtype)
        if name == "scaled_linear":
            parts, weight, bias, scheme, kernel, out, dtype = arguments
            return cls(node, tuple(parts), weight, bias, scheme, kernel, out, dtype)
        return None

    @property
    def key(self) -> Any:
        """Equal for Linears that can be one."""
        return tuple(map(_origin, self.x)), self.scheme, self.kernel, self.dtype, len(self.weight)


def _origin(x: Any) -> Any:
    """What ``x`` is: each reader of an activation may have a view, or a part of a quantization, of its own."""
    if isinstance(x, Node) and (op(x) in RESHAPES or x.target is operator.getitem):
        return x.target, _origin(x.args[0]), str(x.args[1])
    return x


class OneProduct:
    """Two or more Linears become one ``linears`` where the first of them is."""

    def __init__(self) -> None:
        self.alike: dict[Any, list[_Linear]] | None = None

    def pattern(self, node: Node) -> list[_Linear] | None:
        """All Linears like ``node``, if it is the first of several and its kernel merges."""
        first = _Linear.of(node)
        if first is None or not find_kernel(first.kernel).merges:
            return None
        if self.alike is None:
            self.alike = {}
            for linear in filter(None, map(_Linear.of, node.graph.nodes)):
                self.alike.setdefault(linear.key, []).append(linear)
        found = self.alike.get(first.key, [])
        return found if len(found) > 1 and found[0].node is node else None

    def check(self, match: list[_Linear]) -> str:
        """Why they stay apart, "" when they can be merged."""
        first = match[0]
        for linear in match[1:]:
            late = [n for n in (*linear.weight, linear.bias) if n is not None and n.op == "call_function"]
            if late := [n for n in late if n > first.node]:
                return f"{late[0].name}, which {described(linear.node)} reads, is made after {first.node.name}"
        weights = [[value(tensor) for tensor in linear.weight] for linear in match]
        kernel = find_kernel(first.kernel)
        return kernel.refuses_merging(weights, scheme_of(first.scheme), [linear.out for linear in match])

    def rewrite(self, match: list[_Linear], edit: Edit) -> None:
        """One call, and a getitem in place of each."""
        first = match[0]
        for linear in match[1:]:
            for node in (*linear.weight, linear.bias):
                if node is not None and node.op == "get_attr" and node > first.node:
                    first.node.prepend(node)
        weights, biases = [n for linear in match for n in linear.weight], [linear.bias for linear in match]
        outs = [linear.out for linear in match]
        arguments = ([*first.x], weights, biases, first.scheme, first.kernel, outs, first.dtype)
        wide = edit.call(first.node, torch.ops.qcompile.linears.default, arguments)
        parts = [edit.call(first.node, operator.getitem, (wide, i), like=old.node) for i, old in enumerate(match)]
        for linear, part in zip(match, parts, strict=True):
            edit.replace(linear.node, part)
