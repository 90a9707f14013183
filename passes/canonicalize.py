"""Find RMSNorm and gated activations in an AOT graph and say so: one semantic op each instead of five to twelve.

What is found is computed as before, bit for bit: precision, where it is rounded, and the order of its operations are
part of each op's arguments, and whatever does not fit them is left alone. Sizes and settings such as eps are bound as
values: a literal, or a tensor that the graph reads at run time.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .. import fused_ops  # noqa: F401  (registers the ops)
from ..fused_ops import wide_dtype
from ..gates import Gate
from .base import Edit, Result, apply_rules, semantic_name
from .matching import (
    cast_source,
    described_value,
    dtype_of,
    op,
    operands,
    other_operand,
    shape_of,
    sole_user,
    squared,
)

KEPT = (torch.ops.aten.silu.default, torch.ops.aten.gelu.default, torch.ops.aten.clamp.default)
"""Activations that AOTAutograd must not decompose before they are found; ``lower`` decomposes what is left of them."""


@dataclass
class Canonicalize:
    """Norms, then the residual additions before them, then gated activations."""

    name: str = "canonicalize"
    level: str = "aot"
    numerics: str = "exact"
    expected: int | None = None

    def __call__(self, module: GraphModule) -> Result:
        """Rewrite ``module.graph``; ``matches`` counts norms, additions and activations."""
        return apply_rules([RMSNorm(), AddRMSNorm(), GatedActivation()], module, self.name)


# --------------------------------------------------------------------------------------------------------------- norms


@dataclass
class _Norm:
    """``last`` is ``x / sqrt(mean(x²) + eps) * (weight + offset) + bias``; ``inside`` are the nodes before it."""

    x: Node
    wide: Node
    mean: Node
    eps: Any
    last: Node
    inside: list[Node] = field(default_factory=list)
    weight: Node | None = None
    bias: Node | None = None
    offset: float = 0.0
    round_first: bool = False

    def advance(self, node: Node) -> None:
        """Take in the only reader of what was matched so far."""
        self.inside.append(self.last)
        self.last = node


class RMSNorm:
    """An RMSNorm in each form that transformers writes it in, found from its reciprocal root."""

    def pattern(self, node: Node) -> _Norm | None:
        """``node`` is the root: rsqrt(mean(x²) + eps), or the same as a power."""
        if op(node) != "rsqrt" and not (op(node) == "pow" and node.args[1] == -0.5):
            return None
        terms = operands(node.args[0], "add")
        mean = next((term for term in terms or () if op(term) == "mean"), None)
        wide = squared(mean.args[0]) if mean is not None else None
        if terms is None or mean is None or wide is None:
            return None
        eps = terms[1] if terms[0] is mean else terms[0]
        source = cast_source(wide)
        x = source if source is not None and dtype_of(wide) == wide_dtype(value_dtype(source)) else wide
        match = _Norm(x, wide, mean, eps, node, [mean.args[0], mean, node.args[0]])  # type: ignore[list-item]
        scaled = sole_user(node)
        if scaled is not None and other_operand(scaled, "mul", node) in (wide, x):
            match.advance(scaled)
            self._follow(match)
        return match

    def _follow(self, match: _Norm) -> None:
        """Take in what is done to the normalized value, as long as nobody else reads what is between."""
        dtype, size = dtype_of(match.x), shape_of(match.x)[-1:]

        def rounds(node: Node | None) -> bool:
            return cast_source(node) is match.last and dtype_of(node) == dtype  # type: ignore[arg-type]

        def vector(node: Any) -> bool:
            return isinstance(node, Node) and shape_of(node) == size

        following = sole_user(match.last)
        if following is not None and rounds(following):
            match.round_first = True
            match.advance(following)
        following = sole_user(match.last)
        if vector(factor := other_operand(following, "mul", match.last)):
            match.weight, match.offset = self._weight(factor, match)
            match.advance(following)  # type: ignore[arg-type]
            following = sole_user(match.last)
            if vector(term := other_operand(following, "add", match.last)):
                match.bias = term
                match.advance(following)  # type: ignore[arg-type]
        following = sole_user(match.last)
        if following is not None and dtype_of(match.last) != dtype and rounds(following):
            match.advance(following)

    def _weight(self, factor: Node, match: _Norm) -> tuple[Node, float]:
        """The stored weight and what is added to it in float32; a sum in another dtype is a weight of its own."""
        terms = operands(factor, "add") or ()
        offset = next((term for term in terms if isinstance(term, int | float)), None)
        stored = next((term for term in terms if isinstance(term, Node)), None)
        if offset and stored is not None and dtype_of(factor) == dtype_of(match.wide):
            return cast_source(stored) or stored, float(offset)
        exact = cast_source(factor)
        if exact is not None and not match.round_first and dtype_of(factor) == dtype_of(match.wide):
            return exact, 0.0
        return factor, 0.0

    def check(self, match: _Norm) -> str:
        """Why this is not the op's definition, "" when it is."""
        x, last = match.x, match.last
        dims, rank = match.mean.args[1:2], len(shape_of(x))
        if dims not in (([-1],), ([rank - 1],)) or match.mean.args[2:] != (True,) or match.mean.kwargs:
            return f"the mean is not over the last axis alone, kept as one: {match.mean.args[1:]} {match.mean.kwargs}"
        if isinstance(match.eps, Node) and shape_of(match.eps) != ():
            return f"eps is no number: {described_value(match.eps)}"
        if dtype_of(match.wide) != wide_dtype(value_dtype(x)):
            return f"it is computed in {dtype_of(match.wide)}, not in {wide_dtype(value_dtype(x))}"
        if len(match.inside) < 4:
            return f"{last.name} does not only multiply the value whose mean square it was made of"
        shared = next((node for node in match.inside if len(node.users) > 1), None)
        if shared is not None and squared(shared) is None:
            return f"{shared.name} is read by something else as well"
        if dtype_of(last) != dtype_of(x) or shape_of(last) != shape_of(x):
            return f"it makes {described_value(last)} of {described_value(x)}"
        return ""

    def rewrite(self, match: _Norm, edit: Edit) -> None:
        """One op in place of the last node."""
        at_run_time = isinstance(match.eps, Node)
        eps, eps_tensor = (None, match.eps) if at_run_time else (match.eps, None)
        arguments = (match.x, match.weight, match.bias, eps, eps_tensor, match.offset, match.round_first)
        edit.replace(match.last, edit.call(match.last, torch.ops.qcompile.rms_norm.default, arguments))


