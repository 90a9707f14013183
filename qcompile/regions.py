"""Compile equal decoder blocks once.

A model's graph is cut where its decoder blocks begin and end. Blocks with the same operations on the same shapes share
one compilation, so compile time does not grow with depth. The cut uses only the graph that AOTAutograd made: it needs
no change to the model, and side effects (KV caches) are already part of the graph.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from .sites import block_name, plain_name

Compiled = Callable[[list[Any]], Sequence[Any]]
_EPILOGUE = math.inf


@dataclass(frozen=True)
class Piece:
    """A part of a graph: the nodes it reads from outside, the nodes it hands on, and itself as a module."""

    module: GraphModule
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]


def cut(module: GraphModule) -> list[Piece]:
    """Cut an AOT graph at its decoder blocks; one piece when it has fewer than two."""
    stages = _stages(module.graph)
    order = sorted(set(stages.values()))
    if len(order) < 3:
        order = [max(order)] if order else []
        stages = dict.fromkeys(stages, order[0]) if order else {}
    members: dict[float, list[Node]] = {stage: [] for stage in order}
    for node, stage in stages.items():
        members[stage].append(node)
    returned = set(module.graph.output_node().all_input_nodes)
    return [_piece(module, members[stage], stage, stages, returned) for stage in order]


def nodes_of_block(graph: Graph, index: int) -> list[Node]:
    """The computing nodes of decoder block ``index``, in order; empty if there are fewer blocks."""
    return [node for node, stage in _stages(graph).items() if stage == index + 1]


def compile_pieces(
    pieces: Sequence[Piece], module: GraphModule, compile_one: Callable[[Piece, list[Any]], Compiled]
) -> tuple[Compiled, int]:
    """Compile each distinct piece and chain them; returns a boxed function and the number of compilations.

    ``compile_one`` gets a piece and the fake values of its inputs. The function takes the graph's inputs as a list,
    which it empties, and returns the graph's outputs.
    """
    compiled: dict[Any, Compiled] = {}
    steps: list[tuple[Compiled, list[Node], tuple[Node, ...]]] = []
    for piece in pieces:
        key = _structure(piece)
        if key not in compiled:
            compiled[key] = compile_one(piece, [node.meta["val"] for node in piece.inputs])
        steps.append((compiled[key], list(piece.inputs), piece.outputs))
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    outputs, spec = pytree.tree_flatten(module.graph.output_node().args[0])
    sizes = [node for node in outputs if isinstance(node, Node) and _is_size(node) and node.op != "placeholder"]
    if sizes:  # such as the new length of a cache: no stage makes them, and there is nothing to compile
        last = _piece(module, list(dict.fromkeys(sizes)), _EPILOGUE, {}, set(sizes))
        steps.append((partial(_run, last.module), list(last.inputs), last.outputs))
    return _chain(steps, placeholders, outputs, spec), len(compiled)


def _run(module: GraphModule, values: list[Any]) -> Sequence[Any]:
    return module(*values)


# ------------------------------------------------------------------------------------------------------------ cutting


def _is_size(node: Node) -> bool:
    """Whether a node is a size or made of sizes; such nodes are repeated in every piece that needs them."""
    return isinstance(node.meta.get("val"), SymInt | SymFloat | SymBool | int | float | bool)


def _block(node: Node) -> tuple[str, bool]:
    """The decoder block of a node ("" outside), and whether it is known to come from a module at all."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (block_name(plain_name(stack[-1][0])), True) if stack else ("", False)


def _stages(graph: Graph) -> dict[Node, float]:
    """Stage of every computing node: 0 before the blocks, then one per block, then the epilogue; never decreasing."""
    numbers: dict[str, int] = {}
    stages: dict[Node, float] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or _is_size(node):
            continue
        block, known = _block(node)
        latest = max((stages[n] for n in _computed_inputs(node) if n in stages), default=0)
        if node.target is torch.ops.aten.copy_.default:
            stages[node] = _write_back_stage(node, stages, latest)
        elif block:
            stages[node] = max(numbers.setdefault(block, len(numbers) + 1), latest)
        else:
            stages[node] = _EPILOGUE if known and latest >= 1 else latest
    return stages


