"""A traced graph in consecutive parts, run one after the other on real inputs.

The parts are the decoder blocks and what lies between them. What one part hands on to the next are the values that are
read later: hidden states, masks, position embeddings, whatever an architecture has. Nothing is assumed about the
signature of a block, and no cache is involved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from .errors import CalibrationError
from .sites import LINEARS, block_name, first_names, module_name, plain_name

Values = dict[Node, Any]
Observer = Callable[[str, Tensor], None]
"""Called with the name of a site and what it reads, each time that a site is about to be computed."""


@dataclass(frozen=True)
class Segment:
    """A part of a model. ``name`` is its decoder block, or "".

    reads  from each site that is computed here, in order, to what it reads: equal for sites with the same inputs only
    nodes  what is run; calls: the nodes among them that compute a site, and its name
    """

    name: str
    reads: Mapping[str, Hashable]
    nodes: tuple[Node, ...] = ()
    calls: dict[Node, str] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that are computed here, in order."""
        return tuple(self.reads)


class Runner(Protocol):
    """Something that runs a model part by part; ``values`` are whatever it hands from one part to the next."""

    parts: list[Segment]

    def start(self, inputs: tuple[Any, ...]) -> Any:
        """What the first part begins with, for one set of positional inputs."""
        ...

    def run(self, part: Segment, values: Any, observe: Observer | None = None) -> Any:
        """Run one part on what its predecessor handed on; returns what it hands on itself, and leaves ``values``."""
        ...

    def look(self, part: Segment, values: Any, observe: Observer) -> None:
        """Observe what the sites of a part read, as ``run`` does, and hand nothing on."""
        ...


