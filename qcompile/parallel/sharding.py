"""A pass over the plan: which rows or columns of every weight each rank holds, and what the ranks tell each other.

What a rank would hold must be a weight of the same scheme that a kernel of the device can run; where it is not, the
reason is kept and the weight stays whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import ConfigError, UnsupportedError, shortened
from ..experts import ExpertsLayout
from ..kernels import Backend, choose
from ..sites import block_name
from ..trace import Traced
from ..types import Plan, PlannedSite
from .dividing import Blocks
from .shares import Sharding, Share, described, even, misaligned


def shard(
    plan: Plan,
    traced: Traced,
    model: nn.Module,
    backend: Backend,
    tp: int,
    ep: int | None = None,
    permuted: Iterable[str] = (),
) -> Sharding:
    """Decide the share of every site, embedding and parameter of ``model``.

    ep: default ``tp`` where that divides the experts, so that every expert stays whole, else 1. permuted: sites whose
    stored columns are in another order than their inputs, and belong to groups.

    ConfigError for ``tp`` and ``ep`` that do not go together; UnsupportedError where nothing could be divided, where
    experts cannot be dealt so, or where transformers' own ``tp_plan`` divides a Linear otherwise.
    """
    if tp < 1 or (ep or 1) < 1 or (tp % (ep or 1) and (ep or 1) % tp):
        raise ConfigError(f"one of tp and ep must be a multiple of the other, not tp={tp}, ep={ep}")
    decided = {planned.site.name: planned for planned in plan}
    sites: dict[str, Share] = {}
    tensors: dict[str, Share] = {}
    Blocks(traced, model, decided, backend, tp, frozenset(permuted)).divide(sites, tensors)
    ep = _share_experts(traced.experts, decided, backend, tp, ep, sites)
    _share_vocabulary(model, decided, tp, sites, tensors)
    for name in decided:
        sites.setdefault(name, Share("whole", reason="it is no part of a way from the residual stream and back"))
    layouts = {f"{layout.name}.{p}": layout for layout in traced.experts for p in layout.projections}
    if tp > 1 and not any(share.parts and share.kind != "gathered" for share in [*sites.values(), *tensors.values()]):
        reasons = "; ".join(dict.fromkeys(share.reason for share in sites.values() if share.reason))
        raise UnsupportedError(f"{type(model).__name__}: no weight can be divided by {tp}: {reasons[:600]}")
    _agree_with_transformers(model, sites)
    return Sharding(tp, ep, sites, tensors, layouts)


def local_plan(plan: Plan, sharding: Sharding, backend: Backend, rank: int) -> Plan:
    """What ``rank`` holds of a plan: its sites with their local shapes, kernels and bytes."""
    return dataclasses.replace(plan, sites=tuple(_local(planned, sharding, backend, rank) for planned in plan))


def _local(planned: PlannedSite, sharding: Sharding, backend: Backend, rank: int) -> PlannedSite:
    site, share = sharding.site(planned.site, rank), sharding.sites[planned.site.name]
    said = described(share, sharding, rank)
    reason = f"{planned.reason}; {said}" if said else planned.reason
    if not planned.quantized or planned.scheme is None:
        return dataclasses.replace(planned, site=site, reason=reason, bytes_after=site.float_bytes)
    if site == planned.site:
        return dataclasses.replace(planned, reason=reason)
    kernel, refusals = choose(backend, site, planned.scheme)
    assert kernel is not None, refusals  # ``shard`` made sure
    name = f"{backend.name}.{kernel.name}"
    return dataclasses.replace(
        planned, site=site, reason=reason, kernel=name, bytes_after=kernel.nbytes(site, planned.scheme),
        refusals=refusals,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- experts and vocabulary


def _share_experts(
    layouts: Sequence[ExpertsLayout],
    decided: Mapping[str, PlannedSite],
    backend: Backend,
    tp: int,
    ep: int | None,
    sites: dict[str, Share],
) -> int:
    """Add the shares of experts; how many parts they are dealt in."""
    if not layouts:
        if ep not in (None, 1):
            raise ConfigError(f"ep={ep} deals experts to ranks, but this model has none")
        return 1
    counts = {layout.experts for layout in layouts}
    chosen = ep if ep is not None else tp if all(count % tp == 0 for count in counts) else 1
    ways = max(1, tp // chosen)
    for layout in layouts:
        names = [f"{layout.name}.{projection}" for projection in layout.projections]
        size = layout.arithmetic.intermediate
        if layout.experts % chosen:
            raise UnsupportedError(f"{layout.name}: ep={chosen} does not divide its {layout.experts} experts")
        if size % ways:
            raise UnsupportedError(
                f"{layout.name}: {ways} ranks do not divide the intermediate size {size} of its experts"
            )
        for name, kind in zip(names, ("column", "row"), strict=True):
            planned = decided[name]
            if planned.scheme is not None and ways > 1:
                parts = even(size, ways)
                features = "out_features" if kind == "column" else "in_features"
                local: dict[str, Any] = {features: getattr(planned.site, features) // ways}
                local["experts"] = layout.experts // chosen
                kernel, refusals = choose(backend, dataclasses.replace(planned.site, **local), planned.scheme)
                why = misaligned(planned.scheme, planned.site, kind, parts) or ("" if kernel else refusals)
                if why:
                    raise UnsupportedError(
                        f"{name} ({planned.scheme}) cannot be divided by {ways}: {why}; deal whole experts: ep={tp}"
                    )
            sites[name] = Share("experts", even(layout.experts, chosen))
    return chosen


def _share_vocabulary(
    model: nn.Module, decided: Mapping[str, PlannedSite], tp: int, sites: dict[str, Share], tensors: dict[str, Share]
) -> None:
    """Divide embeddings and the lm_head by the rows of the vocabulary."""
    embeddings = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and not block_name(name)}
    heads = [planned for planned in decided.values() if planned.site.role == "lm_head"]
    uneven = "{} rows of the vocabulary are not a multiple of the " + f"{tp} ranks"
    for name, module in embeddings.items():
        rows = module.num_embeddings
        reason = uneven.format(rows) if rows % tp else ""
        tensors[f"{name}.weight"] = Share("whole", reason=reason) if reason else Share("vocabulary", even(rows, tp))
    for planned in heads:
        rows, parts = planned.site.out_features, even(planned.site.out_features, tp)
        reason = uneven.format(rows) if rows % tp else ""
        if not reason and planned.scheme is not None:
            reason = misaligned(planned.scheme, planned.site, "column", parts)
        sites[planned.site.name] = Share("whole", reason=reason) if reason else Share("vocabulary", parts)


# ------------------------------------------------------------------------------------------------ transformers' opinion

_STYLES = {"colwise": ("column", "vocabulary"), "rowwise": ("row", "gathered")}


def _agree_with_transformers(model: nn.Module, sites: Mapping[str, Share]) -> None:
    """UnsupportedError where transformers' ``tp_plan`` divides a Linear along the other dimension, or not at all."""
    styles = {key: value for key, value in (getattr(model, "tp_plan", None) or {}).items() if isinstance(value, str)}
    wrong = []
    for name, share in sites.items():
        if share.kind not in ("column", "row", "gathered", "vocabulary"):
            continue
        generic = ".".join("*" if part.isdigit() else part for part in name.split("."))
        style = styles.get(generic) or next((s for key, s in styles.items() if generic.endswith(f".{key}")), None)
        if style is None or share.kind in _STYLES.get(style.partition("_")[0], (share.kind,)):
            continue
        wrong.append(f"{name} is {share.kind} parallel here and {style!r} there")
    if wrong:
        raise UnsupportedError(f"{type(model).__name__}: its tp_plan does not agree: {shortened(wrong)}")
