"""A traced graph in consecutive parts, run one after the other on real inputs.

The parts are the decoder blocks and what lies between them. What one part hands on to the next are the values that are
read later: hidden states, masks, position embeddings, whatever an architecture has. Nothing is assumed about the
signature of a block, and no cache is involved.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from .errors import CalibrationError
from .modules import QuantExperts
from .moe import route
from .sites import LINEARS, block_name, first_names, is_experts, module_name, plain_name

Values = dict[Node, Any]
Observer = Callable[[str, Tensor, Tensor | None, Tensor | None], None]
"""Called with the name of a site and what it reads, each time that a site is about to be computed.

Of experts, these are rows [n, in] sorted by expert, and where those of each expert end, int32 [experts]; of their up
projection also which token each row is, int64 [n].
"""

Compute = Callable[[nn.Module, Sequence[str], Sequence[Tensor]], Tensor]
"""Called with a module that computes sites, their names and what it reads, in the module's place: for gradients."""


@dataclass(frozen=True)
class Call:
    """A node that computes sites: the Linear of that name, or the two projections of experts, up and down."""

    module: str
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Segment:
    """A part of a model. ``name`` is its decoder block, or "".

    reads  from each site that is computed here, in order, to what it reads: equal for sites with the same inputs only
    nodes  what is run; calls: the nodes among them that compute sites
    """

    name: str
    reads: Mapping[str, Hashable]
    nodes: tuple[Node, ...] = ()
    calls: Mapping[Node, Call] = field(default_factory=dict)

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

    def dump(self, values: Any) -> dict[str, Any]:
        """``values`` under names that another process knows, for ``load``."""
        ...

    def load(self, dumped: dict[str, Any]) -> Any:
        """Inverse of ``dump``."""
        ...