class Segments:
    """The parts of ``graph`` that compute ``sites`` (names), over the modules and tensors of ``model`` as they are now.

    A node that computes one of the sites calls the module of that name, so quantized modules take effect as soon as
    they are installed; every other node runs as traced. Tensors of the model are read when a node needs them. finely:
    blocks are cut again before sites that read something else than the site before (q, k and v; o; gate and up; down).
    """

    def __init__(self, graph: GraphModule, model: nn.Module, sites: Iterable[str], *, finely: bool = False) -> None:
        self.model, self.graph = model, graph
        wanted, first = frozenset(sites), first_names(model)
        calls = {
            node: name
            for node in graph.graph.nodes
            if node.op == "call_function"
            and node.target in LINEARS
            and (name := first.get(module_name(node), "")) in wanted
        }
        nodes = _executed(graph, calls)
        self.parts = _cut(nodes, calls, finely)
        self._done_after = _last_uses(nodes, calls)

    def start(self, inputs: tuple[Any, ...]) -> Values:
        """What the first part begins with, for one set of positional inputs."""
        placeholders = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        return dict(zip(placeholders, inputs, strict=True))

    def run(self, part: Segment, values: Values, observe: Observer | None = None) -> Values:
        """Run one part on what its predecessor handed on; returns what it hands on itself, and leaves ``values``."""
        return self._run(part, part.nodes, frozenset(part.nodes), values, observe)

    def look(self, part: Segment, values: Values, observe: Observer) -> None:
        """Observe what the sites of a part read, and compute nothing else."""
        computed: set[Node] = set()
        for node in reversed(part.nodes):
            if node in part.calls:
                computed.add(node.all_input_nodes[0])
            elif node in computed or (computed and _mutates(node)):
                computed |= {node, *node.all_input_nodes}
        nodes = [node for node in part.nodes if node in computed or node in part.calls]
        self._run(part, nodes, computed, values, observe)

    @torch.no_grad()
    def _run(
        self, part: Segment, nodes: Sequence[Node], computed: Set[Node], values: Values, observe: Observer | None
    ) -> Values:
        values = _own_copy(values) if any(_mutates(node) for node in nodes) else dict(values)
        for node in nodes:
            site = part.calls.get(node)
            if site is not None:
                x = self._value(node.all_input_nodes[0], values)
                if observe is not None:
                    observe(site, x)
                if node in computed:
                    values[node] = self.model.get_submodule(site)(x)
            else:
                args: Any = map_arg(node.args, lambda n: self._value(n, values))
                kwargs: Any = map_arg(node.kwargs, lambda n: self._value(n, values))
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            for finished in self._done_after.get(node, ()):
                values.pop(finished, None)
        return values

    def _value(self, node: Node, values: Values) -> Any:
        return values[node] if node.op != "get_attr" else self._tensor(plain_name(str(node.target)))

    def _tensor(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        try:
            return getattr(self.model.get_submodule(owner), leaf)
        except AttributeError:
            raise CalibrationError(
                f"the graph of {type(self.model).__name__} reads {name!r}, which is no parameter or buffer of it: "
                "such a model can be calibrated with QuantConfig(..., tracing='module_walk')"
            ) from None


class WholeModel:
    """A model that could not be traced, as one part: its sites are observed by hooks while it runs as it is.

    call: ``model`` as a function of positional inputs (``trace.as_called``).
    """

    def __init__(self, call: nn.Module, model: nn.Module, sites: Iterable[str]) -> None:
        self.call = call
        self.modules = {name: model.get_submodule(name) for name in sites}
        self.parts = [Segment("", {name: name for name in self.modules})]

    def start(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the only part begins with."""
        return inputs

    def look(self, part: Segment, values: tuple[Any, ...], observe: Observer) -> None:
        """Run the model, observed."""
        self.run(part, values, observe)

    @torch.no_grad()
    def run(self, part: Segment, values: tuple[Any, ...], observe: Observer | None = None) -> tuple[Any, ...]:
        """Run the model in eval mode on positional inputs; returns them."""
        training = {module: module.training for module in self.call.modules()}
        hooks = [
            module.register_forward_pre_hook(lambda _, args, name=name: observe(name, args[0]))
            for name, module in self.modules.items()
            if observe is not None
        ]
        try:
            self.call.eval()(*values)
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in training.items():
                module.training = mode
        return values


def _executed(graph: GraphModule, calls: dict[Node, str]) -> list[Node]:
    """The computing nodes up to the last site, without those that only prepare the weight of a site."""
    found: list[Node] = []
    unread: set[Node] = set()
    for node in reversed(graph.graph.nodes):
        if node.op != "call_function" or not (found or node in calls):
            continue
        readers = [user for user in node.users if user not in unread and _reads(user, node, calls)]
        checks_only = node.target is torch.ops.aten._assert_tensor_metadata.default
        if checks_only or (node.users and not readers):
            unread.add(node)
        else:
            found.append(node)
    return found[::-1]


def _reads(user: Node, node: Node, calls: dict[Node, str]) -> bool:
    return node is user.all_input_nodes[0] if user in calls else True


def _cut(nodes: list[Node], calls: dict[Node, str], finely: bool) -> list[Segment]:
    """Cut where the decoder block (finely: or what sites read) changes, unless a site is computed on both sides.

    Each part has a site.
    """
    spans: dict[str, tuple[int, int]] = {}
    starts: list[int] = []
    block, source = "", None
    for index, node in enumerate(nodes):
        if node in calls:
            spans[calls[node]] = (spans.get(calls[node], (index, 0))[0], index)
            if finely and node.all_input_nodes[0] is not source:
                starts.append(index)
            source = node.all_input_nodes[0]
        if (name := module_name(node)) and block_name(name) != block:
            block = block_name(name)
            starts.append(index)
    inside = [range(first + 1, last + 1) for first, last in spans.values()]
    cuts = [index for index in starts if not any(index in span for span in inside)]
    parts: list[Segment] = []
    begin = 0
    for end in [*cuts, len(nodes)]:
        own = {node: calls[node] for node in nodes[begin:end] if node in calls}
        if own:
            reads: dict[str, tuple[Node, ...]] = {}
            for node, site in own.items():
                reads[site] = (*reads.get(site, ()), node.all_input_nodes[0])
            parts.append(Segment(block_name(next(iter(own.values()))), reads, tuple(nodes[begin:end]), own))
            begin = end
    return parts


def _last_uses(nodes: list[Node], calls: dict[Node, str]) -> dict[Node, list[Node]]:
    """From a node to the values that nobody reads after it."""
    done: dict[Node, list[Node]] = {}
    seen: set[Node] = set()
    for node in reversed(nodes):
        sources = node.all_input_nodes[:1] if node in calls else node.all_input_nodes
        for source in [node, *sources]:
            if source not in seen:
                seen.add(source)
                done.setdefault(node, []).append(source)
    return done


def _mutates(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _own_copy(values: Values) -> Values:
    """Tensors of their own, views of one tensor still views of one: a part that writes in place may run twice."""
    return dict(zip(values, copy.deepcopy(list(values.values())), strict=True))
