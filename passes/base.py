"""What a pass is: a function on a graph that says what it matched, what it nearly matched, and why not.

Most passes are lists of rules, each three small methods: ``pattern`` finds what looks right, ``check`` says why it is
not, ``rewrite`` replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ..errors import PassError


@dataclass
class Result:
    """Matches of one run; ``rejected`` holds (node, reason) of every near-miss."""

    matches: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)


class Pass(Protocol):
    """A rewrite with a contract.

    ``level`` is the graph that it works on: "model" (exported, or Dynamo's) or "aot" (functional, ATen operations).
    ``numerics`` is "exact" (same bits), "reorder" (same sums in another order) or "lossy" (quantization itself).
    ``expected`` is the number of matches that must happen, or None when any number is right. A pass that inserts
    operations which overwrite their inputs says so with ``mutates = True``.
    """

    name: str
    level: str
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
    return type(value).__name__.removeprefix("Sym").lower()  # a traced size may be a SymInt that is a constant


def replace(old: Node, new: Node, pass_name: str) -> None:
    """Let ``new`` stand for ``old`` everywhere; PassError if its shape, dtype or device differ.

    What only ``old`` read is erased with it.
    """
    before, after = old.meta.get("val"), new.meta.get("val")
    if before is not None and after is not None and signature(before) != signature(after):
        raise PassError(
            f"pass {pass_name} would replace {described(old)} {signature(before)} "
            f"by {new.name} {signature(after)}: shape, dtype and device must stay"
        )
    for key, value in old.meta.items():
        new.meta.setdefault(key, value)
    old.replace_all_uses_with(new)
    _erase_unused([old])


def _erase_unused(unused: list[Node]) -> None:
    """Erase those that nobody reads, and what only they read."""
    while unused:
        node = unused.pop()
        if not node.users and node.op == "call_function" and not node._erased and not node.is_impure():
            unused += node.all_input_nodes
            node.graph.erase_node(node)


class Edit:
    """What a rule may do to a graph: insert calls, whose fake values are computed, and replace nodes."""

    def __init__(self, pass_name: str) -> None:
        self.pass_name = pass_name
        self._values: dict[Any, Any] = {}

    def call(
        self,
        before: Node,
        target: Callable,
        arguments: Sequence[Any],
        like: Node | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Node:
        """A call of ``target`` in front of ``before``; it belongs to the same module as ``like`` (default: before)."""
        with before.graph.inserting_before(before):
            node = before.graph.call_function(target, tuple(arguments), dict(kwargs or {}))
        origin = before if like is None else like
        if "nn_module_stack" in origin.meta:
            node.meta["nn_module_stack"] = origin.meta["nn_module_stack"]
        value = fake_result(node, self._values)
        if value is not None:
            node.meta["val"] = value
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Let ``new`` stand for ``old`` everywhere, as ``replace`` does."""
        replace(old, new, self.pass_name)

    def erase(self, node: Node) -> None:
        """Erase a node that nobody reads, even one that may draw random numbers, and what only it read."""
        if not node._erased:
            inputs = node.all_input_nodes
            node.graph.erase_node(node)
            _erase_unused(inputs)


class Rule(Protocol):
    """One rewrite. ``match`` is whatever ``pattern`` returns."""

    def pattern(self, node: Node) -> Any:
        """What was found from ``node`` on, None if it looks like nothing that this rule is about."""
        ...

    def check(self, match: Any) -> str:
        """Why ``match`` must stay as it is, "" when it can be replaced."""
        ...

    def rewrite(self, match: Any, edit: Edit) -> None:
        """Replace ``match``."""
        ...


def apply_rules(rules: Sequence[Rule], module: GraphModule, pass_name: str) -> Result:
    """Apply the rules one after the other, each to every node in order; refused matches are near-misses."""
    result, edit = Result(), Edit(pass_name)
    for rule in rules:
        for node in list(module.graph.nodes):
            match = None if node._erased else rule.pattern(node)
            if match is None:
                continue
            if reason := rule.check(match):
                result.rejected.append((described(node), reason))
                continue
            rule.rewrite(match, edit)
            result.matches += 1
    return result


def fake_result(node: Node, known: dict[Any, Any]) -> Any:
    """Fake value of a call, from those of its inputs; None where one has none. ``known`` saves repeated work."""
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    values = [item.meta.get("val") if isinstance(item, Node) else item for item in flat]
    if any(value is None for item, value in zip(flat, values, strict=True) if isinstance(item, Node)):
        return None
    key = (node.target, spec, *(value_key(value) for value in values))
    if key not in known:
        args, kwargs = pytree.tree_unflatten(values, spec)
        known[key] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[key]


def value_key(value: Any) -> Any:
    """What makes two arguments the same for an operation: a tensor's signature and strides, the text of all else."""
    if isinstance(value, Tensor):
        return signature(value), tuple(str(stride) for stride in value.stride())
    if isinstance(value, tuple | list):
        return tuple(value_key(item) for item in value)
    return str(value)
