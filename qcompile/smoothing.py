"""Smoothing while a model is calibrated: which values can be scaled, by how much, and the scales folded in.

A method says how large a scale is good (``methods.SmoothingMethod``), the pass ``fold_scales`` where it can go. What is
folded is kept in float32 until it is quantized, so that nothing is lost to the dtype of the model on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from . import plugins
from .errors import shortened
from .methods import Reader
from .observers import Statistics
from .segments import Segment
from .types import Plan, PlannedSite

if TYPE_CHECKING:
    from .passes.fold_scales import Folding

Seen = list[Statistics]


@dataclass(frozen=True)
class Job:
    """A value that is to be scaled: its folding, and of the sites that read it those that ask for a scale."""

    folding: Folding
    sites: tuple[str, ...]

    @property
    def name(self) -> str:
        """By which its scale is stored."""
        return self.sites[0]


class Smoother:
    """The values of ``model`` that the methods of ``plan`` want to be scaled; ``notes`` say which cannot be, and why.

    graph: the traced model; None if it could not be traced, then nothing is scaled. sites: those that want it.
    """

    def __init__(self, model: nn.Module, graph: GraphModule | None, plan: Plan, sites: Sequence[str]) -> None:
        self.model, self.plan, self.count = model, plan, 0
        self._jobs: list[Job] = []
        self._exact: dict[str, Tensor] = {}
        self._refused: list[tuple[tuple[str, ...], str]] = []
        if not sites:
            return
        if graph is None:
            self._refused.append((tuple(sites), "without a graph nothing is known about what makes it"))
            return
        from .passes.fold_scales import foldings

        found, refused = foldings(graph)
        for folding in found:
            wanting = tuple(site for site in folding.sites if site in sites)
            if not wanting:
                continue
            if missing := folding.missing(model):
                self._refused.append((wanting, f"{missing.rpartition('.')[0]} stays as it is in the model"))
            else:
                self._jobs.append(Job(folding, wanting))
        named = {site for job in self._jobs for site in job.sites} | {s for own, _ in self._refused for s in own}
        for names, reason in refused:
            if wanting := tuple(site for site in names if site in sites and site not in named):
                self._refused.append((wanting, reason))

    @property
    def notes(self) -> tuple[str, ...]:
        """How many values were scaled; and for each reason, the sites whose inputs could not be."""
        if not self._jobs and not self._refused:
            return ()
        reasons: dict[str, list[str]] = {}
        for names, reason in self._refused:
            reasons.setdefault(reason, []).extend(names)
        return (
            f"{self.count} of {len(self._jobs) + len(self._refused)} values were scaled, and what makes them divided",
            *(f"the input of {shortened(names)} was not scaled: {reason}" for reason, names in reasons.items()),
        )

    def jobs(self, parts: Sequence[Segment]) -> list[Job]:
        """The values of a decoder block, in ``parts``, that can be scaled before any of it is quantized."""
        inside = {site for part in parts for site in part.sites}
        chosen = []
        for job in [job for job in self._jobs if inside.intersection(job.sites)]:
            maker = job.folding.source.weight.rpartition(".")[0]
            readers = {site for site in job.folding.sites if self._is_planned(site)}
            if self._is_planned(maker) and maker not in inside:
                self._give_up(job, f"{maker} makes it, and is quantized before this block is reached")
            elif outside := readers - inside:
                self._give_up(job, f"{shortened(outside)} reads it as well, in another block")
            else:
                chosen.append(job)
        return chosen

    def _is_planned(self, name: str) -> bool:
        return any(planned.site.name == name for planned in self.plan.quantized)

    def _give_up(self, job: Job, reason: str) -> None:
        self._jobs.remove(job)
        self._refused.append((job.sites, reason))

    def search(
        self, jobs: Sequence[Job], seen: Mapping[str, Seen], weight_of: Callable[[PlannedSite], Tensor], enough: int
    ) -> dict[str, Tensor]:
        """Find the scales of ``jobs``, fold them, and return them by their names.

        seen: what each site of the jobs reads. Experts that saw fewer than ``enough`` tokens have no say.
        """
        scales = {}
        for job in jobs:
            planned = self.plan[job.name]
            method = plugins.find("methods", planned.method)
            shared, options = job.folding.shared, dict(planned.options)
            readers: list[list[Reader]] = [[] for _ in range(max(1, job.folding.experts))]
            for name in job.sites:
                for index, reader in self._readers(self.plan[name], seen[name], weight_of, enough):
                    readers[index if job.folding.experts else 0].append(reader)
            chosen = [method.smooth(own, shared, options) if own else None for own in readers]
            if all(scale is None for scale in chosen):
                continue
            device = weight_of(planned).device
            ones = torch.ones(len(job.folding.source.rows), device=device)
            scale = torch.stack([ones if scale is None else scale for scale in chosen])
            scale = shared(job.folding.storable(self.model, scale if job.folding.experts else scale[0]))
            self.fold(job.name, scale)
            scales[job.name] = scale
        return scales

    def _readers(
        self, planned: PlannedSite, seen: Seen, weight_of: Callable[[PlannedSite], Tensor], enough: int
    ) -> list[tuple[int, Reader]]:
        assert planned.scheme is not None
        weight = self.weight(planned, weight_of(planned)).float()
        if planned.site.kind == "linear":
            return [(0, Reader(weight, planned.scheme, seen[0]))]
        return [
            (expert, Reader(weight[expert], planned.scheme, statistics))
            for expert, statistics in enumerate(seen)
            if statistics.count >= enough
        ]

    def fold(self, name: str, scale: Tensor) -> None:
        """Fold the scale of the job ``name`` into the model."""
        from .passes.fold_scales import fold

        job = next(job for job in self._jobs if job.name == name)
        fold(self.model, job.folding, scale, self._exact)
        self.count += 1
        for parameter in [*job.folding.weights, job.folding.source.weight, *job.folding.source.biases]:
            if not self._is_planned(parameter.removesuffix(".weight")):
                self._exact.pop(parameter)  # it stays as it is stored, and is not folded twice

    def weight(self, planned: PlannedSite, stored: Tensor) -> Tensor:
        """The float weight of a site as it was folded, or as it is ``stored``."""
        return self._exact.get(f"{planned.site.name}.weight", stored)

    def release(self, planned: PlannedSite) -> None:
        """Forget what was folded into a site that is quantized now."""
        self._exact.pop(f"{planned.site.name}.weight", None)
