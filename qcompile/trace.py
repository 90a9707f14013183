"""From a model to its graph and its quantizable sites.

The model is exported on fake tensors: no weight is read or copied, and a model on the meta device works as well.
Roles (router, lm_head) are found by dataflow, never by name.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .errors import TraceError, UnsupportedError
from .modules import QuantLinear
from .types import Site

_PREFIX = "model_under_trace"
_LINEAR = (torch.ops.aten.linear.default, torch._C._nn.linear)
_OTHER_PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in ("mm", "addmm", "matmul", "bmm", "baddbmm", "einsum")
}  # fmt: skip
_VIEWS = {
    "to", "detach", "t", "transpose", "permute", "view", "reshape", "contiguous", "slice", "unsqueeze", "squeeze",
    "_to_copy", "clone", "select", "expand", "alias", "index",
}  # fmt: skip


@dataclass(frozen=True)
class Traced:
    """A model's graph (fake tensors; attributes are named like the model's) and its sites, in order of execution."""

    graph: GraphModule
    sites: tuple[Site, ...]


def is_language_model(model: nn.Module) -> bool:
    """Whether ``model`` is a transformers model with a vocabulary; decided without importing transformers."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__) and hasattr(model.config, "vocab_size")


def trace(model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> Traced:
    """Export ``model`` with dynamic batch and sequence and find its sites.

    example_inputs: positional inputs of ``forward`` for anything but a transformers language model; the first two
    dimensions of a tensor with three or more, and the first of one with two, are dynamic. Raises TraceError that says
    which construct cannot be exported and what to do.
    """
    _refuse_experts(model)
    if not is_language_model(model) and example_inputs is None:
        raise TraceError(
            f"{type(model).__name__} is not a transformers language model, so its inputs are not known: "
            "pass example_inputs=(tensor, ...), one set of positional arguments of its forward"
        )
    graph = _export(model, example_inputs)
    return Traced(graph, _find_sites(graph, model))


def walk(model: nn.Module) -> tuple[Site, ...]:
    """Sites from a walk over modules, for models that cannot be exported: no inputs, producers or routers are known."""
    _refuse_experts(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = _parameter_names(model)
    return tuple(
        _site(name, module, "lm_head" if module is head else "linear", tied)
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    )


# ------------------------------------------------------------------------------------------------------------- export


class _Logits(nn.Module):
    """input_ids [batch, sequence] -> logits [batch, sequence, vocabulary], without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        setattr(self, _PREFIX, model)

    def forward(self, input_ids: Tensor) -> Tensor:
        result = getattr(self, _PREFIX)(input_ids=input_ids, use_cache=False)
        return result.logits if hasattr(result, "logits") else result[0]


class _Call(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        setattr(self, _PREFIX, model)

    def forward(self, *inputs: Any) -> Any:
        return getattr(self, _PREFIX)(*inputs)


def _shadow(model: nn.Module, mode) -> nn.Module:
    """A copy of ``model`` with fake tensors in place of its weights; meta tensors become fake CPU tensors."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "meta":
            with mode:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        else:
            fake = mode.from_tensor(tensor.detach(), static_shapes=True)
        memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(model, memo)


def _export(model: nn.Module, example_inputs: tuple[Any, ...] | None) -> GraphModule:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.export import export
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    was_training = model.training
    model.eval()
    try:
        shadow = _shadow(model, mode)
        if example_inputs is None:
            wrapped: nn.Module = _Logits(shadow)
            with mode:
                inputs: tuple[Any, ...] = (example_input_ids(),)
            dynamic: Any = (input_dims(inputs[0]),)
        else:
            wrapped = _Call(shadow)
            inputs = tuple(
                mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x for x in example_inputs
            )
            dynamic = (tuple(input_dims(x) for x in example_inputs),)
        with mode, torch.no_grad():
            program = export(wrapped, inputs, dynamic_shapes=dynamic, strict=False)
        return program.module(check_guards=False)
    except Exception as error:  # the compiler raises many kinds; each is explained and chained
        raise TraceError(_explain(model, error)) from error
    finally:
        model.train(was_training)


def example_input_ids() -> Tensor:
    """Token ids [2, 16], from which a language model is traced."""
    return torch.zeros((2, 16), dtype=torch.long)


def input_dims(value: Any) -> dict[int, Any] | None:
    """Dynamic dimensions of an input: both of token ids, all but the last (at most two) of anything else."""
    from torch.export import Dim

    if not isinstance(value, Tensor):
        return None
    count = value.dim() if not value.is_floating_point() else value.dim() - 1
    return {dim: Dim.AUTO for dim in range(min(2, count)) if value.shape[dim] > 1}


_HINTS = {
    "GuardOnDataDependentSymNode": "its forward decides on tensor values (a Python `if` or a loop over them)",
    "DataDependentOutputException": "its forward reads a tensor's value (.item(), .tolist(), a branch on it)",
    "DynamicOutputShapeException": "an operation's output shape depends on values (nonzero, masked indexing)",
    "Constraints violated": "a dimension that should be dynamic is fixed by the code",
}


def _explain(model: nn.Module, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    hint = next((hint for key, hint in _HINTS.items() if key in text), "")
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    place = re.search(r'File "([^"]+)", line (\d+), in (\w+)\n\s+(.+)', str(error))
    where = f" at {place[1]}:{place[2]} in {place[3]}: `{place[4].strip()}`" if place else ""
    return (
        f"{type(model).__name__} cannot be exported: {hint or first[:300]}{where} ({type(error).__name__}). "
        "Rewrite that construct so that torch.export accepts it, or, to find Linear layers by a walk over the modules "
        "instead (their inputs and roles are then unknown), ask for it: QuantConfig(..., tracing='module_walk')."
    )


def _refuse_experts(model: nn.Module) -> None:
    names = [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Experts")
        or (name.endswith(".experts") and isinstance(module, nn.ModuleList))
    ]
    if names:
        raise UnsupportedError(
            f"{type(model).__name__} is a mixture of experts ({names[0]} and {len(names) - 1} more): "
            "quantizing experts is not supported yet, and leaving them float in silence would be worse"
        )


# -------------------------------------------------------------------------------------------------------------- sites


def module_name(node: Node) -> str:
    """Name, in the traced model, of the innermost module that ``node`` comes from; "" for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return plain_name(stack[-1][0]) if stack else ""


def plain_name(qualified: str) -> str:
    """Strip what tracing puts around a module's name: ``L['self'].model.layers.0`` is ``model.layers.0``."""
    name = re.sub(r"^L\['\w+'\]\.?", "", qualified)
    name = re.sub(r"\._modules\['(\w+)'\]", r".\1", name)
    name = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", name)
    return re.sub(rf"^(_orig_mod\.|{_PREFIX}\.?)+", "", name.lstrip("."))


def block_name(name: str) -> str:
    """The decoder block a module belongs to: the name up to its first number ("model.layers.3"), "" without one."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return match[0] if match else ""


def attribute(module: GraphModule, graph: torch.fx.Graph, name: str, tensor: Tensor) -> Node:
    """A get_attr node in a traced graph for the model's tensor ``name``; the graph holds its shape, not its data."""
    *path, leaf = f"{_PREFIX}.{name}".split(".")
    owner: nn.Module = module
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if leaf not in owner._buffers:
        mode = next(v.fake_mode for n in graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode"))
        owner.register_buffer(leaf, mode.from_tensor(tensor, static_shapes=True))
    node = graph.get_attr(".".join([*path, leaf]))
    node.meta["val"] = owner._buffers[leaf]
    return node


def bind(graph: GraphModule, model: nn.Module) -> GraphModule:
    """A runnable copy of a traced graph over the tensors of ``model``, which it shares."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    bound: dict[str, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            name = plain_name(node.target)
            if name not in tensors:
                raise TraceError(f"the graph reads {name!r}, which is no parameter or buffer of {type(model).__name__}")
            bound[node.target] = tensors[name]
    copied = torch.fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    copied.set_codegen(graph.graph._codegen)
    return GraphModule(bound, copied)


def find_roles(graph: GraphModule) -> dict[Node, str]:
    """Role of every linear node of an exported graph or of one of Dynamo's: "linear", "lm_head" or "router"."""
    nodes = list(graph.graph.nodes)
    vocabulary = {
        _tensor(node.args[1 if _is_functional(node) else 0]).shape[0] for node in nodes if _is(node, "embedding")
    }
    return {node: _role(node, vocabulary) for node in nodes if node.op == "call_function" and node.target in _LINEAR}


def _is_functional(node: Node) -> bool:
    """torch.nn.functional.embedding takes (ids, weight), aten.embedding (weight, ids)."""
    return not isinstance(node.target, torch._ops.OpOverload)


def _find_sites(graph: GraphModule, model: nn.Module) -> tuple[Site, ...]:
    tied = _parameter_names(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    roles = find_roles(graph)
    sites: dict[str, Site] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        name = module_name(node)
        if node.target in _LINEAR:
            module = modules.get(name)
            role = roles[node]
            if isinstance(module, nn.Linear):
                if name not in sites:
                    sites[name] = _site(name, module, role, tied, node)
            else:
                _add_bare_product(sites, name, node, role, type(module).__name__)
        elif _is(node, "linear", "scaled_linear", namespace="qcompile") and isinstance(modules.get(name), QuantLinear):
            continue
        elif node.target in _OTHER_PRODUCTS and any(_parameter(arg) for arg in node.all_input_nodes):
            _add_bare_product(sites, name, node, "linear", type(modules.get(name)).__name__)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in sites:
            sites[name] = _site(name, module, "linear", tied, obstacle="the traced forward never calls it")
    return tuple(sites.values())


def _site(
    name: str, module: nn.Linear, role: str, tied: dict[int, list[str]], node: Node | None = None, obstacle: str = ""
) -> Site:
    if type(module) is not nn.Linear:
        obstacle = f"it is a {type(module).__name__}, whose forward may do more than x @ W.T + b"
    elif module._forward_hooks or module._forward_pre_hooks:
        obstacle = "it has forward hooks, which a replaced module would lose"
    others = [other for other in tied[id(module.weight)] if other != f"{name}.weight"]
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
        tied_to=others[0] if others else "",
        obstacle=obstacle,
    )


def _add_bare_product(sites: dict[str, Site], name: str, node: Node, role: str, class_name: str) -> None:
    """Record a matrix product with a parameter that is not a Linear module's: it is listed, and stays float."""
    parameter = next((p for arg in node.all_input_nodes if (p := _parameter(arg)) and _tensor(p).dim() >= 2), None)
    if parameter is None:
        return
    shape = _tensor(parameter).shape
    label = plain_name(str(parameter.target))
    operator = str(node.target).removesuffix(".default")
    sites.setdefault(
        label,
        Site(
            name=label,
            role=role,
            out_features=shape[-2],
            in_features=shape[-1],
            dtype=_tensor(parameter).dtype,
            block=block_name(name),
            obstacle=f"it is {operator} on a parameter of {class_name}, not a Linear module that could be replaced",
        ),
    )


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


def _is(node: Node, *names: str, namespace: str = "") -> bool:
    target = getattr(node.target, "overloadpacket", node.target)
    qualified = getattr(target, "_qualified_op_name", "")
    if namespace:
        return any(qualified == f"{namespace}::{name}" for name in names)
    base = qualified.rpartition("::")[2] or getattr(node.target, "__name__", str(node.target))
    return base in names


def _is_product(node: Node) -> bool:
    return node.target in _LINEAR or node.target in _OTHER_PRODUCTS or _is(node, "scaled_dot_product_attention")


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


def _parameter_names(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
