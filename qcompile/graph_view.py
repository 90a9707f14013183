"""A decoder block's graph before and after the passes, drawn as SVG with the rewritten nodes marked.

Layers are longest paths, as networkx finds them (torch depends on it); within a layer, nodes are ordered by the middle
of what they are connected to. Nodes that only change a layout are left out unless a pass rewrote them.
"""

from __future__ import annotations

import html
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from .errors import ConfigError, did_you_mean
from .regions import nodes_of_block

_WIDTH, _HEIGHT, _GAP, _RISE, _NARROW = 168, 38, 14, 24, 10  # of a box, beside and below it, and of a passing line
_LAYOUT_ONLY = {
    "view", "reshape", "_unsafe_view", "expand", "unsqueeze", "squeeze", "permute", "transpose", "t", "clone", "slice",
    "alias", "select", "detach", "getitem",
}  # fmt: skip
_STYLE = """
svg{--back:#fff;--text:#1c2330;--soft:#5b6475;--line:#9aa4b5;--box:#f4f6f9;--old:#b3261e;--new:#0f8a74;background:var(--back)}
@media(prefers-color-scheme:dark){svg{--back:#12161e;--text:#e6e9ef;--soft:#9aa4b5;--line:#5b6475;--box:#1a202b;--old:#ff8a80;--new:#3fc7ab}}
text{font:12px ui-monospace,monospace;fill:var(--text);text-anchor:middle}.small{font-size:10px;fill:var(--soft)}
.title{font:600 16px system-ui,sans-serif;text-anchor:start}
rect{fill:var(--box);stroke:var(--line)}path{fill:none;stroke:var(--line)}
.old rect{stroke:var(--old);stroke-width:2.5;stroke-dasharray:5 3}.new rect{stroke:var(--new);stroke-width:2.5}
"""


@dataclass(frozen=True)
class Box:
    """One node of a drawing: its operation, the shape and type of its result, and whether a pass rewrote it."""

    name: str
    operation: str
    result: str
    mark: str  # "" | "old" | "new"
    reads: tuple[str, ...]


def before_and_after(
    model: nn.Module, inputs: tuple[Any, ...], block: int = 0, only: str = ""
) -> tuple[list[Box], list[Box]]:
    """Decoder block ``block`` of the graph that ``torch.compile(model, backend="qcompile")`` makes of a call.

    only: before and after that one pass; instead of all but the last, "lower", which replaces semantic operations by
    those of a device. ConfigError for a block or a pass that there is not. Nothing
    is given to Inductor.
    """
    before, after = _graphs(model, inputs, only)
    old, new = nodes_of_block(before, block), nodes_of_block(after, block)
    if not old:
        raise ConfigError(f"there is no decoder block {block} in this graph")
    kept = {node.name for node in before.nodes} & {node.name for node in after.nodes}
    return _boxes(old, kept, "old"), _boxes(new, kept, "new")


def to_svg(before: Sequence[Box], after: Sequence[Box], title: str) -> str:
    """Both graphs side by side as one SVG document, in light and dark."""
    left, width, height = _draw(before)
    right, more, other = _draw(after)
    total, tall = width + more + 90, max(height, other) + 100
    changed = f"{sum(bool(b.mark) for b in before)} nodes replaced by {sum(bool(b.mark) for b in after)}"
    label = html.escape(f"{title}: {changed}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total:.0f} {tall:.0f}" width="{total:.0f}" role="img" '
        f'aria-label="{label}"><title>{label}</title><style>{_STYLE}</style>'
        f'<text class="title" x="20" y="30">before: {len(before)} operations</text>'
        f'<text class="title" x="{width + 60:.0f}" y="30">after: {len(after)} operations</text>'
        f'<text class="small" style="text-anchor:start" x="20" y="50">{label}</text>'
        f'<g transform="translate(20 70)">{left}</g><g transform="translate({width + 60:.0f} 70)">{right}</g></svg>\n'
    )


def to_text(before: Sequence[Box], after: Sequence[Box]) -> str:
    """The same as lines: a minus for each node that is replaced, a plus for what takes its place."""
    lines = [f"before: {len(before)} operations, after: {len(after)}"]
    for boxes, sign in ((before, "-"), (after, "+")):
        lines += [f"{sign} {b.operation:32} {b.result:26} {b.name}" for b in boxes if b.mark]
    return "\n".join(lines)


def _graphs(model: nn.Module, inputs: tuple[Any, ...], only: str) -> tuple[Graph, Graph]:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    from .compile import decompositions
    from .passes.pipeline import compile_passes
    from .verify import run_pass

    found: list[Graph] = []
    names = [pass_.name for pass_ in compile_passes(decompositions())]
    if only and only not in names:
        raise ConfigError(f"there is no pass {only!r}.{did_you_mean(only, names)}")

    def compiler(module: GraphModule, example_inputs: Sequence[Any]) -> Any:
        before = _copy(module.graph)
        for pass_ in compile_passes(decompositions()):
            if pass_.name == (only or "lower"):
                before = _copy(module.graph) if only else before
                break
            run_pass(pass_, module)
        if pass_.name == only:
            run_pass(pass_, module)
        if not found:
            found.extend((before, _copy(module.graph)))
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler, decompositions=decompositions())
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        torch.compile(model.forward, backend=backend)(*inputs)
    return found[0], found[1]


