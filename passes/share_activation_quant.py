"""Quantize an activation once for all of its readers: q, k and v share one, gate and up another.

Neither AOTAutograd nor Inductor merges equal calls of a custom op. A quantization of a reshaped activation is moved in
front of the reshape first: a mixture of experts flattens the tokens that its shared expert reads as they are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from .base import Edit, Result, apply_rules, semantic_name
from .matching import RESHAPES, op, shape_of


@dataclass
class ShareActivationQuant:
    """Merges ``qcompile.quantize`` calls on the same tensor."""

    name: str = "share_activation_quant"
    level: str = "aot"
    numerics: str = "exact"
    expected: int | None = None

    def __call__(self, module: GraphModule) -> Result:
        """Rewrite ``module.graph``; ``matches`` counts calls that were moved and calls that were removed."""
        return apply_rules([BeforeReshape(), Equal()], module, self.name)


class BeforeReshape:
    """``quantize(view(x))`` is ``view(quantize(x))`` where the view keeps the axis along which scales are taken."""

    def pattern(self, node: Node) -> Node | None:
        """``node`` quantizes a reshaped tensor of more or fewer axes."""
        if semantic_name(node) != "quantize" or op(view := node.args[0]) not in RESHAPES:
            return None
        return node if shape_of(view)[-1:] == shape_of(view.args[0])[-1:] else None  # type: ignore[union-attr, arg-type]

    def check(self, node: Node) -> str:
        """Scales belong to rows, or to the whole tensor: nothing refuses."""
        return ""

    def rewrite(self, node: Node, edit: Edit) -> None:
        """Quantize first, then reshape each result."""
        view: Any = node.args[0]
        parts = edit.call(node, node.target, (view.args[0], *node.args[1:]))  # type: ignore[arg-type]
        for user in list(node.users):
            part = edit.call(user, operator.getitem, (parts, user.args[1]))
            sizes = [*view.args[1][:-1], part.meta["val"].shape[-1]]
            edit.replace(user, edit.call(user, view.target, (part, sizes)))


class Equal:
    """The same quantization of the same tensor, for the second time."""

    def __init__(self) -> None:
        self.first: dict[Any, Node] = {}

    def pattern(self, node: Node) -> tuple[Node, Node] | None:
        """(call, earlier equal call)."""
        if semantic_name(node) != "quantize":
            return None
        x, params, activation = node.args
        kept = self.first.setdefault((x, tuple(params), activation), node)  # type: ignore[arg-type]
        return None if kept is node else (node, kept)

    def check(self, match: tuple[Node, Node]) -> str:
        """Equal calls of a function without side effects: nothing refuses."""
        return ""

    def rewrite(self, match: tuple[Node, Node], edit: Edit) -> None:
        """Let the earlier call serve both."""
        edit.replace(*match)