def _computed_inputs(node: Node) -> list[Node]:
    """Inputs of a node, looking through sizes to the tensors that they are read from."""
    found: list[Node] = []
    for source in node.all_input_nodes:
        found += _computed_inputs(source) if _is_size(source) else [source]
    return found


def _write_back_stage(node: Node, stages: dict[Node, float], latest: float) -> float:
    """An input is written back where its new value is made, unless somebody reads the old value later."""
    readers = [stages.get(user, 0) for user in node.args[0].users if user is not node]  # type: ignore[union-attr]
    return max([latest, *readers])


def _piece(
    module: GraphModule, nodes: list[Node], stage: float, stages: dict[Node, float], returned: set[Node]
) -> Piece:
    graph, copies = Graph(), dict[Node, Node]()
    inputs: list[Node] = []
    attributes: dict[str, Any] = {}

    def bring(node: Node) -> None:
        """Make ``node`` available in this piece; what is inside was copied before, in order."""
        if node in copies:
            return
        if node.op == "get_attr":
            attributes[str(node.target)] = _attribute(module, str(node.target))
            copies[node] = graph.get_attr(str(node.target))
        elif _is_size(node) and node.op != "placeholder":
            for source in node.all_input_nodes:
                bring(source)
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        else:
            inputs.append(node)
            copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)

    for node in _missing_symbols(module, nodes):
        bring(node)
    for node in nodes:
        for source in node.all_input_nodes:
            bring(source)
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    outputs = tuple(
        node for node in nodes if node in returned or any(stages.get(user, stage) > stage for user in _users(node))
    )
    result = graph.output(tuple(copies[node] for node in outputs))
    _keep_strides(result, outputs)
    _placeholders_first(graph)
    part = GraphModule(attributes, graph)
    return Piece(part, tuple(inputs), outputs)


def _users(node: Node) -> list[Node]:
    """Users of a node, looking through sizes that are read from it."""
    found: list[Node] = []
    for user in node.users:
        found += _users(user) if _is_size(user) else [user]
    return found


def _attribute(module: GraphModule, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _placeholders_first(graph: Graph) -> None:
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)
    for node in list(graph.nodes):
        if first is not None and node.op == "placeholder" and node > first:
            first.prepend(node)


def _keep_strides(result: Node, outputs: Sequence[Node]) -> None:
    """Tell Inductor that every output is seen outside: the next piece relies on its strides."""
    values = [node.meta.get("val") for node in outputs]
    result.meta["user_visible_output_idxs"] = list(range(len(outputs)))
    result.meta["original_output_strides"] = [v.stride() if isinstance(v, Tensor) else None for v in values]


def _missing_symbols(module: GraphModule, nodes: Sequence[Node]) -> list[Node]:
    """Inputs of the whole graph that define the sizes which occur in a piece: it may not read them off its own."""

    def symbols(value: Any) -> set[Any]:
        sizes: list[Any] = [value]
        if isinstance(value, Tensor):
            sizes = [*value.shape, *value.stride()]
        return {s for size in sizes if isinstance(size, SymInt) for s in size.node.expr.free_symbols}

    def defined(value: Any) -> set[Any]:
        sizes = list(value.shape) if isinstance(value, Tensor) else [value]
        if isinstance(value, SymInt) and value.node._expr != value.node.expr:
            return set()  # Inductor lets a number define its own name, which is not the one that sizes are written with
        return {size.node.expr for size in sizes if isinstance(size, SymInt) and size.node.expr.is_symbol}

    values = [n.meta.get("val") for node in nodes for n in (node, *node.all_input_nodes)]
    needed = set().union(*(symbols(leaf) for leaf in pytree.tree_leaves(values)))
    found = []
    for node in module.graph.nodes:
        if node.op == "placeholder" and needed & defined(node.meta.get("val")):
            found.append(node)
            needed -= defined(node.meta.get("val"))
    return found


