"""Numbers in place of the values of a traced graph: what its nodes are called, and what reshaping does to numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

_NAMESPACES = ("aten", "prims")


def op(node: Any) -> str:
    """Name of the ATen or prims operation that ``node`` calls, "" for anything else."""
    if not isinstance(node, Node) or node.op != "call_function":
        return ""
    namespace, _, name = getattr(node.target, "_name", "").partition("::")
    return name.partition(".")[0] if namespace in _NAMESPACES else ""


def hint(size: Any) -> Any:
    """What a size, or a node that gives one, was when the graph was traced; anything else as it is."""
    if isinstance(size, Node):
        size = size.meta["val"]
    return size.node.hint if isinstance(size, torch.SymInt) else size


def hinted(shape: Sequence[Any]) -> list[int]:
    """A shape as it was when the graph was traced."""
    return [hint(size) for size in shape]


def moved(labels: Tensor, node: Node) -> Any:
    """What the reshaping operation ``node`` makes of labels in place of its first argument."""
    given = (list(node.args[1:]), dict(node.kwargs))
    args, kwargs = pytree.tree_map(hint, given, is_leaf=lambda item: isinstance(item, Node))
    kwargs.pop("memory_format", None)
    return node.target(labels, *args, **kwargs)  # type: ignore[operator]
