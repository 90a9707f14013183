"""The experts of a layer before and after quantization: marked for tracing, read as canonical weights, put in place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from . import ops  # noqa: F401  registers qcompile::experts
from .experts import ExpertsLayout
from .moe import gate_first
from .routing import set_form


class FloatExperts(nn.Module):
    """Float experts of one layer in canonical form, in the place of a list: weights [experts, out, in], gate first.

    ``forward`` takes hidden states [tokens, hidden], the chosen experts and their weights [tokens, k].
    """

    def __init__(self, layout: ExpertsLayout, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.activation = layout.arithmetic.activation
        self.names = layout.projections
        for name, weight, bias in zip(self.names, weights, biases, strict=True):
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
            if bias is not None:
                self.register_parameter(f"{name}_bias", nn.Parameter(bias, requires_grad=False))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        up, down = self.names
        biases = getattr(self, f"{up}_bias", None), getattr(self, f"{down}_bias", None)
        return torch.ops.qcompile.experts(
            hidden_states, top_k_index, top_k_weights,
            getattr(self, up), biases[0], getattr(self, down), biases[1], self.activation, False, False,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"activation={self.activation}, " + ", ".join(f"{n}={list(p.shape)}" for n, p in self.named_parameters())


# ----------------------------------------------------------------------------------------------------------- tracing


def stand_in(layout: ExpertsLayout, like: Tensor) -> FloatExperts:
    """Experts of the shapes of ``layout``, empty tensors like ``like``, in the place of a list that is traced."""
    form = layout.arithmetic
    shapes = [(layout.experts, form.rows, form.hidden), (layout.experts, form.hidden, form.intermediate)]
    weights = [like.new_empty(shape, dtype=layout.dtype) for shape in shapes]
    return FloatExperts(layout, weights, [weight[..., 0] if form.biases else None for weight in weights])


def mark(model: nn.Module, layouts: Sequence[ExpertsLayout]) -> None:
    """Let the experts of ``model`` be one node each in its graph, and blocks that route by a loop do without it."""
    for layout in layouts:
        if not layout.listed:
            module = model.get_submodule(layout.name)
            vars(module)["forward"] = partial(_marked, module, layout)
        if layout.block is not None:
            set_form(model.get_submodule(layout.parent), layout.block)


def _marked(module: nn.Module, layout: ExpertsLayout, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    form = layout.arithmetic
    up, down = (getattr(module, name) for name in form.weights)
    up_bias, down_bias = (getattr(module, name) for name in form.biases) if form.biases else (None, None)
    return torch.ops.qcompile.experts(
        x, ids, routing, up, up_bias, down, down_bias, form.activation, form.transposed, form.interleaved
    )


# ------------------------------------------------------------------------------------------------ reading and writing


def read_weight(model: nn.Module, layout: ExpertsLayout, projection: int) -> Tensor:
    """The float weight [experts, out, in] of projection 0 (up, gate first) or 1 (down); a copy where it must be."""
    module, form = model.get_submodule(layout.name), layout.arithmetic
    if layout.listed:
        stacked = torch.stack([torch.cat([_of(e, n).weight for n in _parts(layout, projection)]) for e in module])
    else:
        stacked = getattr(module, form.weights[projection]).detach()
        stacked = stacked.transpose(1, 2) if form.transposed else stacked
    return gate_first(stacked.transpose(1, 2)).transpose(1, 2) if form.interleaved and projection == 0 else stacked


def read_bias(model: nn.Module, layout: ExpertsLayout, projection: int) -> Tensor | None:
    """The float bias [experts, out] of a projection, or None."""
    module, form = model.get_submodule(layout.name), layout.arithmetic
    if not form.biases:
        return None
    if layout.listed:
        stacked = torch.stack([torch.cat([_of(e, n).bias for n in _parts(layout, projection)]) for e in module])
    else:
        stacked = getattr(module, form.biases[projection]).detach()
    return gate_first(stacked) if form.interleaved and projection == 0 else stacked


def _parts(layout: ExpertsLayout, projection: int) -> tuple[str, ...]:
    """Names, in each expert of a list, of the Linears that a projection is made of."""
    return layout.arithmetic.weights[-1:] if projection else layout.arithmetic.weights[:-1]


def _of(expert: nn.Module, name: str) -> nn.Linear:
    return expert.get_submodule(name)  # type: ignore[return-value]
