"""Reading an AOT graph: small questions about nodes, from which the rules of the passes are made.

Names are those of ATen and prims without namespace and overload ("mul", "convert_element_type").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..labels import op

_CASTS = ("convert_element_type", "_to_copy", "to")
RESHAPES = ("view", "reshape", "_unsafe_view")


def value(node: Node) -> Any:
    """The fake value of ``node``."""
    return node.meta["val"]


def dtype_of(node: Node) -> torch.dtype | None:
    """Dtype of a tensor node, None for any other."""
    found = node.meta.get("val")
    return found.dtype if isinstance(found, Tensor) else None


def shape_of(node: Node) -> tuple[str, ...]:
    """Shape of a tensor node; sizes as text, so that comparing symbolic ones adds no guard."""
    found = node.meta.get("val")
    return tuple(str(size) for size in found.shape) if isinstance(found, Tensor) else ()


def sole_user(node: Node | None) -> Node | None:
    """The only reader of ``node``, None when there are more or none."""
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def operands(node: Any, name: str) -> tuple[Any, Any] | None:
    """Both operands of ``node`` if it is a plain "add" or "mul" (which commute); numbers may be among them."""
    if op(node) != name or len(node.args) != 2 or node.kwargs:
        return None
    return node.args


def other_operand(node: Any, name: str, known: Any) -> Any:
    """What ``known`` is added to or multiplied with in ``node``; None if ``node`` does neither."""
    both = operands(node, name)
    if both is None or known not in both:
        return None
    return both[1] if both[0] is known else both[0]


def cast_source(node: Any) -> Node | None:
    """What ``node`` converts to another dtype and nothing else; None if it is no such cast."""
    if op(node) not in _CASTS or not isinstance(node.args[0], Node):
        return None
    given = [*node.args[1:], *node.kwargs.values()]
    return node.args[0] if len(given) == 1 and isinstance(given[0], torch.dtype) else None


def squared(node: Any) -> Node | None:
    """``x`` if ``node`` is its square, in any of the spellings that give the same bits."""
    if op(node) == "square" or (op(node) == "pow" and node.args[1] == 2):
        return node.args[0]
    both = operands(node, "mul")
    return both[0] if both and both[0] is both[1] and isinstance(both[0], Node) else None


def described_value(node: Node) -> str:
    """Dtype and shape, for reasons: "bfloat16 [2, 8]"."""
    return f"{str(dtype_of(node)).removeprefix('torch.')} [{', '.join(shape_of(node))}]"