def value_dtype(node: Node) -> torch.dtype:
    """Dtype of a node that is known to be a tensor."""
    dtype = dtype_of(node)
    assert dtype is not None
    return dtype


class AddRMSNorm:
    """A residual addition whose sum is normalized, and goes on to the next addition as well."""

    def pattern(self, node: Node) -> tuple[Node, Node] | None:
        """``node`` is a norm, and its input is a sum of two tensors that somebody else reads, too."""
        total = node.args[0] if semantic_name(node) == "rms_norm" else None
        terms = operands(total, "add")
        if not isinstance(total, Node) or terms is None or len(total.users) < 2:
            return None
        return (node, total) if all(isinstance(term, Node) for term in terms) else None

    def check(self, match: tuple[Node, Node]) -> str:
        """Why the sum cannot be made where the norm is, "" when it can."""
        norm, total = match
        for term in total.args:
            if (dtype_of(term), shape_of(term)) != (dtype_of(total), shape_of(total)):  # type: ignore[arg-type]
                return f"it adds {described_value(term)} to make {described_value(total)}"  # type: ignore[arg-type]
        early = next((user for user in total.users if user < norm), None)
        return f"{early.name} reads the sum before the norm does" if early is not None else ""

    def rewrite(self, match: tuple[Node, Node], edit: Edit) -> None:
        """(norm, sum) of one op."""
        norm, total = match
        both = edit.call(norm, torch.ops.qcompile.add_rms_norm.default, (*total.args, *norm.args[1:]))
        normal = edit.call(norm, operator.getitem, (both, 0))
        edit.replace(total, edit.call(norm, operator.getitem, (both, 1), like=total))
        edit.replace(norm, normal)


