"""Modules that hold a part: the same modules, of a class that also talks to the other ranks.

A module keeps its name, its place and its tensors; only its class becomes one that is derived from ``Linked`` and its
own, so that nothing else of a model has to know.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import numerics, ops
from ..modules import QuantExperts, QuantLinear
from ..moe import combine
from .collectives import exchanged, joined, largest, stacked, total


@dataclass(frozen=True)
class Link:
    """How a module takes part: its ``Share.kind``, the ranks and the group that it talks to ("" for a trial alone).

    start     vocabulary: the first row of this rank
    chosen    input features, int64, that this rank's columns read of a gathered input, for "gathered" and ordered "row"
    first     experts: the first expert of this rank; narrow: the group of the ranks that divide the same experts
    everyone  "exchanged" experts: how many ranks have the experts, all of which are in ``narrow``; first: which of the
              ``ranks`` with the same tokens this one is
    """

    kind: str
    ranks: int
    group: str
    start: int = 0
    chosen: Tensor | None = None
    first: int = 0
    narrow: str = ""
    everyone: int = 0


class Linked(nn.Module):
    """What linked modules have in common."""

    link: Link


def attach(module: nn.Module, link: Link) -> None:
    """Have a module, which holds this rank's part already, take part as ``link`` says."""
    if isinstance(module, QuantLinear):
        base: type = LinkedQuantLinear
    elif isinstance(module, nn.Linear):
        base = LinkedLinear
    elif isinstance(module, nn.Embedding):
        base = LinkedEmbedding
    elif isinstance(module, QuantExperts):
        base = ExchangedExperts if link.kind == "exchanged" else LinkedExperts
    else:
        raise TypeError(f"{type(module).__name__} cannot be divided")
    own: Any = type(module)
    module.__class__ = _linked(own, base)
    module.link = link  # type: ignore[assignment]
    if link.kind == "exchanged":
        vars(module)["forward"] = torch.compiler.disable(module.forward)  # not a decorator: that would load Dynamo
    if isinstance(module, nn.Embedding):
        module.padding_idx = None  # it is about gradients, and could be a row of another rank
    if link.kind == "row" and isinstance(module, nn.Linear | QuantLinear):
        bias = module.bias
        module.bias = None
        module.register_parameter("after", bias)


@functools.cache
def _linked(own: type, base: type) -> type:
    if issubclass(own, Linked):
        return own
    return type(own.__name__, (base, own), {"__module__": own.__module__, "__qualname__": own.__qualname__})


class _Product(Linked):
    """A Linear: gathers its input, sums or gathers its result."""

    def forward(self, x: Tensor) -> Tensor:
        link = self.link
        if link.kind == "gathered" or link.chosen is not None:
            x = joined(x, link.ranks, link.group)
            x = x if link.chosen is None else x.index_select(-1, link.chosen)
        result = self.local(x)
        if link.kind == "row":  # rounded once, after the sum, as the product of one rank is
            after: Tensor | None = self.after  # type: ignore[assignment]
            result = total(result.float(), link.group)
            return (result if after is None else result + after.float()).to(x.dtype)
        return joined(result, link.ranks, link.group) if link.kind == "vocabulary" else result

    def local(self, x: Tensor) -> Tensor:
        """What this rank computes of x."""
        raise NotImplementedError


def summed_dtype(x: Tensor) -> torch.dtype:
    """In what products of x are made that the ranks sum: Ascend's operations have no float32 results."""
    return x.dtype if x.device.type == "npu" else torch.float32


class LinkedLinear(_Product):
    """A float Linear."""

    def local(self, x: Tensor) -> Tensor:
        """The product with this rank's part."""
        return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


class LinkedQuantLinear(_Product):
    """A quantized Linear; the scales of divided rows are those of the whole row."""

    def local(self, x: Tensor) -> Tensor:
        """The product with this rank's part."""
        module: Any = self
        activation = module.scheme.activation
        if activation is None:
            return module.product([x], x.dtype)
        dtype = summed_dtype(x) if self.link.kind == "row" else x.dtype
        if self.link.kind != "row" or not activation.dynamic or activation.group_size is not None:
            return module.product(torch.ops.qcompile.quantize(x, module.params(), str(activation)), dtype)
        across = functools.partial(largest, group=self.link.group)
        return module.product(numerics.quantize_activation(x, activation, module.params(), across), dtype)


class LinkedEmbedding(Linked):
    """Rows of a vocabulary: tokens of other ranks give zeros, and the sum gives every token its row."""

    def forward(self, ids: Tensor) -> Tensor:
        module: Any = self
        rows, own = module.weight.shape[0], ids - self.link.start
        mine = (own >= 0) & (own < rows)
        found = super().forward(torch.where(mine, own, 0))
        return total(torch.where(mine[..., None], found, 0), self.link.group)


class LinkedExperts(Linked):
    """Some experts of a layer, or some channels of each: the sum over the ranks is the layer's."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        module: Any = self
        link, held, k = self.link, module.up.shape[0], top_k_index.shape[-1]
        x = hidden_states.reshape(-1, module.up.in_features)
        ids, routing = top_k_index.reshape(-1, k) - link.first, top_k_weights.reshape(-1, k)
        mine = (ids >= 0) & (ids < held)
        across = functools.partial(largest, group=link.narrow)
        arguments = (module.shared_input(x), torch.where(mine, ids, held), routing, *module.projections(x.dtype))
        result = ops.compute_experts(*arguments, across=across, summed=summed_dtype(x))
        return total(result, link.group).to(x.dtype).view(hidden_states.shape)


class ExchangedExperts(Linked):
    """Some experts of a layer, while copies of the model have different tokens: these are sent to their experts.

    Each rank sends its share of the tokens of its copy. How many go where depends on them, so this is not compiled.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        module: Any = self
        link, held, k = self.link, module.up.shape[0], top_k_index.shape[-1]
        x = hidden_states.reshape(-1, module.up.in_features)
        short = -len(x) % link.ranks  # padded tokens have weight 0
        own = [F.pad(part, (0, 0, 0, short)).chunk(link.ranks)[link.first] for part in
               (x, top_k_index.reshape(-1, k), top_k_weights.reshape(-1, k))]  # fmt: skip
        tokens, ids, routing = own
        owner, order = torch.sort((ids // held).reshape(-1), stable=True)
        sent = torch.bincount(owner, minlength=link.everyone)
        counts = sent.tolist()
        taken = exchanged(sent, [1] * link.everyone, [1] * link.everyone, link.narrow).tolist()
        rows = exchanged(tokens[order // k], taken, counts, link.narrow)
        chosen = exchanged((ids % held).reshape(-1)[order], taken, counts, link.narrow)[:, None]
        weights = torch.ones_like(chosen, dtype=routing.dtype)
        arguments = (module.shared_input(rows), chosen, weights, *module.projections(x.dtype))
        back = exchanged(torch.ops.qcompile.quant_experts(*arguments), counts, taken, link.narrow)
        result = stacked(combine(back, order, routing, x.dtype), link.ranks, link.group)
        return result[: len(x)].view(hidden_states.shape)