def _copy(graph: Graph) -> Graph:
    copied = Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


def _boxes(nodes: Sequence[Node], kept: set[str], mark: str) -> list[Box]:
    shown = {node for node in nodes if node.name not in kept or _operation(node).split(".")[-1] not in _LAYOUT_ONLY}

    def sources(node: Node) -> list[str]:
        """What a node reads, looking through nodes that are not shown."""
        found: list[str] = []
        for source in node.all_input_nodes:
            found += [source.name] if source in shown else sources(source) if source in inside else []
        return list(dict.fromkeys(found))

    inside = set(nodes)
    return [
        Box(n.name, _operation(n), _result(n), "" if n.name in kept else mark, tuple(sources(n)))
        for n in nodes
        if n in shown
    ]


def _operation(node: Node) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    qualified = getattr(packet, "_qualified_op_name", "") or getattr(packet, "__name__", str(packet))
    return qualified.replace("::", ".").removeprefix("aten.")


def _result(node: Node) -> str:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, list | tuple) and value else value
    if not isinstance(value, Tensor):
        return ""
    dtype = str(value.dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
    return f"{dtype} [{', '.join(map(str, value.shape))}]"


def _draw(boxes: Sequence[Box]) -> tuple[str, float, float]:
    """SVG of one graph, its width and height."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(box.name for box in boxes)
    graph.add_edges_from((source, box.name) for box in boxes for source in box.reads)
    level = {name: at for at, names in enumerate(networkx.topological_generations(graph)) for name in names}
    routes: dict[tuple[str, str], list[Any]] = {}
    layers: dict[int, list[Any]] = defaultdict(list)
    for box in boxes:
        layers[level[box.name]].append(box.name)
    for source, target in graph.edges:  # a line that passes layers gets a place in each
        between = [(source, target, at) for at in range(level[source] + 1, level[target])]
        for place in between:
            layers[place[2]].append(place)
        routes[source, target] = [source, *between, target]
    middle = _place(layers, routes)

    drawn, names = [], {box.name for box in boxes}
    for route in routes.values():
        points = [(middle[step], (level[step] if step in names else step[2]) * (_HEIGHT + _RISE)) for step in route]
        (x, y), path = points[0], ""
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            start = y0 + _HEIGHT
            path += f"{'M' if not path else 'L'}{x0:.0f} {start:.0f}C{x0:.0f} {start + _RISE / 2:.0f} "
            path += f"{x1:.0f} {y1 - _RISE / 2:.0f} {x1:.0f} {y1:.0f}"
        drawn.append(f'<path d="{path}"/>')
    for box in boxes:
        x, y = middle[box.name], level[box.name] * (_HEIGHT + _RISE)
        operation = box.operation if len(box.operation) <= 22 else box.operation[:21] + "…"
        drawn.append(
            f'<g class="{box.mark}"><title>{html.escape(f"{box.name} = {box.operation} {box.result}")}</title>'
            f'<rect x="{x - _WIDTH / 2:.0f}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="5"/>'
            f'<text x="{x:.0f}" y="{y + 16}">{html.escape(operation)}</text>'
            f'<text class="small" x="{x:.0f}" y="{y + 30}">{html.escape(box.result)}</text></g>'
        )
    width = max((middle[name] for name in names), default=0) + _WIDTH / 2
    return "".join(drawn), width, len(layers) * (_HEIGHT + _RISE)


def _place(layers: dict[int, list[Any]], routes: dict[tuple[str, str], list[Any]]) -> dict[Any, float]:
    """The middle of every node and passing line: layers ordered by their neighbours, down and up, then centred."""
    near: dict[Any, list[Any]] = defaultdict(list)
    for route in routes.values():
        for one, other in itertools.pairwise(route):
            near[one].append(other)
            near[other].append(one)
    middle: dict[Any, float] = {}

    def spread(names: list[Any]) -> None:
        x = 0.0
        for name in names:
            width = _WIDTH if isinstance(name, str) else _NARROW
            middle[name] = x + width / 2
            x += width + _GAP
        for name in names:
            middle[name] -= x / 2

    for at in sorted(layers):
        spread(layers[at])
    for sweep in range(6):
        for at in sorted(layers, reverse=bool(sweep % 2)):
            layers[at].sort(key=lambda name: sum(middle[n] for n in near[name]) / len(near[name]) if near[name] else 0)
            spread(layers[at])
    left = min((x - _WIDTH / 2 for x in middle.values()), default=0)
    return {name: x - left for name, x in middle.items()}