# --------------------------------------------------------------------------------------------------------- activations


@dataclass
class _Gated:
    gate: Node
    up: Node
    function: Gate
    last: Node


class GatedActivation:
    """``f(gate) * up``, in either order, with the clamps and the shift that ``gates`` knows."""

    def pattern(self, node: Node) -> _Gated | None:
        """``node`` is the activation, and its only reader multiplies it with another tensor."""
        found = self._function(node)
        if found is None:
            return None
        function, gate, result = found
        last = sole_user(result)
        up = other_operand(last, "mul", result)
        if last is None or not isinstance(up, Node) or up is result:
            return None
        return self._with_clamps(_Gated(gate, up, Gate(function[0], alpha=function[1]), last))

    def _function(self, node: Node) -> tuple[tuple[str, float], Node, Node] | None:
        """((name, alpha), input, output) of an activation."""
        name = op(node)
        if name == "silu":
            return ("silu", 1.0), node.args[0], node  # type: ignore[return-value]
        if name == "gelu":
            tanh = node.kwargs.get("approximate", "none") == "tanh"
            return ("gelu_tanh" if tanh else "gelu", 1.0), node.args[0], node  # type: ignore[return-value]
        if name == "relu":
            user = sole_user(node)
            is_squared = user is not None and squared(user) is node
            return ("relu2" if is_squared else "relu", 1.0), node.args[0], user if is_squared else node  # type: ignore
        if name == "sigmoid":
            scaled, last = node.args[0], sole_user(node)
            x = other_operand(last, "mul", node)
            alpha = other_operand(scaled, "mul", x) if isinstance(x, Node) else None
            if last is not None and isinstance(alpha, float):
                return ("silu", alpha), x, last
        return None

    def _with_clamps(self, match: _Gated) -> _Gated:
        """Take in ``gate.clamp(max=limit)``, ``up.clamp(-limit, limit)`` and ``up + shift`` where they go together."""
        gate, up, shift = match.gate, match.up, 0.0
        terms = operands(up, "add")
        if terms and isinstance(terms[0], Node) and isinstance(terms[1], int | float):
            up, shift = terms[0], float(terms[1])
        low, high = _clamp(up)
        below, limit = _clamp(gate)
        if limit is not None and below is None and (low, high) == (-limit, limit):
            gate, up = gate.args[0], up.args[0]  # type: ignore[assignment]
        else:
            limit = None
        limit = None if limit is None else float(limit)
        function = Gate(match.function.function, alpha=match.function.alpha, limit=limit, shift=shift)
        return _Gated(gate, up, function, match.last)

    def check(self, match: _Gated) -> str:
        """Why this is not the op's definition, "" when it is."""
        wanted = (dtype_of(match.last), shape_of(match.last))
        for node in (match.gate, match.up):
            if (dtype_of(node), shape_of(node)) != wanted:
                return (
                    f"gate is {described_value(match.gate)}, up is {described_value(match.up)}, "
                    f"their product {described_value(match.last)}"
                )
        return ""

    def rewrite(self, match: _Gated, edit: Edit) -> None:
        """One op in place of the product."""
        arguments = (match.gate, match.up, str(match.function))
        edit.replace(match.last, edit.call(match.last, torch.ops.qcompile.gated_act.default, arguments))


def _clamp(node: Node) -> tuple[float | None, float | None]:
    """Bounds of a clamp; (None, None) for any other node."""
    if op(node) != "clamp":
        return None, None
    low, high = (*node.args[1:], None, None)[:2]
    return node.kwargs.get("min", low), node.kwargs.get("max", high)  # type: ignore[return-value]
