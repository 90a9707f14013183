"""From a traced graph to its quantizable sites: names, roles and who shares what, all by dataflow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .types import Site

if TYPE_CHECKING:
    from .experts import ExpertsLayout

PREFIX = "model_under_trace"
LINEARS = (torch.ops.aten.linear.default, torch._C._nn.linear)
_OTHER_PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in ("mm", "addmm", "matmul", "bmm", "baddbmm", "einsum")
}  # fmt: skip
_VIEWS = {
    "to", "detach", "t", "transpose", "permute", "view", "reshape", "contiguous", "slice", "unsqueeze", "squeeze",
    "_to_copy", "clone", "select", "expand", "alias", "index",
}  # fmt: skip


def module_name(node: Node) -> str:
    """Name, in the traced model, of the innermost module that ``node`` comes from; "" for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return plain_name(stack[-1][0]) if stack else ""


def plain_name(qualified: str) -> str:
    """Strip what tracing puts around a module's name: ``L['self'].model.layers.0`` is ``model.layers.0``.

    So is ``L['args'][0].model.layers.0``, of a model whose forward is decorated.

    A block whose forward is ``routing``'s is reached through that: ``layers.0.mlp.forward.args[0].router``.
    """
    name = re.sub(r"^L\['\w+'\](\[\d+\])?", "", qualified).replace(".forward.args[0]", "")
    name = re.sub(r"\._modules\['(\w+)'\]", r".\1", name)
    name = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", name)
    return re.sub(rf"^(_orig_mod\.|{PREFIX}\.?)+", "", name.lstrip("."))


def block_name(name: str) -> str:
    """The decoder block a module belongs to: the name up to its first number ("model.layers.3"), "" without one."""
    match = re.match(r"(?:.*?\.)??\d+(?=\.|$)", name)
    return match[0] if match else ""


def find_roles(graph: GraphModule) -> dict[Node, str]:
    """Role of every linear node of an exported graph or of one of Dynamo's: "linear", "lm_head" or "router"."""
    nodes = list(graph.graph.nodes)
    vocabulary = {
        _tensor(node.args[1 if _is_functional(node) else 0]).shape[0] for node in nodes if _is(node, "embedding")
    }
    return {node: _role(node, vocabulary) for node in nodes if node.op == "call_function" and node.target in LINEARS}


def _is_functional(node: Node) -> bool:
    """torch.nn.functional.embedding takes (ids, weight), aten.embedding (weight, ids)."""
    return not isinstance(node.target, torch._ops.OpOverload)


def find_sites(graph: GraphModule, model: nn.Module, layouts: Sequence[ExpertsLayout] = ()) -> tuple[Site, ...]:
    """Sites of ``model`` in the order in which its traced graph reaches them, then those that it never calls."""
    first, experts = first_names(model), {layout.name: layout for layout in layouts}
    modules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if not any(parent in experts for parent in _parents(first[name]))
    }
    tied = _tied_names(model)
    roles = find_roles(graph)
    sites: dict[str, Site] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        name = first.get(module_name(node), "")
        module = modules.get(name)
        if is_experts(node):
            sites |= {site.name: site for site in expert_sites(experts[name], node)}
        elif node.target in LINEARS and isinstance(module, nn.Linear):
            if name not in sites:
                sites[name] = _site(name, module, roles[node], tied.get(name, ""), node)
        elif node.target in LINEARS or node.target in _OTHER_PRODUCTS:
            _add_bare_product(sites, modules, name, node, roles.get(node, "linear"))
    unreached = "the traced forward never calls it"
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and first[name] not in sites:
            sites[first[name]] = _site(first[name], module, "linear", tied.get(name, ""), obstacle=unreached)
    for site in (site for layout in layouts for site in expert_sites(layout, obstacle=unreached)):
        sites.setdefault(site.name, site)
    for name in _read_elsewhere(graph, modules, first) & sites.keys():
        obstacle = "its weight is also read outside of its own forward, which a quantized module could not serve"
        sites[name] = replace(sites[name], obstacle=obstacle)
    return tuple(sites.values())


