"""Quantize what needs data: run it part by part, collect what is asked for, quantize, and go on.

A part is a decoder block, or what lies between two of them (``segments``). Of all activations only those between the
parts exist at a time, and the statistics of one part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from . import plugins
from .errors import CalibrationError
from .observers import Needs, Statistics, activation_needs, search_clip, static_parameters
from .progress import progress_bar
from .segments import Runner, Segment, Segments, WholeModel
from .trace import as_called
from .types import PackedWeight, Plan, PlannedSite, Scheme, SiteResult

Install = Callable[[PlannedSite, PackedWeight | None], SiteResult]
"""Puts a packed weight in the place of a site's float one; None: quantize it first, nothing was seen of its inputs."""


def needs_of(planned: PlannedSite) -> Needs:
    """What the method and the scheme of a site must know of its inputs."""
    if planned.scheme is None:
        return Needs()
    method = plugins.find("methods", planned.method)
    return method.needs(planned.scheme, dict(planned.options)) | activation_needs(planned.scheme)


def plan_needs(plan: Plan) -> dict[str, Needs]:
    """The sites of a plan that need calibration data, by name."""
    return {p.site.name: needs for p in plan.quantized if (needs := needs_of(p))}


def refuse_without_data(plan: Plan, what_to_do: str) -> None:
    """CalibrationError that names the sites of a plan which need calibration data, if any do."""
    if not (needed := plan_needs(plan)):
        return
    first = plan[next(iter(needed))]
    more = f" and {len(needed) - 1} more" if len(needed) > 1 else ""
    why = "scheme" if activation_needs(first.scheme) else f"method {first.method!r} with scheme"
    raise CalibrationError(
        f"{first.site.name}{more} cannot be quantized without calibration data: {why} {first.scheme} is made from what "
        f"these sites read. {what_to_do}"
    )


class Calibration:
    """One run of calibration data through ``model`` that quantizes the sites of ``plan`` on the way.

    graph: the traced model, or None to run the model as it is, as one part; then ``example_inputs`` says whether it is
    run on token ids (None) or on its positional inputs. inputs: one tuple per pass, of ``calibration_inputs``.
    weight_of gives the float weight of a site, install replaces it.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        graph: GraphModule | None,
        example_inputs: tuple[Any, ...] | None,
        inputs: Sequence[tuple[Any, ...]],
        weight_of: Callable[[PlannedSite], Tensor],
        install: Install,
    ) -> None:
        self.plan, self.inputs, self.weight_of, self.install = plan, inputs, weight_of, install
        self.needs = plan_needs(plan)
        self.sequential = any(needs.sequential for needs in self.needs.values())
        names = [p.site.name for p in plan.quantized]
        if graph is None:
            self.runner: Runner = WholeModel(as_called(model, example_inputs), model, names)
        else:
            self.runner = Segments(graph, model, names, finely=self.sequential)
        self._parameters: dict[tuple[str, str], dict[str, Tensor]] = {}

    def run(self, progress: bool | None = None) -> dict[str, SiteResult]:
        """Quantize every planned site; results by name. CalibrationError names block and site of unusable inputs."""
        parts = self._parts() if self.needs else []
        results: dict[str, SiteResult] = {}
        states = [self.runner.start(inputs) for inputs in self.inputs]
        steps = len(self.plan.quantized) + len(parts) * len(states) * (1 + self.sequential)
        with progress_bar("quantizing", steps, progress) as advance:

            def quantize(planned: PlannedSite, seen: dict[str, Statistics]) -> None:
                results[planned.site.name] = self._quantize(planned, seen)
                advance(planned.site.name)

            for part in parts:
                seen = self._collect(part, states, advance)
                for site in part.sites:
                    quantize(self.plan[site], seen)
                if self.sequential:
                    self._propagate(part, states, advance)
            for planned in self.plan.quantized:
                if planned.site.name not in results:
                    quantize(planned, {})
        return results

    def _parts(self) -> list[Segment]:
        """All parts up to the last that has a site which needs data."""
        parts = list(self.runner.parts)
        while not any(site in self.needs for site in parts[-1].sites):
            parts.pop()
        return parts

    def _propagate(self, part: Segment, states: list[Any], advance: Callable[[str], None]) -> None:
        for index, values in enumerate(states):
            states[index] = self.runner.run(part, values)
            advance(part.name)

    def _collect(self, part: Segment, states: list[Any], advance: Callable[[str], None]) -> dict[str, Statistics]:
        """Statistics of the sites of a part that need some; those that read the same share one object.

        Unless propagation is sequential, ``states`` move on to what the part hands on.
        """
        asked = {site: self.needs[site] for site in part.sites if site in self.needs}
        groups: dict[Any, list[str]] = {}
        for site in asked:
            groups.setdefault(part.reads[site], []).append(site)
        leaders: dict[str, Statistics] = {}
        seen: dict[str, Statistics] = {}
        for sites in groups.values():
            needs = Needs()
            for site in sites:
                needs |= asked[site]
            leaders[sites[0]] = statistics = Statistics(needs, self.plan[sites[0]].site.in_features)
            seen |= dict.fromkeys(sites, statistics)

        def observe(site: str, x: Tensor) -> None:
            if site in leaders:
                leaders[site].update(x)

        for index, values in enumerate(states):
            if self.sequential:
                self.runner.look(part, values, observe)
            else:
                states[index] = self.runner.run(part, values, observe)
            advance(part.name)
        for site, statistics in leaders.items():
            _check(part, site, statistics)
        return seen

    def _quantize(self, planned: PlannedSite, seen: dict[str, Statistics]) -> SiteResult:
        statistics = seen.get(planned.site.name)
        if statistics is None:
            return self.install(planned, None)
        scheme, weight = planned.scheme, self.weight_of(planned)
        assert scheme is not None
        method = plugins.find("methods", planned.method)
        packed = method.quantize(weight, Scheme(scheme.weight), dict(planned.options), statistics)
        parameters = self._static(planned, seen)
        if scheme.activation is not None and scheme.activation.clip:
            alpha = search_clip(statistics.rows, weight, packed, scheme.activation)
            parameters = {"alpha": torch.tensor([alpha])}
        return self.install(planned, dataclasses.replace(packed, scheme=scheme, **parameters))

    def _static(self, planned: PlannedSite, seen: dict[str, Statistics]) -> dict[str, Tensor]:
        """Stored parameters of static activations: the same tensors for all sites that read the same tensor."""
        activation, label = planned.scheme.activation if planned.scheme else None, planned.site.inputs
        if activation is None or "input_scale" not in activation.params:
            return {}
        key = (label or planned.site.name, str(activation))
        if key not in self._parameters:
            alike = {planned.site.name} | {p.site.name for p in self.plan.quantized if label and p.site.inputs == label}
            ranges = [(s.low.min(), s.high.max()) for site, s in seen.items() if site in alike]
            low, high = (torch.stack(ends) for ends in zip(*ranges, strict=True))
            self._parameters[key] = static_parameters(low.min(), high.max(), activation)
        return self._parameters[key]


def _check(part: Segment, site: str, statistics: Statistics) -> None:
    where = f"{site}{f' in block {part.name}' if part.name else ''}"
    if not statistics.count:
        raise CalibrationError(f"{where} was never reached by the calibration data: leave it float by a rule")
    if not statistics.is_finite:
        raise CalibrationError(
            f"the input of {where} is NaN or infinite on the calibration data: the float model overflows before it. "
            "Load the model in bfloat16 or float32, or leave out what causes it"
        )