class Segments:
    """The parts of ``graph`` that compute ``sites`` (names), over the modules and tensors of ``model`` as they are now.

    A node that computes one of the sites calls the module that holds it, so quantized weights take effect as soon as
    they are installed; every other node runs as traced. Tensors of the model are read when a node needs them. Experts
    must be QuantExperts (``float_experts.fuse``) if one of their projections is among the sites.

    finely: blocks are cut again before sites that read something else than the site before (q, k and v; o; gate and up;
    down). all_tokens: every expert is shown every token; what experts hand on stays that of the routed ones.
    """

    def __init__(
        self,
        graph: GraphModule,
        model: nn.Module,
        sites: Iterable[str],
        *,
        finely: bool = False,
        all_tokens: bool = False,
    ) -> None:
        self.model, self.graph, self.all_tokens = model, graph, all_tokens
        wanted, first = frozenset(sites), first_names(model)
        calls: dict[Node, Call] = {}
        for node in graph.graph.nodes:
            name = first.get(module_name(node), "") if node.op == "call_function" else ""
            if is_experts(node) and isinstance(experts := model.get_submodule(name), QuantExperts):
                calls[node] = Call(name, tuple(f"{name}.{projection}" for projection in experts.names))
            elif node.target in LINEARS and name in wanted:
                calls[node] = Call(name, (name,))
        nodes = _executed(graph, calls)
        self.parts = _cut(nodes, calls, wanted, finely)
        self._done_after = _last_uses(nodes, calls)
        self._at_the_end = _read_at_the_end(nodes)

    def start(self, inputs: tuple[Any, ...]) -> Values:
        """What the first part begins with, for one set of positional inputs."""
        placeholders = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        return dict(zip(placeholders, inputs, strict=True))

    def run(
        self,
        part: Segment,
        values: Values,
        observe: Observer | None = None,
        compute: Compute | None = None,
        to_the_end: bool = False,
    ) -> Values:
        """Run one part on what its predecessor handed on; returns what it hands on itself, and leaves ``values``.

        With ``compute``, gradients are recorded. to_the_end: the last part hands on what the rest of the model reads,
        which is not run.
        """
        kept = self._at_the_end if to_the_end else frozenset()
        with torch.set_grad_enabled(compute is not None):
            after = self._run(part, part.nodes, frozenset(part.nodes), values, observe, compute=compute, kept=kept)
        # as they would be read from a file: strides can decide the last bits of what is computed
        return {node: value.contiguous() if isinstance(value, Tensor) else value for node, value in after.items()}

    def look(self, part: Segment, values: Values, observe: Observer) -> None:
        """Observe what the sites of a part read, and compute nothing else."""
        computed: set[Node] = set()
        for node in reversed(part.nodes):
            if node in part.calls:
                computed.update(_inputs(node, part.calls))
            elif node in computed or (computed and _mutates(node)):
                computed |= {node, *node.all_input_nodes}
        nodes = [node for node in part.nodes if node in computed or node in part.calls]
        with torch.no_grad():
            self._run(part, nodes, computed, values, observe)

    def dump(self, values: Values) -> dict[str, Any]:
        """``values`` by the names of their nodes."""
        return {node.name: value for node, value in values.items()}

    def load(self, dumped: dict[str, Any]) -> Values:
        """Inverse of ``dump``."""
        nodes = {node.name: node for node in self.graph.graph.nodes}
        return {nodes[name]: value for name, value in dumped.items()}

    def _run(
        self,
        part: Segment,
        nodes: Sequence[Node],
        computed: Set[Node],
        values: Values,
        observe: Observer | None,
        compute: Compute | None = None,
        kept: Set[Node] = frozenset(),
    ) -> Values:
        values = _own_copy(values) if any(_mutates(node) for node in nodes) else dict(values)
        for node in nodes:
            call = part.calls.get(node)
            if call is not None:
                inputs = [self._value(source, values) for source in _inputs(node, part.calls)]
                module = self.model.get_submodule(call.module)
                result = show(module, call.sites, inputs, observe, self.all_tokens) if observe else None
                if compute is not None:
                    values[node] = compute(module, call.sites, inputs)
                elif node in computed:
                    values[node] = module(*inputs) if result is None else result
            else:
                args: Any = map_arg(node.args, lambda n: self._value(n, values))
                kwargs: Any = map_arg(node.kwargs, lambda n: self._value(n, values))
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            for finished in self._done_after.get(node, ()):
                if finished not in kept:
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

    call: ``model`` as a function of positional inputs (``trace.as_called``). all_tokens: as for ``Segments``.
    """

    def __init__(self, call: nn.Module, model: nn.Module, sites: Iterable[str], *, all_tokens: bool = False) -> None:
        self.call, self.all_tokens = call, all_tokens
        sites = list(sites)
        self.calls: dict[nn.Module, tuple[str, ...]] = {model.get_submodule(name): (name,) for name in sites}
        for name, module in model.named_modules():
            if isinstance(module, QuantExperts):
                self.calls[module] = tuple(f"{name}.{projection}" for projection in module.names)
        self.parts = [Segment("", {name: name for name in sites})]

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
            module.register_forward_pre_hook(functools.partial(self._show, observe=observe))
            for module in self.calls
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

    def dump(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """Nothing: no part comes after the only one."""
        return {}

    def load(self, dumped: dict[str, Any]) -> tuple[Any, ...]:
        """Inverse of ``dump``."""
        return ()

    def _show(self, module: nn.Module, inputs: tuple[Any, ...], *, observe: Observer) -> None:
        show(module, self.calls[module], inputs, observe, self.all_tokens)


def show(
    module: nn.Module, sites: Sequence[str], inputs: Sequence[Tensor], observe: Observer, all_tokens: bool
) -> Tensor | None:
    """Show an observer what a module that computes ``sites`` reads when it is called with ``inputs``.

    Returns the module's result if that had to be computed, for tokens [n, hidden].
    """
    if not isinstance(module, QuantExperts):
        observe(sites[0], inputs[0], None, None)
        return None
    x, ids, routing = (tensor.reshape(-1, tensor.shape[-1]) for tensor in inputs)
    experts = module.up.shape[0]

    def observed(ids: Tensor, routing: Tensor) -> Tensor:
        def seen(projection: int, rows: Tensor, ends: Tensor) -> None:
            tokens = None if projection else route(ids, experts)[0] // ids.shape[1]
            observe(sites[projection], rows, ends, tokens)

        return module.observed(x, ids, routing, seen)

    if not all_tokens:
        return observed(ids, routing)
    for expert in range(experts):
        observed(torch.full_like(ids[:, :1], expert), torch.ones_like(routing[:, :1]))
    return None


def _inputs(node: Node, calls: Mapping[Node, Call]) -> list[Node]:
    """What a node reads of its arguments: x; of experts x, the chosen experts and their weights; else all of them."""
    if node not in calls:
        return node.all_input_nodes
    return list(node.args[: 3 if is_experts(node) else 1])  # type: ignore[arg-type]


def _executed(graph: GraphModule, calls: Mapping[Node, Call]) -> list[Node]:
    """The computing nodes up to the last call, without those that only prepare the weights of calls."""
    found: list[Node] = []
    unread: set[Node] = set()
    for node in reversed(graph.graph.nodes):
        if node.op != "call_function" or not (found or node in calls):
            continue
        readers = [user for user in node.users if user not in unread and node in _inputs(user, calls)]
        checks_only = node.target is torch.ops.aten._assert_tensor_metadata.default
        if checks_only or (node.users and not readers):
            unread.add(node)
        else:
            found.append(node)
    return found[::-1]


def _cut(nodes: list[Node], calls: Mapping[Node, Call], wanted: Set[str], finely: bool) -> list[Segment]:
    """Cut where the decoder block (finely: or what sites read) changes, unless a site is computed on both sides.

    Each part has a wanted site.
    """
    spans: dict[Call, tuple[int, int]] = {}
    starts: list[int] = []
    block, source = "", None
    for index, node in enumerate(nodes):
        if call := calls.get(node):
            spans[call] = (spans.get(call, (index, 0))[0], index)
            if finely and _reads(node, 0) != source:
                starts.append(index)
            source = _reads(node, 0)
        if (name := module_name(node)) and block_name(name) != block:
            block = block_name(name)
            starts.append(index)
    inside = [range(first + 1, last + 1) for first, last in spans.values()]
    cuts = [index for index in starts if not any(index in span for span in inside)]
    parts: list[Segment] = []
    begin = 0
    for end in [*cuts, len(nodes)]:
        own = {node: calls[node] for node in nodes[begin:end] if node in calls}
        reads: dict[str, tuple[Hashable, ...]] = {}
        for node, call in own.items():
            for i, site in enumerate(call.sites):
                if site in wanted:
                    reads[site] = (*reads.get(site, ()), _reads(node, i))
        if reads:
            parts.append(Segment(block_name(next(iter(reads))), reads, tuple(nodes[begin:end]), own))
            begin = end
    return parts


def _reads(node: Node, place: int) -> Hashable:
    """What a call's site reads: equal for Linears of the same input only."""
    return (node, place) if is_experts(node) else node.args[0]  # type: ignore[return-value]


def _last_uses(nodes: list[Node], calls: Mapping[Node, Call]) -> dict[Node, list[Node]]:
    """From a node to the values that nobody reads after it."""
    done: dict[Node, list[Node]] = {}
    seen: set[Node] = set()
    for node in reversed(nodes):
        for source in [node, *_inputs(node, calls)]:
            if source not in seen:
                seen.add(source)
                done.setdefault(node, []).append(source)
    return done


def _read_at_the_end(nodes: list[Node]) -> set[Node]:
    """Which of the computed values the rest of the model reads, that is not run."""
    place = {node: index for index, node in enumerate(nodes[-1].graph.nodes)} if nodes else {}
    return {node for node in nodes if any(place[user] > place[nodes[-1]] for user in node.users)}


def _mutates(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _own_copy(values: Values) -> Values:
    """Tensors of their own, views of one tensor still views of one: a part that writes in place may run twice."""
    return dict(zip(values, copy.deepcopy(list(values.values())), strict=True))
