"""A checkpoint for one of several ranks: everything is checked as for one, and only this rank's part is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import parts
from ..errors import ConfigError
from ..experts import ExpertsLayout
from ..float_experts import slots
from ..skeleton import Slot
from ..survey import Survey
from ..trace import is_language_model, trace
from ..types import PackedWeight, Plan, PlannedSite, SiteResult
from .applying import expert_runs, fuse_all, link, row_and_column_runs
from .collectives import total
from .kinds import Kinds
from .ranks import Ranks
from .sharding import local_plan, shard
from .shares import Runs, length
from .slices import cut, cut_experts, inputs_of, read_part, read_part_of_bias

Cuts = list[Runs | None]  # of each dimension of a tensor; None: all


class DividedSurvey(Survey):
    """What a checkpoint holds for the ``tp`` ranks that divide a language model of transformers.

    ``sharding`` says who holds what, ``whole_plan`` what is planned; ``hold`` chooses the rank whose part ``load``
    reads.
    """

    def __init__(self, *checkpoint: Any, tp: int, ep: int | None) -> None:
        super().__init__(*checkpoint)
        if not is_language_model(self.model):
            raise ConfigError(
                f"{type(self.model).__name__} is no language model of transformers, whose inputs are known: only such "
                "checkpoints are divided while they are read. Load it whole, then call qcompile.quantize(..., mesh=)"
            )
        permuted = [name for name, weight in self.weights.items() if _is_permuted(weight)]
        self.whole_plan = self.plan
        kinds = Kinds(self.model, self.plan, permuted)
        found = shard(kinds.plan, trace(kinds.model), kinds.model, self.backend, tp, ep, kinds.permuted)
        self.sharding = dataclasses.replace(
            found,
            sites=kinds.whole([planned.site.name for planned in self.plan], found.sites),
            tensors=kinds.whole([name for name, _ in self.model.named_parameters()], found.tensors),
            layouts={f"{layout.name}.{p}": layout for layout in self.layouts for p in layout.projections},
        )
        self.ranks = Ranks()

    def hold(self, ranks: Ranks) -> None:
        """Be about the part of one rank from now on."""
        self.ranks = ranks
        self.plan = self.plan_of(ranks.rank)
        self._whole = {planned.site.name: planned for planned in self.whole_plan}
        self._chosen: dict[str, Tensor] = {}
        self._cuts = dict(self._found_cuts())
        for layout in self.layouts:
            self._drop_foreign(layout)
        held = {id(module) for module in self.model.modules()}
        self.slots = [slot for slot in self.slots if any(id(module) in held for module, _ in slot.places)]
        self.layouts = tuple(dataclasses.replace(e, experts=e.experts // self.sharding.ep) for e in self.layouts)

    def load(self, progress: bool | None) -> tuple[SiteResult, ...]:
        """Fill the model with the part of this rank, and have it take part."""
        results = super().load(progress)
        for module in self.model.modules():
            if isinstance(module, nn.Linear) and not module.weight.is_meta:
                module.out_features, module.in_features = module.weight.shape
            elif isinstance(module, nn.Embedding):
                module.num_embeddings = module.weight.shape[0]
        fuse_all(self.model, self.layouts)
        link(self.model, self.sharding, self.ranks, self._chosen)
        return results

    def plan_of(self, rank: int) -> Plan:
        """What one rank holds of the plan."""
        own = local_plan(self.whole_plan, self.sharding, self.backend, rank)
        return dataclasses.replace(own, other_bytes=own.other_bytes - self._saved_bytes())

    def _saved_bytes(self) -> int:
        """Bytes of embeddings and other parameters, beside the sites, that one rank does without."""
        saved, seen = 0, set()
        for name, share in self.sharding.tensors.items():
            tensor = self.model.get_parameter(name)
            if share.parts and id(tensor) not in seen:
                seen.add(id(tensor))
                kept = share.count(0) / tensor.shape[share.dim]
                saved += round(tensor.numel() * self.dtype.itemsize * (1 - kept))
        return saved

    # ------------------------------------------------------------------------------------------------- float tensors

    def _found_cuts(self) -> Any:
        """(name in the model, cuts) of every float tensor of which this rank reads a part."""
        for name, share in self.sharding.sites.items():
            if share.kind == "experts":
                yield from self._expert_cuts(name)
            elif share.parts and share.kind != "gathered":
                rows, columns = row_and_column_runs(share, self.ranks.tensor)
                yield f"{name}.weight", [rows, columns]
                if rows is not None:
                    yield f"{name}.bias", [rows]
        for name, share in self.sharding.tensors.items():
            if share.parts:
                whole = self.model.get_parameter(name)
                yield name, [share.runs(self.ranks.tensor) if dim == share.dim else None for dim in range(whole.dim())]

    def _expert_cuts(self, name: str) -> Any:
        layout, projection = self.of_experts[name]
        rows, columns = expert_runs(self.sharding, name, self.ranks.rank)
        form = layout.arithmetic
        weights = form.weights[-1:] if projection else form.weights[:-1]
        biases = form.biases[-1:] if projection else form.biases[:-1]
        if layout.listed:
            own = rows if rows is None or len(weights) == 1 else rows[:1]
            for expert in range(*self._experts(layout)):
                for weight in weights:
                    yield f"{layout.name}.{expert}.{weight}.weight", [own, columns]
                    yield f"{layout.name}.{expert}.{weight}.bias", [own]
            return
        if rows is not None and form.interleaved and not projection:
            start, stop = self.sharding.intermediate(layout, self.ranks.rank)
            rows = ((2 * start, 2 * stop),)
        for weight in weights:
            sides: Cuts = [columns, rows] if form.transposed else [rows, columns]
            yield f"{layout.name}.{weight}", [(self._experts(layout),), *sides]
        for bias in biases:
            yield f"{layout.name}.{bias}", [(self._experts(layout),), rows]

    def _experts(self, layout: ExpertsLayout) -> tuple[int, int]:
        layout = self.sharding.layouts[f"{layout.name}.{layout.projections[0]}"]
        return self.sharding.experts(layout, self.ranks.rank)

    def _drop_foreign(self, layout: ExpertsLayout) -> None:
        """Leave of a list of experts those of this rank; their names in the files stay what they were."""
        if layout.listed:
            every = self.model.get_submodule(layout.name)
            own = [every[index] for index in range(*self._experts(layout))]  # type: ignore[index]
            self.model.get_submodule(layout.parent).add_module(layout.name.rpartition(".")[2], nn.ModuleList(own))

    def read_slot(self, slot: Slot) -> Tensor:
        """This rank's part of a float tensor."""
        cuts = next((self._cuts[name] for name in slot.names if name in self._cuts), None)
        if cuts is None:
            return super().read_slot(slot)
        names, stored = self.places(slot)
        tensor = self._assembled(slot, stored, cuts) if stored else self.folder.read_slice(names[0], cuts)
        is_summed = any(name in self._later_biases() for name in slot.names)
        return torch.zeros_like(tensor) if is_summed else tensor

    def _later_biases(self) -> set[str]:
        """Biases after a divided sum over columns of experts, which only the first of its ranks adds."""
        found = set()
        for layout in self.layouts:
            name = f"{layout.name}.{layout.projections[1]}"
            columns = expert_runs(self.sharding, name, self.ranks.rank)[1]
            if columns is not None and columns[0][0]:
                module = self.model.get_submodule(layout.name)
                labels = {id(owner): key for owner, key in slots(module, layout, 1, "bias")}
                found |= {f"{n}.{labels[id(m)]}" for n, m in self.model.named_modules() if id(m) in labels}
        return found

    def _assembled(self, slot: Slot, stored: Sequence[parts.Part], cuts: Cuts) -> Tensor:
        """A part [experts, rows, columns] of a tensor that is stored in parts, each some rows of one expert."""
        shape = tuple(slot.tensor.shape)
        (first, end), rows, columns = cuts[0][0], cuts[1], cuts[2] if len(cuts) > 2 else None  # type: ignore[index]
        height = shape[1]
        wanted = rows or ((0, height),)
        pieces: dict[int, list[Tensor]] = {expert: [] for expert in range(first, end)}
        for part in stored:
            expert, offset = divmod(part.start, height)
            if expert not in pieces:
                continue
            own = _overlap(wanted, offset, part.rows)
            if own:
                pieces[expert].append(self.folder.read_slice(part.name, [own, columns][: len(part.shape)]))
        return torch.stack([torch.cat(own) for own in pieces.values()])

    # ------------------------------------------------------------------------------------------------ quantized sites

    def quantize_site(self, planned: PlannedSite) -> tuple[PackedWeight, float]:
        """Quantize the whole float weight, and keep this rank's part: scales are those of one rank."""
        whole = self._whole[planned.site.name]
        rows, columns, experts = self._part_of(planned)
        packed, sqnr = super().quantize_site(whole)
        if experts is not None:
            return cut_experts(packed, experts, rows, columns), sqnr
        return self._kept(planned, packed, rows, columns), sqnr

    def _kept(
        self, planned: PlannedSite, packed: PackedWeight, rows: Runs | None, columns: Runs | None
    ) -> PackedWeight:
        if self.sharding.sites[planned.site.name].ordered and columns is not None:
            self._chosen[planned.site.name] = inputs_of(packed, columns)
        return cut(packed, rows, columns)

    def _part_of(self, planned: PlannedSite) -> tuple[Runs | None, Runs | None, tuple[int, int] | None]:
        name = planned.site.name
        share = self.sharding.sites[name]
        if share.kind != "experts":
            return *row_and_column_runs(share, self.ranks.tensor), None
        return *expert_runs(self.sharding, name, self.ranks.rank), self._experts(self.of_experts[name][0])

    def read_site(self, weight: parts.StoredWeight) -> PackedWeight:
        """This rank's part of a weight that is stored quantized."""
        assert self.format is not None
        name = weight.site.name
        rows, columns, experts = self._part_of(self._whole[name])
        if experts is None:
            (stored,) = weight.stored.values()
            if rows is None and columns is None:
                return self.read_stored(stored)
            packed, chosen = read_part(self.format, stored, self.folder, rows, columns)
            if self.sharding.sites[name].ordered and columns is not None:
                self._chosen[name] = torch.cat([torch.arange(*run) for run in columns]) if chosen is None else chosen
            return packed
        read = []
        for own in weight.pieces[slice(*experts)]:
            pieces = []
            for piece in own:
                part = None if rows is None else _overlap(rows, piece.start, piece.rows)
                if part != ():
                    pieces.append(read_part(self.format, weight.stored[piece.name], self.folder, part, columns)[0])
            read.append(parts.join(pieces, weight.scheme))
        return parts.stack(iter(read), len(read))

    def read_bias(self, weight: parts.StoredWeight, loaded: Tensor | None) -> Tensor | None:
        """This rank's part of the bias of a quantized site; a bias after a sum over the ranks is whole on each."""
        named = weight.stored.items()
        if not any(stored.owns_bias or f"{name}.bias" in self.extra_biases for name, stored in named):
            return loaded
        rows, columns, experts = self._part_of(self._whole[weight.site.name])
        pieces = weight.pieces[slice(*experts)] if experts else weight.pieces
        first = columns is None or columns[0][0] == 0  # of the ranks that share a sum, the one that has the stored bias
        own = [[self._piece_of_bias(weight, piece, rows, columns, first) for piece in each] for each in pieces]
        found = torch.stack([torch.cat(each) for each in own]).double()
        if columns is not None and experts is None:
            found = total(found, self.ranks.group)
        if not bool(found.any()) and not weight.site.has_bias:
            return None
        return (found if experts else found[0]).to(self.dtype).to(self.device)

    def _piece_of_bias(
        self, weight: parts.StoredWeight, piece: parts.Piece, rows: Runs | None, columns: Runs | None, first: bool
    ) -> Tensor:
        stored = weight.stored[piece.name]
        own = None if rows is None else _overlap(rows, piece.start, piece.rows)
        if stored.owns_bias:
            assert self.format is not None
            bias = read_part_of_bias(self.format, stored, self.folder, own, columns, first)
        elif f"{stored.name}.bias" in self.extra_biases and first:
            bias = self.folder.read_slice(f"{stored.name}.bias", [own])
        else:
            bias = None
        return torch.zeros(piece.rows if own is None else length(own)) if bias is None else bias


def _overlap(runs: Runs, start: int, count: int) -> Runs:
    """What of runs lies in [start, start + count), counted from there."""
    found = ((max(a, start) - start, min(b, start + count) - start) for a, b in runs)
    return tuple((a, b) for a, b in found if a < b)


def _is_permuted(weight: parts.StoredWeight) -> bool:
    """Whether config and headers say that stored columns are in another order, and belong to groups."""
    layouts = [stored.layout for stored in weight.stored.values()]
    ordered = any(layout.get("g_idx") and layout.get("desc_act") is not False for layout in layouts)
    return ordered and weight.scheme.weight.groups(weight.site.in_features) > 1