# ----------------------------------------------------------------------------------------------------------- chaining


def _structure(piece: Piece) -> Any:
    """What makes two pieces the same: operations, constants, and the shapes, strides and types of all values.

    Sizes are compared up to their names: each layer's cache may have a length of its own, under the same conditions.
    """
    numbers = {node: i for i, node in enumerate(piece.module.graph.nodes)}
    symbols: dict[str, str] = {}

    def renamed(text: str) -> str:
        return _SYMBOL.sub(lambda match: symbols.setdefault(match[0], f"size{len(symbols)}"), text)

    def plain(value: Any) -> Any:
        return ("node", numbers[value]) if isinstance(value, Node) else str(value)

    def described(value: Any) -> str:
        if isinstance(value, Tensor):
            text = f"{value.dtype}{tuple(value.shape)}{value.stride()}{value.device}{value.storage_offset()}"
            return renamed(text)
        return renamed(str(value))

    key: list[Any] = []
    for node in piece.module.graph.nodes:
        flat, spec = pytree.tree_flatten((node.args, node.kwargs))
        target: Any = "" if node.op in ("placeholder", "output") else str(node.target)
        if node.op == "get_attr":
            target = id(_attribute(piece.module, str(node.target)))
        value = pytree.tree_map(described, node.meta.get("val"))
        key.append((node.op, target, tuple(plain(item) for item in flat), str(spec), str(value)))
    for condition in sorted(_conditions(piece)):
        if set(_SYMBOL.findall(condition)) <= symbols.keys():
            key.append(renamed(condition))
    return tuple(key)


_SYMBOL = re.compile(r"\b[suz][a-z]*\d+\b")  # s0, u3, zuf1: how ShapeEnv names its sizes


def _conditions(piece: Piece) -> set[str]:
    """What the tracer assumed about sizes (guards, ranges): code that was compiled under them may rely on them."""
    values = [node.meta.get("val") for node in piece.module.graph.nodes if node.op == "placeholder"]
    sizes = [s for v in values for s in (v.shape if isinstance(v, Tensor) else [v]) if isinstance(s, SymInt)]
    if not sizes:
        return set()
    environment = sizes[0].node.shape_env
    ranges = {f"{symbol} in {bounds}" for symbol, bounds in environment.var_to_range.items()}
    return ranges | {str(guard.expr) for guard in environment.guards}


def _chain(
    steps: Sequence[tuple[Compiled, list[Node], tuple[Node, ...]]],
    placeholders: Sequence[Node],
    outputs: Sequence[Any],
    spec: pytree.TreeSpec,
) -> Compiled:
    """One function that runs the pieces in order and drops each value after its last use."""
    slot: dict[Node, int] = {node: i for i, node in enumerate(placeholders)}
    for _, _, made in steps:
        for node in made:
            slot[node] = len(slot)
    kept = {slot[item] for item in outputs if isinstance(item, Node)}
    last_use = {slot[node]: i for i, (_, read, _) in enumerate(steps) for node in read}
    program = []
    for i, (function, read, made) in enumerate(steps):
        dead = [s for s, last in last_use.items() if last == i and s not in kept]
        program.append((function, [slot[n] for n in read], [slot[n] for n in made], dead))
    results = [(True, slot[item]) if isinstance(item, Node) else (False, item) for item in outputs]
    extra = len(slot) - len(placeholders)

    def run(arguments: list[Any]) -> Sequence[Any]:
        values = [*arguments, *[None] * extra]
        arguments.clear()
        for function, read, made, dead in program:
            for s, value in zip(made, function([values[s] for s in read]), strict=True):
                values[s] = value
            for s in dead:
                values[s] = None
        return pytree.tree_unflatten([values[x] if is_slot else x for is_slot, x in results], spec)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