def walk_sites(model: nn.Module, layouts: Sequence[ExpertsLayout] = ()) -> tuple[Site, ...]:
    """Every Linear and all experts of ``model``, in the order of its modules; no inputs or routers are known."""
    experts = {layout.name: layout for layout in layouts}
    output_embeddings: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = output_embeddings()
    tied = _tied_names(model)
    sites: list[Site] = []
    for name, module in model.named_modules():
        if name in experts:
            sites += expert_sites(experts[name])
        elif isinstance(module, nn.Linear) and not any(parent in experts for parent in _parents(name)):
            sites.append(_site(name, module, "lm_head" if module is head else "linear", tied.get(name, "")))
    return tuple(sites)


def expert_sites(layout: ExpertsLayout, node: Node | None = None, obstacle: str = "") -> Iterator[Site]:
    """The two projections of the experts of a layer; ``node`` marks them in a traced graph.

    The down projection reads what the gated activation inside of the experts gives.
    """
    reads = [("", ""), ("", "")]
    if node is not None:
        source = _through_views(node.args[0])
        reads = [(source.name, module_name(source)), (f"{node.name}.gated", layout.name)]
    form = layout.arithmetic
    shapes = ((form.rows, form.hidden), (form.hidden, form.intermediate))
    for projection, (inputs, producer), (out, inn) in zip(layout.projections, reads, shapes, strict=True):
        yield Site(
            name=f"{layout.name}.{projection}", role="experts", kind="experts", experts=layout.experts,
            out_features=out, in_features=inn, dtype=layout.dtype, has_bias=bool(form.biases),
            inputs=inputs, producer=producer, block=block_name(layout.name), obstacle=obstacle,
        )  # fmt: skip


def is_experts(node: Node) -> bool:
    """Whether ``node`` stands for the float experts of a layer."""
    return node.op == "call_function" and getattr(node.target, "_name", "") == "qcompile::experts"


def _parents(name: str) -> Iterator[str]:
    """Names of all modules around the module called ``name``."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def first_names(model: nn.Module) -> dict[str, str]:
    """From every name of a module to its first one: a module that two attributes share is one site."""
    names = {id(module): name for name, module in model.named_modules()}
    return {name: names[id(module)] for name, module in model.named_modules(remove_duplicate=False)}


def _site(name: str, module: nn.Linear, role: str, tied_to: str, node: Node | None = None, obstacle: str = "") -> Site:
    if not name:
        obstacle = "it is no part of a module that could hold its replacement; wrap it, as in nn.Sequential(linear)"
    elif type(module) is not nn.Linear:
        obstacle = f"it is a {type(module).__name__}, whose forward may do more than x @ W.T + b"
    elif "forward" in vars(module):
        obstacle = "its forward was replaced (accelerate does so to move weights), which a new module would lose"
    elif module._forward_hooks or module._forward_pre_hooks:
        obstacle = "it has forward hooks, which a replaced module would lose"
    source = _through_views(node.args[0]) if node is not None else None
    return Site(
        name=name,
        role=role,
        out_features=module.out_features,
        in_features=module.in_features,
        dtype=module.weight.dtype,
        has_bias=module.bias is not None,
        inputs=source.name if source is not None else "",
        producer=module_name(source) if source is not None else "",
        block=block_name(name),
        tied_to=tied_to,
        obstacle=obstacle,
    )


def _add_bare_product(
    sites: dict[str, Site], modules: Mapping[str, nn.Module], name: str, node: Node, role: str
) -> None:
    """Record a matrix product with a parameter that is not a Linear module's: it is listed, and stays float."""
    parameter = next((p for arg in node.all_input_nodes if (p := _parameter(arg)) and _tensor(p).dim() >= 2), None)
    if parameter is None:
        return
    label = plain_name(str(parameter.target))
    if isinstance(modules.get(label.rpartition(".")[0]), nn.Linear):
        return  # listed as that Linear
    shape = _tensor(parameter).shape
    operator, owner = str(node.target).removesuffix(".default"), type(modules.get(name)).__name__
    site = Site(
        name=label,
        role=role,
        out_features=shape[-2],
        in_features=shape[-1],
        dtype=_tensor(parameter).dtype,
        block=block_name(name),
        obstacle=f"it is {operator} on a parameter of {owner}, not a Linear module that could be replaced",
        kind="experts" if len(shape) == 3 else "linear",
        experts=shape[0] if len(shape) == 3 else 0,
    )
    sites.setdefault(label, site)


