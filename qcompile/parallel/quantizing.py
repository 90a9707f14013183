"""Quantizing on several ranks: sequences are divided while data are read, and the model afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from torch.fx import GraphModule

from .. import plugins
from ..errors import ConfigError
from ..experts import ExpertsLayout
from ..modules import QuantLinear, set_state
from ..planning import find_backend
from ..trace import Traced
from ..types import Plan, Report, Site, SiteResult, State
from .applying import divide
from .exchange import Exchange
from .ranks import ranks_of, sizes_of
from .sharding import local_plan, shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Division:
    """One call of ``quantize`` on the ranks of a mesh, from the traced graph while it is that of a float model."""

    def __init__(
        self,
        mesh: DeviceMesh,
        ep: int | None,
        graph: GraphModule | None,
        sites: Sequence[Site],
        experts: Sequence[ExpertsLayout],
    ) -> None:
        if graph is None:
            raise ConfigError(
                "tracing='module_walk' finds no graph, from which a model could be divided; leave out mesh="
            )
        self.mesh, (self.tp, self.ep) = mesh, sizes_of(mesh, ep)
        if mesh.ndim > 1:
            raise ConfigError("quantize divides a model among the ranks of a mesh of one dimension; load takes two")
        self.traced = Traced(graph, tuple(sites), tuple(experts))
        self.exchange = Exchange(mesh.get_group())

    def decide(self, model: nn.Module, plan: Plan, resume: str | Path | None) -> None:
        """Decide who holds what; ConfigError for what is not divided among ranks."""
        if resume is not None:
            raise ConfigError("resume= keeps the progress of one rank; leave it out, or quantize without mesh=")
        for planned in plan.quantized:
            if hasattr(plugins.find("methods", planned.method), "tune"):
                raise ConfigError(
                    f"method {planned.method!r} of {planned.site.name} learns from whole blocks, on one rank only: "
                    "quantize without mesh=, save, and load with mesh="
                )
        backend = find_backend(plan.device)
        ordered = [p.site.name for p in plan.quantized if dict(p.options).get("actorder") not in (None, "none", False)]
        self.sharding = shard(plan, self.traced, model, backend, self.tp, self.ep, ordered)
        self.ranks = ranks_of(self.mesh, self.tp, self.sharding.ep)

    def divide(self, model: nn.Module, report: Report) -> None:
        """Keep this rank's part of the quantized model, and say so in its plan and report."""
        plan = local_plan(report.plan, self.sharding, find_backend(report.plan.device), self.ranks.rank)
        divide(model, plan, self.sharding, self.ranks)
        results = tuple(_local(model, result, plan) for result in report.sites)
        own = dataclasses.replace(report, plan=plan, sites=results)
        set_state(model, State(plan, own, None, ranks=self.mesh.size()))


def _local(model: nn.Module, result: SiteResult, plan: Plan) -> SiteResult:
    planned = plan[result.planned.site.name]
    module = model.get_submodule(planned.site.name) if planned.quantized else None
    held = planned.bytes_after
    if isinstance(module, QuantLinear):
        held = sum(tensor.numel() * tensor.element_size() for tensor in module.buffers())
    return dataclasses.replace(result, planned=planned, bytes_after=held)
