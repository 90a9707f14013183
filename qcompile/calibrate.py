"""Quantize what needs data: run it part by part, collect what is asked for, quantize, and go on.

A part is a decoder block, or what lies between two of them (``segments``). Of all activations only those between the
parts exist at a time, and the statistics of one part.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from . import plugins
from .blocks import TunedBlock
from .errors import CalibrationError, ConfigError
from .observers import Needs, Statistics, activation_needs, shared_rounding
from .packing import complete, pack, reader, static
from .progress import progress_bar
from .resume import ResumeFolder
from .segments import Runner, Segment, Segments, WholeModel
from .smoothing import Smoother
from .trace import as_called
from .types import PackedWeight, Plan, PlannedSite, Site, SiteResult

if TYPE_CHECKING:
    from .parallel.exchange import Exchange, Record

Seen = list[Statistics]
"""Of what a site reads: one for a Linear, one per expert."""

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


@dataclass(frozen=True)
class RareExperts:
    """What happens to an expert that sees fewer than ``tokens`` tokens: "error", "all_tokens" or "rtn".

    all_tokens: every expert sees all tokens of its layer, whatever the router chose (slow: experts / k times the work).
    rtn: its weight is rounded to nearest, its static scale is that of the range of all others, nothing is clipped.
    """

    choice: str = "error"
    tokens: int = 16

    def __post_init__(self) -> None:
        if self.choice not in ("error", "all_tokens", "rtn"):
            raise ConfigError(f"rare_experts is 'error', 'all_tokens' or 'rtn', not {self.choice!r}")
        if self.tokens < 1:
            raise ConfigError(f"expert_tokens must be at least 1, not {self.tokens}")


class Calibration:
    """One run of calibration data through ``model`` that quantizes the sites of ``plan`` on the way.

    graph: the traced model, or None to run the model as it is, as one part; then ``example_inputs`` says whether it is
    run on token ids (None) or on its positional inputs. inputs: one tuple per pass, of ``calibration_inputs``.
    folder: keeps what is done, and may hold parts of this run already. weight_of gives the float weight of a site,
    install replaces it. exchange: ranks among which the inputs are divided. Afterwards ``notes`` tell what experts saw.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        graph: GraphModule | None,
        example_inputs: tuple[Any, ...] | None,
        inputs: Sequence[tuple[Any, ...]],
        rare: RareExperts,
        folder: ResumeFolder | None,
        weight_of: Callable[[PlannedSite], Tensor],
        install: Install,
        exchange: Exchange | None = None,
    ) -> None:
        self.plan, self.inputs, self.rare, self.folder = plan, inputs, rare, folder
        self.total, self.exchange = len(inputs), exchange
        if exchange is not None:
            self.inputs = exchange.own(inputs)
        self.weight_of, self.install = weight_of, install
        self.needs = plan_needs(plan)
        self.sequential = any(needs.sequential for needs in self.needs.values())
        names, all_tokens = [p.site.name for p in plan.quantized], rare.choice == "all_tokens"
        if graph is None:
            called = as_called(model, example_inputs)
            self.runner: Runner = WholeModel(called, model, names, all_tokens=all_tokens)
        else:
            self.runner = Segments(graph, model, names, finely=self.sequential, all_tokens=all_tokens)
        self.paired = graph is not None and any(needs.drift for needs in self.needs.values())
        self.smoother = Smoother(model, graph, plan, [site for site, needs in self.needs.items() if needs.smoothing])
        self._tuned: dict[str, PackedWeight] = {}
        self._parameters: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._counts: dict[str, list[int]] = {}

    def run(self, progress: bool | None = None) -> dict[str, SiteResult]:
        """Quantize every planned site; results by name. CalibrationError names block and site of unusable inputs."""
        work = [(part, self._groups(part)) for part in self._parts()]
        done = self.folder.done if self.folder else 0
        results = self._restored([part for part, _ in work[:done]])
        states, floats = self._states(done)
        passes = sum(len(groups) + 1 if self.sequential else 1 for _, groups in work[done:])
        steps = len(self.plan.quantized) - len(results) + passes * len(states)
        with progress_bar("quantizing", steps, progress) as advance:

            def quantize(sites: Iterable[str], seen: Mapping[str, Seen]) -> dict[str, PackedWeight]:
                made: dict[str, PackedWeight] = {}
                for site in sites:
                    packed = self._packed(self.plan[site], seen)
                    results[site] = self.install(self.plan[site], packed)
                    self.smoother.release(self.plan[site])
                    made |= {site: packed} if packed is not None else {}
                    advance(site)
                return made

            for index, (part, groups) in enumerate(work):
                if index < done:
                    continue
                block = self._block([part for part, _ in work], index)
                scales = self._smooth(block, states)
                made = self._tune(block, states, floats)
                if self.sequential:
                    for number, sites in enumerate(groups):
                        exact = [] if number else floats  # later groups read what has been quantized since
                        made |= quantize(sites, self._collect([part], [sites], self.needs, states, advance, exact))
                    for place, values in enumerate(states):
                        states[place] = self.runner.run(part, values)
                        advance(part.name)
                else:
                    made = quantize(part.sites, self._collect([part], groups, self.needs, states, advance))
                if self.folder:
                    counts = {site: self._counts[site] for site in part.sites if site in self._counts}
                    after = [] if index == len(work) - 1 else [self.runner.dump(v) for v in [*states, *floats]]
                    self.folder.save(made, counts, after, scales)
            quantize([p.site.name for p in self.plan.quantized if p.site.name not in results], {})
        return results

    def _block(self, parts: Sequence[Segment], index: int) -> Sequence[Segment]:
        """The parts of the decoder block that begins with part ``index``; nothing if it began before."""
        if index and parts[index - 1].name == parts[index].name:
            return []
        end = next((i for i in range(index, len(parts)) if parts[i].name != parts[index].name), len(parts))
        return parts[index:end]

    def _smooth(self, block: Sequence[Segment], states: list[Any]) -> dict[str, Tensor]:
        """Scale what the sites of a decoder block read, where their methods want that; the scales that were folded."""
        jobs = self.smoother.jobs(block)
        if not jobs:
            return {}
        groups: dict[Any, list[str]] = {}
        for job in jobs:
            for site in job.sites:  # experts see their own tokens, Linears all
                groups.setdefault((job.name, self.plan[site].site.experts), []).append(site)
        seen = self._collect(block, list(groups.values()), self.needs, states, lambda name: None, rounded=False)
        return self.smoother.search(jobs, seen, self.weight_of, self.rare.tokens)

    def _tune(self, block: Sequence[Segment], states: list[Any], floats: list[Any]) -> dict[str, PackedWeight]:
        """Quantize the sites of a decoder block whose methods do so together; installed later, one by one."""
        chosen = [self.plan[s] for part in block for s in part.sites if self.needs.get(s, Needs()).blocks]
        if not chosen or not isinstance(self.runner, Segments):
            return {}
        weights = {p.site.name: self.smoother.weight(p, self.weight_of(p)) for p in chosen}
        alike: dict[tuple[str, Any], list[PlannedSite]] = {}
        for planned in chosen:
            alike.setdefault((planned.method, planned.options), []).append(planned)
        for (name, options), sites in alike.items():
            own = {p.site.name: weights[p.site.name] for p in sites}
            tuned = TunedBlock(self.runner, block, states, floats, sites, own)
            self._tuned |= plugins.find("methods", name).tune(tuned, dict(options))
        return {p.site.name: complete(p, self._tuned[p.site.name], {}) for p in chosen}

    def _restored(self, parts: Sequence[Segment]) -> dict[str, SiteResult]:
        """Install what the folder has of these parts; what needed no data is quantized again."""
        results = {}
        for index, part in enumerate(parts):
            assert self.folder is not None
            packed, counts = self.folder.packed(index, self.plan.quantized)
            self._tuned |= packed  # a part holds more than its own sites if its block was quantized together
            self._counts |= counts
            for name, scale in self.folder.scales(index).items():
                self.smoother.fold(name, scale.to(self.weight_of(self.plan[name]).device))
            for site in part.sites:
                own = packed.get(site)
                if own is not None and own.input_scale is not None and self.plan[site].site.kind == "linear":
                    shared = self._parameters.setdefault(reader(self.plan[site]), own.activation_tensors())
                    own = dataclasses.replace(own, **shared)  # type: ignore[arg-type]
                results[site] = self.install(self.plan[site], own)
                self.smoother.release(self.plan[site])
                self._tuned.pop(site, None)
        return results

    def _states(self, done: int) -> tuple[list[Any], list[Any]]:
        """What the first part that is not done begins with, for each set of inputs; the same of the float model, if
        anybody wants to know.
        """
        if not done:
            states = [self.runner.start(inputs) for inputs in self.inputs]
            return states, list(states) if self.paired else []
        assert self.folder is not None
        device = next((x.device for x in self.inputs[0] if isinstance(x, Tensor)), torch.device("cpu"))
        states = [self.runner.load(dumped) for dumped in self.folder.inputs(device)]
        return states[: len(self.inputs)], states[len(self.inputs) :]

    @property
    def notes(self) -> tuple[str, ...]:
        """Which values were scaled; how many tokens the experts saw, and which ones too few."""
        if not self._counts:
            return self.smoother.notes
        counts = sorted(count for counts in self._counts.values() for count in counts)
        middle = counts[len(counts) // 2]
        found = [
            *self.smoother.notes,
            f"experts saw {counts[0]} to {counts[-1]} tokens each, half of them {middle} or more",
        ]
        for site, of_site in self._counts.items():
            if rare := [expert for expert, count in enumerate(of_site) if count < self.rare.tokens]:
                found.append(f"{site}: {_listed(rare, of_site)}, too few: rounded to nearest")
        return tuple(found)

    @property
    def expert_tokens(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """For each site of experts, how many tokens every expert saw."""
        return tuple((site, tuple(counts)) for site, counts in self._counts.items())

    def _parts(self) -> list[Segment]:
        """All parts up to the last that has a site which needs data."""
        parts = list(self.runner.parts)
        while parts and not any(site in self.needs for site in parts[-1].sites):
            parts.pop()
        return parts

    def _groups(self, part: Segment) -> list[list[str]]:
        """The sites of a part that need data, those together that read the same; for sequential runs the others too."""
        groups: dict[Any, list[str]] = {}
        for site in part.sites:
            if site in self.needs or self.sequential:
                groups.setdefault(part.reads[site], []).append(site)
        return list(groups.values())

    def _collect(
        self,
        parts: Sequence[Segment],
        groups: Sequence[Sequence[str]],
        wanted: Mapping[str, Needs],
        states: list[Any],
        advance: Callable[[str], None],
        floats: list[Any] | None = None,
        rounded: bool = True,
    ) -> dict[str, Seen]:
        """What the sites of ``groups``, in consecutive ``parts``, read; those of one group share the object.

        Unless propagation is sequential, ``states`` move on to what the parts hand on. floats: the states of the float
        model, that move on in any case; the one part is float then. rounded: as the quantized sites read it.
        """
        leaders: dict[str, Seen] = {}
        seen: dict[str, Seen] = {}
        for sites in groups:
            needs = functools.reduce(operator.or_, [wanted.get(site, Needs()) for site in sites])
            if not needs:
                continue
            site = self.plan[sites[0]].site
            device = self.weight_of(self.plan[sites[0]]).device
            read = shared_rounding(self.plan[name].scheme for name in sites) if rounded else None
            leaders[sites[0]] = [Statistics(needs, site.in_features, device, read) for _ in range(max(1, site.experts))]
            seen |= dict.fromkeys(sites, leaders[sites[0]])

        exact: dict[str, Tensor] = {}

        def remember(site: str, x: Tensor, ends: Tensor | None, tokens: Tensor | None) -> None:
            if site in leaders and ends is None:
                exact[site] = x
            elif site in leaders and tokens is not None:  # each token as often as it was routed
                exact[site] = x.new_empty(int(tokens.max()) + 1, x.shape[1]).index_copy_(0, tokens, x)

        def count(site: str, x: Tensor, ends: Tensor | None, wanted: Tensor | None) -> None:
            if ends is None:
                leaders[site][0].update(x, wanted)
                return
            places = ends[:-1].long().cpu()
            others = None if wanted is None else wanted.tensor_split(places)
            for index, rows in enumerate(x.tensor_split(places)):
                leaders[site][index].update(rows, None if others is None else others[index])

        records: list[Record] = []

        def observe(site: str, x: Tensor, ends: Tensor | None, tokens: Tensor | None) -> None:
            if site not in leaders:
                return
            wanted = exact.pop(site, None) if ends is None else exact.get(site)
            if wanted is not None and tokens is not None:
                wanted = wanted[tokens]  # of the float model, for the experts that are chosen now
            if self.exchange is None:
                count(site, x, ends, wanted)
            else:
                records.append((site, [x, ends, wanted]))

        def share(index: int) -> None:
            """Count what all ranks saw in their ``index``-th sequence."""
            if self.exchange is not None:
                for site, tensors in self.exchange.all(records, self.total, index):
                    count(site, *tensors)  # type: ignore[arg-type]
                records.clear()

        for index, values in enumerate(states):
            exact.clear()
            if floats:
                floats[index] = self.runner.run(parts[0], floats[index], remember)
            if leaders or not self.sequential:
                for part in parts[:-1] if self.sequential else parts:
                    values = self.runner.run(part, values, observe)
                if self.sequential:
                    self.runner.look(parts[-1], values, observe)
                else:
                    states[index] = values
            share(index)
            advance(parts[-1].name)
        if self.exchange is not None and len(states) < self.exchange.rounds(self.total):
            share(len(states))
        for name, statistics in leaders.items():
            self._check(self.plan[name].site, statistics)
        return seen

    def _check(self, site: Site, seen: Seen) -> None:
        where = f"{site.name}{f' in block {site.block}' if site.block else ''}"
        if any(statistics.count and not statistics.is_finite for statistics in seen):
            raise CalibrationError(
                f"the input of {where} is NaN or infinite on the calibration data: the float model overflows before "
                "it. Load the model in bfloat16 or float32, or leave out what causes it"
            )
        counts = [statistics.count for statistics in seen]
        if not any(counts):
            raise CalibrationError(f"{where} was never reached by the calibration data: leave it float by a rule")
        if site.kind == "experts":
            self._counts[site.name] = counts
            rare = [expert for expert, count in enumerate(counts) if count < self.rare.tokens]
            if rare and (self.rare.choice != "rtn" or len(rare) == len(counts)):
                raise CalibrationError(
                    f"{where}: {_listed(rare, counts)}, fewer than {self.rare.tokens}. Calibrate on more data, or "
                    "choose rare_experts='all_tokens' (every expert sees every token) or 'rtn' (these are rounded to "
                    "nearest); expert_tokens= says how many are enough"
                )

    def _packed(self, planned: PlannedSite, seen: Mapping[str, Seen]) -> PackedWeight | None:
        """The quantized weight of a site, or None if nothing was seen of its inputs."""
        if planned.site.name not in seen:
            return None
        if (tuned := self._tuned.pop(planned.site.name, None)) is not None:
            return complete(planned, tuned, {})
        weight, own = self.smoother.weight(planned, self.weight_of(planned)), seen[planned.site.name]
        if planned.site.kind == "linear":
            return pack(planned, weight, own[0], self._static(planned, seen))
        enough = [statistics.count >= self.rare.tokens for statistics in own]
        others = static(planned, [s for s, is_enough in zip(own, enough, strict=True) if is_enough])
        return PackedWeight.of_experts(
            [
                pack(planned, weight[e], own[e], static(planned, [own[e]]))
                if enough[e]
                else pack(planned, weight[e], None, others)
                for e in range(len(own))
            ]
        )

    def _static(self, planned: PlannedSite, seen: Mapping[str, Seen]) -> dict[str, Tensor]:
        """Stored parameters of a Linear's activations: the same tensors for all sites that read the same tensor."""
        key = reader(planned)
        if key not in self._parameters:
            alike = {p.site.name for p in self.plan.quantized if reader(p) == key}
            ranges = [found[0] for site, found in seen.items() if site in alike and len(found) == 1]
            self._parameters[key] = static(planned, ranges)
        return self._parameters[key]


def _listed(experts: Sequence[int], counts: Sequence[int]) -> str:
    """ "expert 3 saw 0 tokens, expert 7 saw 5", shortened."""
    each = [f"expert {expert} saw {counts[expert]}" for expert in experts[:8]]
    return ", ".join(each) + (f" and {len(experts) - 8} more" if len(experts) > 8 else "") + " tokens"
