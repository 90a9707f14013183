"""Attention as one op, whose query heads share keys and values without the copies that give each its own.

A model repeats the heads of its cache, as many times as query heads share one, and attends to the copies: at each token
the whole cache is read and written. ``qcompile::attend`` takes shared heads as they are. The CPU has an operation for
it; where that refuses, ATen's attention takes them too (since torch 2.9).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .base import Edit, Result, apply_rules
from .matching import RESHAPES, op, shape_of, value

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass
class AttendSharedHeads:
    """Attention whose softmax nobody else reads; of keys and values that ``expand`` repeats, those before it."""

    name: str = "attend_shared_heads"
    level: str = "aot"
    numerics: str = "reorder"
    expected: int | None = None

    def __call__(self, module: GraphModule) -> Result:
        """Rewrite ``module.graph``; ``matches`` counts attentions."""
        return apply_rules([_Attention()], module, self.name)


class _Attention:
    def pattern(self, node: Node) -> tuple[Node, Node] | None:
        if node.target is not _ATTENTION:
            return None
        readers = [user for user in node.users if user.users]
        if len(readers) != 1 or readers[0].target is not operator.getitem or readers[0].args[1] != 0:
            return None
        return node, readers[0]

    def check(self, match: tuple[Node, Node]) -> str:
        if _arguments(match[0])[3]:
            return "it drops some of its weights"
        sources = _sources(match[0])
        if sources and len({shape_of(source)[1] for source in sources}) > 1:
            key, of_value = sources
            return f"{key.name} has {shape_of(key)[1]} heads and {of_value.name} {shape_of(of_value)[1]}"
        return ""

    def rewrite(self, match: tuple[Node, Node], edit: Edit) -> None:
        node, result = match
        query, key, of_value, _, causal, mask, scale = _arguments(node)
        pair = _sources(node) or [key, of_value]
        attend = torch.ops.qcompile.attend.default
        edit.replace(result, edit.call(node, attend, (query, *pair, mask, scale, causal)))
        for left in (*node.users, node):
            edit.erase(left)  # itself too: dropout makes it an operation that draws random numbers


def _sources(node: Node) -> list[Node]:
    """Keys and values of an attention before their heads were repeated; none unless both were."""
    found = [_repeated(node.args[i]) for i in (1, 2)]
    return [source for source in found if source is not None] if None not in found else []


def _arguments(node: Node) -> list[Any]:
    """query, key, value, dropout_p, is_causal, attn_mask, scale: all arguments, defaults filled in."""
    given = list(node.args) + [0.0, False][len(node.args) - 3 :]
    return [*given, node.kwargs.get("attn_mask"), node.kwargs.get("scale")]


def _repeated(node: Any) -> Node | None:
    """[batch, heads, positions, width] if ``node`` is that with each head ``times`` times, one after the other.

    How models write it: ``x[:, :, None].expand(batch, heads, times, positions, width).reshape(...)``.
    """
    if op(node) not in RESHAPES:
        return None
    inner = node.args[0]
    inner = inner.args[0] if op(inner) == "clone" else inner
    if op(inner) != "expand" or op(inner.args[0]) != "unsqueeze" or inner.args[0].args[1] != 2:
        return None
    source = inner.args[0].args[0]
    shapes = [shape_of(n) for n in (source, inner, node)]
    if [len(shape) for shape in shapes] != [4, 5, 4]:
        return None
    (batch, heads, *rest), expanded, repeated = shapes
    heads_after = str(value(inner).shape[1] * value(inner).shape[2])
    same = expanded[:2] == (batch, heads) and list(expanded[3:]) == rest
    return source if same and repeated == (batch, heads_after, *rest) else None
