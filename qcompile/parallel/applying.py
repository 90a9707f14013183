"""From a sharding to a model that holds one rank's parts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..experts import ExpertsLayout
from ..float_experts import fuse
from ..memory import return_memory
from ..modules import FloatWeight, QuantExperts, QuantLinear, QuantWeight, module_of, replace_module
from ..types import Plan, PlannedSite
from .layers import Link, attach
from .ranks import Ranks
from .shares import Runs, Sharding, Share, indices
from .slices import cut, cut_experts, inputs_of, take


@torch.no_grad()
def divide(model: nn.Module, plan: Plan, sharding: Sharding, ranks: Ranks) -> None:
    """Leave of a whole model, in place, what one rank holds; plan: the rank's own (``sharding.local_plan``)."""
    fuse_all(model, sharding.layers)
    chosen: dict[str, Tensor] = {}
    for planned in plan:
        name, share = planned.site.name, sharding.sites[planned.site.name]
        if share.kind in ("whole", "gathered") or not share.parts:
            continue
        module = model.get_submodule(name)
        if share.kind == "experts":
            _divide_experts(model, cast(Any, module), planned, sharding, ranks.rank)
        elif isinstance(module, QuantLinear):
            packed = module.packed()
            rows, columns = row_and_column_runs(share, ranks.tensor)
            if share.ordered:
                chosen[name] = inputs_of(packed, share.runs(ranks.tensor))
            bias = part_of_bias(module.bias, rows)
            replace_module(model, module, module_of(planned, cut(packed, rows, columns), bias).train(module.training))
        elif isinstance(module, nn.Linear):
            rows, columns = row_and_column_runs(share, ranks.tensor)
            set_linear(module, module.weight, part_of_bias(module.bias, rows), rows, columns)
        return_memory()
    divide_tensors(model, sharding, ranks.tensor)
    link(model, sharding, ranks, chosen)


def fuse_all(model: nn.Module, layouts: Iterable[ExpertsLayout]) -> None:
    """Fuse experts that are not, float ones too: only that form takes part."""
    fuse(model, [own for own in layouts if not isinstance(model.get_submodule(own.name), QuantExperts)])


def row_and_column_runs(share: Share, rank: int) -> tuple[Runs | None, Runs | None]:
    """What a rank holds of a Linear, of its rows and of its columns; None: all."""
    if share.kind in ("column", "vocabulary"):
        return share.runs(rank), None
    return (None, share.runs(rank)) if share.kind == "row" else (None, None)


def expert_runs(sharding: Sharding, name: str, rank: int) -> tuple[Runs | None, Runs | None]:
    """What a rank holds of each of its experts in the projection ``name``: rows (gate first) and columns; None: all."""
    layout = sharding.layouts[name]
    if sharding.ways == 1:
        return None, None
    start, stop = sharding.intermediate(layout, rank)
    if name.endswith(f".{layout.projections[1]}"):
        return None, ((start, stop),)
    size, gated = layout.arithmetic.intermediate, layout.arithmetic.rows != layout.arithmetic.intermediate
    return ((start, stop), (size + start, size + stop)) if gated else ((start, stop),), None


def part_of_bias(bias: Tensor | None, rows: Runs | None) -> Tensor | None:
    """The bias of some rows."""
    return bias if bias is None or rows is None else take(bias.detach(), -1, rows)


def set_linear(module: nn.Linear, weight: Tensor, bias: Tensor | None, rows: Runs | None, columns: Runs | None) -> None:
    """Give a float Linear a part of its weight [out, in]."""
    part = weight.detach()
    part = part if rows is None else take(part, 0, rows)
    part = part if columns is None else take(part, 1, columns)
    module.weight = nn.Parameter(part, requires_grad=False)
    module.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    module.out_features, module.in_features = part.shape


def _divide_experts(
    model: nn.Module, module: QuantWeight | FloatWeight, planned: PlannedSite, sharding: Sharding, rank: int
) -> None:
    name = planned.site.name
    layout = sharding.layouts[name]
    experts, (rows, columns) = sharding.experts(layout, rank), expert_runs(sharding, name, rank)
    bias = expert_bias(module.bias, sharding, name, rank)
    if isinstance(module, QuantWeight):
        made: nn.Module = module_of(planned, cut_experts(module.packed(), experts, rows, columns), bias)
    else:
        weight = module.weight.detach()[slice(*experts)]
        weight = weight if rows is None else take(weight, 1, rows)
        weight = weight if columns is None else take(weight, 2, columns)
        made = FloatWeight(weight.contiguous().clone(), bias)
    replace_module(model, module, made)


