"""From a model to its graph.

The model is exported on fake tensors: no weight is read or copied, and a model on the meta device works as well.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .errors import ConfigError, TraceError, UnsupportedError
from .experts import ExpertsLayout, find_experts
from .float_experts import mark, stand_in
from .sites import PREFIX, find_sites, plain_name, walk_sites
from .skeleton import is_transformers
from .types import Site


@dataclass(frozen=True)
class Traced:
    """A model's graph (fake tensors; attributes are named like the model's) and its sites, in order of execution."""

    graph: GraphModule
    sites: tuple[Site, ...]
    experts: tuple[ExpertsLayout, ...] = ()


def is_language_model(model: nn.Module) -> bool:
    """Whether ``model`` is a transformers model with a vocabulary; decided without importing transformers."""
    return is_transformers(model) and hasattr(model.config, "vocab_size")


def trace(model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> Traced:
    """Export ``model`` with dynamic batch and sequence and find its sites.

    example_inputs: positional inputs of ``forward`` for anything but a transformers language model; the first two
    dimensions of a tensor with three or more, and the first of one with two, are dynamic. Raises TraceError that says
    which construct cannot be exported and what to do.
    """
    if not is_language_model(model) and example_inputs is None:
        raise TraceError(
            f"{type(model).__name__} is not a transformers language model, so its inputs are not known: "
            "pass example_inputs=(tensor, ...), one set of positional arguments of its forward"
        )
    if not isinstance(example_inputs, (tuple, list, type(None))):
        raise ConfigError(
            f"example_inputs is the tuple of forward's positional arguments, not {type(example_inputs).__name__}; "
            "for a single one write (tensor,)"
        )
    layouts = find_experts(model)
    graph = _export(model, example_inputs, layouts)
    sites = find_sites(graph, model, layouts)
    _refuse_unknown_experts(sites)
    return Traced(graph, sites, layouts)


def walk(model: nn.Module) -> tuple[Site, ...]:
    """Sites from a walk over modules, for models that cannot be exported: no inputs, producers or routers are known."""
    return walk_sites(model, find_experts(model))


# ------------------------------------------------------------------------------------------------------------- export


class _Logits(nn.Module):
    """input_ids [batch, sequence] -> logits [batch, sequence, vocabulary], without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        setattr(self, PREFIX, model)

    def forward(self, input_ids: Tensor) -> Tensor:
        result = getattr(self, PREFIX)(input_ids=input_ids, use_cache=False)
        return result.logits if hasattr(result, "logits") else result[0]


class _Call(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        setattr(self, PREFIX, model)

    def forward(self, *inputs: Any) -> Any:
        return getattr(self, PREFIX)(*inputs)


def as_called(model: nn.Module, example_inputs: tuple[Any, ...] | None) -> nn.Module:
    """``model`` as a function of positional inputs; without example inputs a language model's token ids."""
    return _Call(model) if example_inputs is not None else _Logits(model)


def _shadow(model: nn.Module, mode, layouts: Sequence[ExpertsLayout]) -> nn.Module:
    """A copy of ``model`` with fake tensors in place of its weights; meta tensors become fake CPU tensors.

    Lists of experts, of which a model has thousands, are not copied: fused ones stand in their place.
    """
    memo: dict[int, Any] = {}
    listed = [(model.get_submodule(layout.name), layout) for layout in layouts if layout.listed]
    replaced = {id(t) for experts, _ in listed for t in [*experts.parameters(), *experts.buffers()]}
    for experts, layout in listed:
        device = next(experts.parameters()).device
        with mode:
            memo[id(experts)] = stand_in(layout, torch.empty(0, device="cpu" if device.type == "meta" else device))
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) in replaced:
            continue
        if tensor.device.type == "meta":
            with mode:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        else:
            fake = mode.from_tensor(tensor.detach(), static_shapes=True)
        memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    shadow = copy.deepcopy(model, memo)
    mark(shadow, layouts)
    return shadow


def _export(
    model: nn.Module, example_inputs: tuple[Any, ...] | None, layouts: Sequence[ExpertsLayout] = ()
) -> GraphModule:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.export import export
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    try:
        wrapped = as_called(_shadow(model, mode, layouts).eval(), example_inputs)
        if example_inputs is None:
            with mode:
                inputs: tuple[Any, ...] = (example_input_ids(),)
            dynamic: Any = (input_dims(inputs[0]),)
        else:
            inputs = tuple(
                mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x for x in example_inputs
            )
            dynamic = (tuple(input_dims(x) for x in example_inputs),)
        with mode, torch.no_grad():
            program = export(wrapped, inputs, dynamic_shapes=dynamic, strict=False)
        return program.module(check_guards=False)
    except Exception as error:  # the compiler raises many kinds; each is explained and chained
        raise TraceError(_explain(model, error)) from error


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


_LIBRARY = (str(Path(torch.__file__).parent), __file__)  # frames that are not the model's
_HINTS = {
    "GuardOnDataDependentSymNode": "its forward decides on tensor values (a Python `if` or a loop over them)",
    "DataDependentOutputException": "its forward reads a tensor's value (.item(), .tolist(), a branch on it)",
    "DynamicOutputShapeException": "an operation's output shape depends on values (nonzero, masked indexing)",
    "k not in range": "topk chooses more than there are (more experts per token than experts?)",
    "Constraints violated": "a dimension that should be dynamic is fixed by the code",
}


def _explain(model: nn.Module, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    hint = next((hint for key, hint in _HINTS.items() if key in text), "")
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    places = [p for p in traceback.extract_tb(error.__traceback__) if p.line and not p.filename.startswith(_LIBRARY)]
    where = f" at {places[-1].filename}:{places[-1].lineno}: `{places[-1].line}`" if places else ""
    return (
        f"{type(model).__name__} cannot be exported: {hint or first[:300]}{where} ({type(error).__name__}). "
        "Rewrite that construct so that torch.export accepts it, or, to find Linear layers by a walk over the modules "
        "instead (their inputs and roles are then unknown), ask for it: QuantConfig(..., tracing='module_walk')."
    )


def _refuse_unknown_experts(sites: tuple[Site, ...]) -> None:
    """UnsupportedError for stacked weights, one for each choice of a router beside them, that are no known experts."""
    choices = {(site.block, site.out_features) for site in sites if site.role == "router"}
    for site in sites:
        if site.kind == "experts" and site.role != "experts" and (site.block, site.experts) in choices:
            raise UnsupportedError(
                f"{site.name} is a weight of {site.experts} experts that cannot be quantized: {site.obstacle}. "
                "Put the experts into a module of their own with forward(hidden_states, top_k_index, top_k_weights), "
                "as in transformers, or into a ModuleList"
            )


# -------------------------------------------------------------------------------------------------------------- graph


def attribute(module: GraphModule, graph: torch.fx.Graph, name: str, tensor: Tensor) -> Node:
    """A get_attr node in a traced graph for the model's tensor ``name``; the graph holds its shape, not its data."""
    *path, leaf = f"{PREFIX}.{name}".split(".")
    owner: nn.Module = module
    for part in path:
        if isinstance(getattr(owner, part, None), Tensor):  # a float weight, whose readers are about to be replaced
            delattr(owner, part)
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
