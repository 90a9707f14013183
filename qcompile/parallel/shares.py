"""The nouns of ``qcompile.parallel``: what a rank holds of one tensor, and of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..experts import ExpertsLayout
from ..types import Scheme, Site

Runs = tuple[tuple[int, int], ...]
"""Indices of one dimension, as [start, stop) after [start, stop)."""


@dataclass(frozen=True)
class Share:
    """How one tensor is divided.

    kind    "column": output rows; "row": input columns, whose products are summed over the ranks; "vocabulary": rows of
            embeddings; "experts": experts, and rows and columns of them; "parameter": indices of a dimension;
            "gathered": whole, though its input is divided and must be gathered; "whole"
    parts   what each tensor parallel rank holds, of the rows (column, vocabulary), columns (row) or indices; of
            "gathered" what each rank has of the input
    reason  why it is not divided, or not otherwise
    dim     of a "parameter"
    ordered of a "row" weight whose columns were sorted by group (act-order): parts are of the sorted columns, which
            each rank picks from the gathered input
    """

    kind: str
    parts: tuple[Runs, ...] = ()
    reason: str = ""
    dim: int = 0
    ordered: bool = False

    def runs(self, rank: int) -> Runs:
        """What a rank holds."""
        return self.parts[rank]

    def count(self, rank: int) -> int:
        """How many rows, columns or indices a rank holds."""
        return length(self.parts[rank])


@dataclass(frozen=True)
class Sharding:
    """The shares of a model: of sites by name, of parameters and embeddings by the name of the tensor.

    tp: ranks that divide every layer. ep: into how many parts the experts of a layer are dealt. Of ``tp // ep`` ranks,
    where that is more than one, each has some channels of the same experts. Where ``ep`` is more than ``tp``, there are
    ``ep`` ranks: ``ep // tp`` copies of the layers without their experts, each of which computes other tokens.
    """

    tp: int
    ep: int
    sites: Mapping[str, Share]
    tensors: Mapping[str, Share] = field(default_factory=dict)
    layouts: Mapping[str, ExpertsLayout] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[ExpertsLayout, ...]:
        """The experts of every layer; ``layouts`` has them by the names of their sites."""
        return tuple({layout.name: layout for layout in self.layouts.values()}.values())

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return max(self.tp, self.ep)

    @property
    def ways(self) -> int:
        """How many ranks divide the channels of the same experts."""
        return max(1, self.tp // self.ep)

    def experts(self, layout: ExpertsLayout, rank: int) -> tuple[int, int]:
        """Which experts of a layer a rank holds: [first, end)."""
        each = layout.experts // self.ep
        part = rank // self.ways
        return part * each, (part + 1) * each

    def intermediate(self, layout: ExpertsLayout, rank: int) -> tuple[int, int]:
        """Which channels of the intermediate size of an expert a rank holds: [first, end)."""
        each = layout.arithmetic.intermediate // self.ways
        return rank % self.ways * each, (rank % self.ways + 1) * each

    def site(self, site: Site, rank: int) -> Site:
        """What a rank holds of a site, as a site of its own."""
        share = self.sites.get(site.name)
        if share is None or share.kind in ("whole", "gathered"):
            return site
        if share.kind == "experts":
            layout = self.layouts[site.name]
            first, end = self.experts(layout, rank)
            is_down = site.name.endswith(f".{layout.projections[1]}")
            inn = site.in_features // self.ways if is_down else site.in_features
            out = site.out_features if is_down else site.out_features // self.ways
            return dataclasses.replace(site, experts=end - first, out_features=out, in_features=inn)
        if share.kind == "row":
            return dataclasses.replace(site, in_features=share.count(rank % self.tp))
        return dataclasses.replace(site, out_features=share.count(rank % self.tp))


def length(runs: Runs) -> int:
    """How many indices runs hold."""
    return sum(stop - start for start, stop in runs)


def indices(runs: Runs) -> Tensor:
    """The indices of runs, int64."""
    return torch.cat([torch.arange(*run) for run in runs]) if runs else torch.arange(0)


def runs_of(chosen: Tensor) -> Runs:
    """Runs of ascending indices."""
    if not chosen.numel():
        return ()
    breaks = (chosen.diff() != 1).nonzero().flatten() + 1
    pieces = torch.tensor_split(chosen, breaks.tolist())
    return tuple((int(piece[0]), int(piece[-1]) + 1) for piece in pieces)


def even(size: int, ways: int) -> tuple[Runs, ...]:
    """A dimension cut into equal runs."""
    each = size // ways
    return tuple(((rank * each, (rank + 1) * each),) for rank in range(ways))


def misaligned(scheme: Scheme, site: Site, kind: str, parts: Sequence[Runs]) -> str:
    """Why rows ("column") or columns ("row") of a scheme cannot be cut so; "" when they can."""
    weight, activation = scheme.weight, scheme.activation
    sizes = [("a block of rows", weight.block[0])] if kind == "column" and weight.block else []
    if kind == "row":
        sizes = [
            ("a group", weight.scale_columns or 0),
            ("a group of activations", (activation and activation.group_size) or 0),
        ]
    whole = site.out_features if kind == "column" else site.in_features
    for what, size in sizes:
        for start, stop in (run for runs in parts for run in runs):
            if size and (start % size or (stop % size and stop != whole)):
                cut = "rows" if kind == "column" else "columns"
                return f"{cut} {start}:{stop} of a rank would cut through {what} of {size}"
    return ""


def described(share: Share, sharding: Sharding, rank: int) -> str:
    """A share in words, "" for a whole weight of one rank."""
    if share.kind in ("whole", "gathered"):
        how = "gathers its input" if share.kind == "gathered" else "whole on every rank"
        return f"{how}: {share.reason}" if share.reason else how
    if share.kind == "experts":
        return f"experts by {sharding.ep}" + (f", channels by {sharding.ways}" if sharding.ways > 1 else "")
    what = {"row": "columns", "parameter": "indices"}.get(share.kind, "rows")
    return f"{share.kind} parallel, {what} {_spelled(share.runs(rank % sharding.tp))}"


def _spelled(runs: Runs) -> str:
    text = ", ".join(f"{start}:{stop}" for start, stop in runs[:3])
    return text + (" ..." if len(runs) > 3 else "")
