"""What a pass is: a function on a graph that says what it matched, what it nearly matched, and why not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import PassError


@dataclass
class Result:
    """Matches of one run; ``rejected`` holds (node, reason) of every near-miss."""

    matches: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)


class Pass(Protocol):
    """A rewrite with a contract.

    ``numerics`` is "exact" (same bits), "reorder" (same sums in another order) or "lossy" (quantization itself).
    ``expected`` is the number of matches that must happen, or None when any number is right.
    """

    name: str
    numerics: str

    @property
    def expected(self) -> int | None:
        """How often this pass must match in the graph it is given."""
        ...

    def __call__(self, module: GraphModule) -> Result:
        """Rewrite ``module.graph`` in place."""
        ...


def semantic_name(node: Node) -> str:
    """Name of the qcompile op that a node calls ("linear", "quantize", ...), or "" for any other node.

    A module's call of ``torch.ops.qcompile.linear`` is a packet in Dynamo's graph and an overload elsewhere.
    """
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", node.target)
    qualified = getattr(packet, "_qualified_op_name", "")
    return qualified.removeprefix("qcompile::") if qualified.startswith("qcompile::") else ""


def described(node: Node) -> str:
    """A node's name and the module it came from, for messages."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return f"{node.name} ({stack[-1][0]})" if stack else node.name


def signature(value: Any) -> Any:
    """Shape, dtype and device of a fake value; what a rewrite must leave as it was."""
    if isinstance(value, Tensor):
        return tuple(str(size) for size in value.shape), value.dtype, value.device.type
    if isinstance(value, tuple | list):
        return tuple(signature(item) for item in value)
    return type(value).__name__


def replace(old: Node, new: Node, pass_name: str) -> None:
    """Let ``new`` stand for ``old`` everywhere; PassError if its shape, dtype or device differ."""
    before, after = old.meta.get("val"), new.meta.get("val")
    if before is not None and after is not None and signature(before) != signature(after):
        raise PassError(
            f"pass {pass_name} would replace {described(old)} {signature(before)} "
            f"by {new.name} {signature(after)}: shape, dtype and device must stay"
        )
    for key, value in old.meta.items():
        new.meta.setdefault(key, value)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