def _read_elsewhere(graph: GraphModule, modules: Mapping[str, nn.Module], first: Mapping[str, str]) -> set[str]:
    """Linears whose weight the traced forward reads by itself; an embedding that shares it keeps it anyway."""
    found = set()
    for node in graph.graph.nodes:
        owner, _, leaf = plain_name(str(node.target)).rpartition(".") if node.op == "get_attr" else ("", "", "")
        if leaf != "weight" or not isinstance(modules.get(owner), nn.Linear):
            continue
        readers = [user for user in node.users if not _is(user, "embedding")]
        if not all(isinstance(modules.get(module_name(user)), nn.Linear) for user in readers):
            found.add(first[owner])
    return found


def _role(node: Node, vocabulary: set[int]) -> str:
    """ "router": its result reaches topk before any other product. "lm_head": one row per token of the vocabulary, and
    its result reaches the model's output."""
    rows = _tensor(node.args[1]).shape[0]
    reached = _reaches(node)
    if "topk" in reached:
        return "router"
    return "lm_head" if rows in vocabulary and "output" in reached else "linear"


def _reaches(node: Node, depth: int = 24) -> set[str]:
    """Which of "topk" and "output" the value of ``node`` reaches without passing another matrix product."""
    found, seen, pending = set(), {node}, [(node, 0)]
    while pending:
        current, distance = pending.pop()
        for user in current.users:
            if user.op == "output":
                found.add("output")
            elif _is(user, "topk"):
                found.add("topk")
            elif user not in seen and distance < depth and not _is_product(user):
                seen.add(user)
                pending.append((user, distance + 1))
    return found


def _is(node: Node, *names: str) -> bool:
    target = getattr(node.target, "overloadpacket", node.target)
    qualified = getattr(target, "_qualified_op_name", "")
    base = qualified.rpartition("::")[2] or getattr(node.target, "__name__", str(node.target))
    return base in names


def _is_product(node: Node) -> bool:
    return node.target in LINEARS or node.target in _OTHER_PRODUCTS or _is(node, "scaled_dot_product_attention")


def _through_views(node: Any) -> Node:
    while _is(node, *_VIEWS) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _parameter(node: Node) -> Node | None:
    """The get_attr node of a parameter that ``node`` is a view or cast of."""
    source = _through_views(node) if node.op == "call_function" else node
    return source if source.op == "get_attr" else None


def _tensor(node: Any) -> Tensor:
    """Fake value of a graph node, whichever tracer made it."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if value is None and node.op == "get_attr":
        value = node.graph.owning_module
        for part in node.target.split("."):
            value = getattr(value, part)
    return value


def _tied_names(model: nn.Module) -> dict[str, str]:
    """From a Linear's name to the parameter that it shares its weight with: an embedding's, or an earlier Linear's."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((f"{name}.{leaf}".lstrip("."), module))
    tied: dict[str, str] = {}
    for holding in holders.values():
        ordered = sorted(holding, key=lambda held: isinstance(held[1], nn.Linear))  # stable: others come first
        tied |= {label.rpartition(".")[0]: ordered[0][0] for label, _ in ordered[1:] if label.endswith("weight")}
    return tied
