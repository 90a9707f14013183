"""What a model would be on many ranks, from headers alone: bytes, collectives, and what cannot be divided."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from ..errors import shortened
from ..types import Plan
from .loading import DividedSurvey
from .shares import Sharding


@dataclasses.dataclass(frozen=True)
class Talk:
    """One kind of collective: how often it is called for a token, and the bytes of that token in each call."""

    what: str
    kind: str
    calls: int
    nbytes: int


def plan_of_a_rank(*checkpoint: Any, tp: int, ep: int | None) -> Plan:
    """The plan of the first rank; notes tell the bytes of all, what they tell each other, and what stays whole."""
    survey = DividedSurvey(*checkpoint, tp=tp, ep=ep)
    whole, sharding = survey.whole_plan, survey.sharding
    plans = [survey.plan_of(rank) for rank in range(sharding.ranks)]
    totals = [plan.bytes_after for plan in plans]
    notes = [
        f"{sharding.ranks} ranks (tp={sharding.tp}, ep={sharding.ep}) hold {_sized(min(totals))}"
        + (f" to {_sized(max(totals))}" if max(totals) > min(totals) else "")
        + f" each, of {_sized(whole.bytes_after)}"
    ]
    for talk in talks(whole, sharding, survey):
        total = talk.calls * talk.nbytes
        notes.append(f"per token: {talk.calls} x {talk.kind} of {_sized(talk.nbytes)} ({talk.what}), {_sized(total)}")
    notes += _undivided(whole, sharding)
    return dataclasses.replace(plans[0], notes=(*plans[0].notes, *notes))


def talks(whole: Plan, sharding: Sharding, survey: DividedSurvey) -> list[Talk]:
    """What a rank sends into collectives for one token, in the dtype of the model, summed up by kind."""
    found: Counter[tuple[str, str, int]] = Counter()
    for planned in whole:
        site, share = planned.site, sharding.sites[planned.site.name]
        size, activation = site.dtype.itemsize, planned.scheme.activation if planned.scheme else None
        ranged = activation is not None and activation.dynamic and activation.group_size is None
        if share.kind == "row":
            found["sums of row parallel products", "all-reduce", site.out_features * size] += 1
            if ranged:
                found["ranges of their dynamic activations", "all-reduce", 4 if activation.symmetric else 8] += 1  # type: ignore[union-attr]
        if share.kind == "gathered" or share.ordered:
            found["inputs of weights that are whole or in another order", "all-gather", site.in_features * size] += 1
        if share.kind == "vocabulary":
            found["logits", "all-gather", site.out_features * size] += 1
        if share.kind == "experts" and site.name.endswith(f".{sharding.layouts[site.name].projections[1]}"):
            k = getattr(survey.model.config, "num_experts_per_tok", None) or 1
            if sharding.ep > sharding.tp:
                found["tokens to their experts, and back", "all-to-all", k * site.out_features * size] += 2
                found["tokens of experts, within a copy", "all-gather", site.out_features * size] += 1
            else:
                found["sums of experts", "all-reduce", site.out_features * size] += 1
            if ranged and sharding.ways > 1:
                found["ranges of the dynamic activations of experts", "all-reduce", 4 * k] += 1
    for name, share in sharding.tensors.items():
        if share.kind == "vocabulary":
            columns = survey.model.get_parameter(name).shape[1]
            found["embeddings", "all-reduce", columns * survey.dtype.itemsize] += 1
    return [Talk(what, kind, calls, nbytes) for (what, kind, nbytes), calls in found.items()]


def _undivided(whole: Plan, sharding: Sharding) -> list[str]:
    """Reasons why weights are not divided, each with the names."""
    reasons: dict[str, list[str]] = {}
    for planned in whole:
        share = sharding.sites[planned.site.name]
        if share.kind in ("whole", "gathered") and planned.site.role != "router":
            reasons.setdefault(share.reason, []).append(planned.site.name)
    for name, share in sharding.tensors.items():
        if share.kind == "whole":
            reasons.setdefault(share.reason, []).append(name)
    return [f"whole on every rank: {shortened(names)}: {reason}" for reason, names in reasons.items()]


def _sized(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"