def expert_bias(bias: Tensor | None, sharding: Sharding, name: str, rank: int) -> Tensor | None:
    """A rank's part of the bias [experts, out]; of ranks that divide the same experts, the first has that of a sum."""
    if bias is None:
        return None
    layout = sharding.layouts[name]
    rows, columns = expert_runs(sharding, name, rank)
    own = bias.detach()[slice(*sharding.experts(layout, rank))]
    own = own if rows is None else take(own, 1, rows)
    return own.clone() if columns is None or columns[0][0] == 0 else torch.zeros_like(own)


def divide_tensors(model: nn.Module, sharding: Sharding, rank: int) -> None:
    """Divide embeddings and parameters that belong to no site; a tied weight stays one tensor."""
    done: dict[int, nn.Parameter] = {}
    for name, share in sharding.tensors.items():
        if not share.parts:
            continue
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        whole = getattr(owner, leaf)
        if id(whole) not in done:
            part = take(whole.detach(), share.dim, share.runs(rank))
            done[id(whole)] = nn.Parameter(part, requires_grad=False)
        setattr(owner, leaf, done[id(whole)])
        if isinstance(owner, nn.Embedding):
            owner.num_embeddings = share.count(rank)


def link(model: nn.Module, sharding: Sharding, ranks: Ranks, chosen: Mapping[str, Tensor]) -> None:
    """Have the modules of a model, which hold their parts, take part.

    chosen: of ordered rows, the input features that this rank's columns read.
    """
    for name, share in sharding.sites.items():
        if share.kind in ("whole", "experts", "column"):
            continue
        attach(
            model.get_submodule(name),
            Link(share.kind, sharding.tp, ranks.group, chosen=_inputs(share, name, sharding, chosen)),
        )
    for name, share in sharding.tensors.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if share.kind == "vocabulary" and isinstance(owner, nn.Embedding):
            attach(owner, Link("vocabulary", sharding.tp, ranks.group, start=share.runs(ranks.tensor)[0][0]))
    for layout in sharding.layers:
        first = sharding.experts(layout, ranks.rank)[0]
        own = Link("experts", sharding.tp, ranks.group, first=first, narrow=ranks.narrow)
        if sharding.ep > sharding.tp:
            own = Link(
                "exchanged", sharding.tp, ranks.group, first=ranks.tensor, narrow=ranks.world, everyone=sharding.ep
            )
        attach(model.get_submodule(layout.name), own)
    _set_heads(model, sharding)


def _inputs(share: Share, name: str, sharding: Sharding, chosen: Mapping[str, Tensor]) -> Tensor | None:
    """Which channels of a gathered input a Linear reads; None: all, in their order."""
    if share.kind == "row":
        return chosen.get(name)
    if share.kind != "gathered" or not share.parts:
        return None
    order = torch.cat([indices(runs) for runs in share.parts])
    return None if torch.equal(order, torch.arange(len(order))) else torch.argsort(order)


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEYS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def _set_heads(model: nn.Module, sharding: Sharding) -> None:
    """Tell attention modules how many heads they have now, where they keep that as a number or in their config."""
    parents = {name.rpartition(".")[0] for name, share in sharding.sites.items() if share.kind == "column"}
    for module in map(model.get_submodule, sorted(parents)):
        config = getattr(module, "config", None)
        heads = _number(module, config, _HEADS)
        keys = _number(module, config, _KEYS) or heads
        if not heads or not any(
            hasattr(module, name) for name in (*_HEADS, *_KEYS, "num_key_value_groups", "head_dim")
        ):
            continue
        own_heads, own_keys = heads // sharding.tp, max(1, keys // sharding.tp)
        numbers = dict.fromkeys(_HEADS, (heads, own_heads)) | dict.fromkeys(_KEYS, (keys, own_keys))
        numbers["num_key_value_groups"] = (heads // keys, own_heads // own_keys)
        for name, (whole, own) in numbers.items():
            if getattr(module, name, None) == whole:
                setattr(module, name, own)
        if config is not None:
            module.config = copy.copy(config)
            for name, (whole, own) in numbers.items():
                if getattr(module.config, name, None) == whole:
                    setattr(module.config, name, own)


def _number(module: nn.Module, config: Any, names: tuple[str, ...]) -> int:
    found = (getattr(owner, name, None) for owner in (module, config) for name in names)
    return next((value for value in found if isinstance(value, int)), 0)
