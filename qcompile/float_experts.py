"""Experts of a layer in other forms: marked in a graph, fused into one module, and back into what the model had."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import numerics
from .experts import ExpertsLayout
from .memory import return_memory
from .modules import FloatWeight, Projection, QuantExperts, replace_module
from .moe import gate_by_gate, gate_first
from .routing import clear_form, set_form

# ------------------------------------------------------------------------------------------------------------ tracing


def stand_in(layout: ExpertsLayout, like: Tensor) -> nn.Module:
    """Fused experts of the shapes of ``layout``, empty tensors like ``like``, for a list that is to be traced."""
    form, module = layout.fused, nn.Module()
    shapes = [(layout.experts, form.rows, form.hidden), (layout.experts, form.hidden, form.intermediate)]
    for names, sizes in ((form.weights, shapes), (form.biases, [shape[:2] for shape in shapes])):
        for name, shape in zip(names, sizes, strict=False):
            empty = like.new_empty(shape, dtype=layout.dtype)
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    return module


def mark(model: nn.Module, layouts: Iterable[ExpertsLayout]) -> None:
    """Let the experts of ``model`` be one node each in its graph, and blocks that route by a loop do without it."""
    for layout in layouts:
        module = model.get_submodule(layout.name)
        vars(module)["forward"] = partial(_marked, module, layout)
        if layout.block is not None:
            set_form(model.get_submodule(layout.parent), layout.block)


def _marked(module: nn.Module, layout: ExpertsLayout, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    form = layout.fused
    up, down = (getattr(module, name) for name in form.weights)
    up_bias, down_bias = (getattr(module, name) for name in form.biases) if form.biases else (None, None)
    return torch.ops.qcompile.experts(
        x, ids, routing, up, up_bias, down, down_bias, form.activation, form.transposed, form.interleaved
    )


# ---------------------------------------------------------------------------------------------------- fused, and back


@torch.no_grad()
def fuse(model: nn.Module, layouts: Iterable[ExpertsLayout]) -> None:
    """Replace experts by QuantExperts with float projections, named as their sites; routing loops become canonical.

    Nothing is copied where the weights of the model are canonical but for a transposition; others are copied one
    projection at a time, and the originals freed. ``unfuse`` gives the modules back.
    """
    for layout in layouts:
        module = model.get_submodule(layout.name)
        made = []
        for projection in (0, 1):
            weight, bias = (read(module, layout, projection, kind) for kind in ("weight", "bias"))
            made.append(FloatWeight(cast(Tensor, weight), bias))
            for owner, leaf in slots(module, layout, projection, "weight", "bias"):
                empty = torch.empty_like(getattr(owner, leaf), device="meta")
                owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
            return_memory()
        up, down = zip(layout.projections, made, strict=True)
        experts = QuantExperts(up, down, layout.arithmetic.activation)
        vars(experts)["origin"] = (layout, module)
        replace_module(model, module, experts.train(module.training))
        if layout.block is not None:
            set_form(model.get_submodule(layout.parent), layout.block)


@torch.no_grad()
def unfuse(model: nn.Module) -> None:
    """Undo ``fuse``, with the dequantized weights of projections that have been quantized since."""
    for experts in [module for module in model.modules() if isinstance(module, QuantExperts)]:
        layout, module = vars(experts)["origin"]
        for i, name in enumerate(layout.projections):
            part = cast(Projection, experts.get_submodule(name))
            packed = None if isinstance(part, FloatWeight) else part.packed()
            weight = part.tensors()[0] if packed is None else numerics.dequantize_packed(packed, layout.dtype)
            delattr(experts, name)  # and with it what it holds
            _write(module, layout, i, "weight", weight)
            if part.bias is not None:
                _write(module, layout, i, "bias", part.bias)
        if layout.block is not None:
            clear_form(model.get_submodule(layout.parent))
        replace_module(model, experts, module.train(experts.training))


def projections(layouts: Iterable[ExpertsLayout]) -> Mapping[str, tuple[ExpertsLayout, int]]:
    """From the name of a site of experts to their layout and its projection: 0 up, 1 down."""
    return {f"{layout.name}.{name}": (layout, i) for layout in layouts for i, name in enumerate(layout.projections)}


def slots(module: nn.Module, layout: ExpertsLayout, projection: int, *kinds: str) -> Iterator[tuple[nn.Module, str]]:
    """Where float experts hold a projection, each "weight" or each "bias": (module, name of the parameter in it)."""
    for kind in kinds:
        names = layout.arithmetic.biases if kind == "bias" else layout.arithmetic.weights
        for owner in cast(Any, module) if layout.listed else (module,):
            for name in names[-1:] if projection else names[:-1]:
                yield (owner.get_submodule(name), kind) if layout.listed else (owner, name)


def parts(module: nn.Module, layout: ExpertsLayout, projection: int, kind: str = "weight") -> list[Tensor]:
    """The parameters, each a "weight" or each a "bias", from which the float experts ``module`` make a projection."""
    return [getattr(owner, leaf) for owner, leaf in slots(module, layout, projection, kind)]


@torch.no_grad()
def read(module: nn.Module, layout: ExpertsLayout, projection: int, kind: str = "weight") -> Tensor | None:
    """The weight [experts, out, in] or bias [experts, out] of projection 0 (up, gate first) or 1 (down).

    A view where the module holds it like that, else a copy; None for a bias that there is not.
    """
    held, form = parts(module, layout, projection, kind), layout.arithmetic
    if not held:
        return None
    if layout.listed:
        each = len(held) // layout.experts
        rows = sum(tensor.shape[0] for tensor in held[:each])
        result = held[0].new_empty((layout.experts, rows, *held[0].shape[1:]))
        for index in range(layout.experts):
            torch.cat(held[index * each : (index + 1) * each], out=result[index])
    else:
        result = held[0].detach()
        result = result.transpose(1, 2) if form.transposed and kind == "weight" else result
    return gate_first(result, 1) if form.interleaved and not projection else result


def held_tensors(layout: ExpertsLayout, projection: int, part: FloatWeight) -> Iterator[tuple[str, Tensor]]:
    """A float projection as the module of ``layout`` held it: names of its parameters there, and their values."""
    form = layout.arithmetic
    for kind, names, tensor in (("weight", form.weights, part.weight), ("bias", form.biases, part.bias)):
        own = names[-1:] if projection else names[:-1]
        labels = [f"{i}.{name}.{kind}" for i in range(layout.experts) for name in own] if layout.listed else own
        if tensor is not None:
            yield from zip(labels, _as_held(layout, projection, kind, tensor.detach()), strict=True)


def _as_held(layout: ExpertsLayout, projection: int, kind: str, tensor: Tensor) -> list[Tensor]:
    """Inverse of ``read``: the values of the parameters that ``slots`` names."""
    form = layout.arithmetic
    tensor = gate_by_gate(tensor, 1) if form.interleaved and not projection else tensor
    if layout.listed:
        each = 1 if projection else len(form.weights) - 1
        return [part.clone() for own in tensor for part in own.chunk(each)]
    return [(tensor.transpose(1, 2) if form.transposed and kind == "weight" else tensor).contiguous()]


def _write(module: nn.Module, layout: ExpertsLayout, projection: int, kind: str, tensor: Tensor) -> None:
    """Inverse of ``read``."""
    values = _as_held(layout, projection, kind, tensor)
    for (owner, leaf), value in zip(slots(module, layout, projection, kind), values, strict=True):
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
