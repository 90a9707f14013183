"""Which Linears of a decoder block are divided, and how: units are dealt to the ranks in order.

Columns of a Linear that ends a way follow its units, rows of the Linears before it, too. What does not fall into equal
units stays whole, and what is left is looked at again: so the narrow projections of latent attention come out whole,
and the wide ones after them divided.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..kernels import Backend, choose
from ..sites import LINEARS, block_name, first_names, module_name
from ..trace import Traced
from ..types import PlannedSite
from .dataflow import FREE, Flow, follow, units
from .meetings import is_ragged, parameter_slices
from .shares import Runs, Share, even, length, misaligned, runs_of


class Blocks:
    """The Linears of decoder blocks; blocks that are alike are looked at once."""

    def __init__(
        self, traced: Traced, model: nn.Module, decided: Mapping[str, PlannedSite], backend: Backend, tp: int,
        permuted: frozenset[str],
    ) -> None:  # fmt: skip
        self.decided, self.backend, self.tp, self.permuted = decided, backend, tp, permuted
        first = first_names(model)
        self.linears: dict[Node, str] = {}
        self.blocks: dict[str, list[Node]] = {}
        for node in traced.graph.graph.nodes:
            block = block_name(module_name(node))
            if node.op == "call_function" and block:
                self.blocks.setdefault(block, []).append(node)
                name = first.get(module_name(node), "")
                planned = decided.get(name)
                if (
                    node.target in LINEARS
                    and planned
                    and planned.site.role == "linear"
                    and planned.site.kind == "linear"
                ):
                    self.linears[node] = name

    def divide(self, sites: dict[str, Share], tensors: dict[str, Share]) -> None:
        """Add the shares of all blocks."""
        known: dict[tuple, tuple[str, dict[str, Share], dict[str, Share]]] = {}
        for block, nodes in self.blocks.items():
            key = tuple(self._kind(block, node) for node in nodes)
            if key not in known:
                known[key] = (block, *_Block(self, nodes).shares())
            first, own, parameters = known[key]
            sites |= {block + name.removeprefix(first): share for name, share in own.items()}
            tensors |= {block + name.removeprefix(first): share for name, share in parameters.items()}

    def _kind(self, block: str, node: Node) -> tuple:
        """What makes two blocks alike, of one of their nodes."""
        name = self.linears.get(node)
        if name is None:
            shape = getattr(node.meta.get("val"), "shape", ())
            return str(node.target), tuple(str(size) for size in shape)
        planned = self.decided[name]
        site = planned.site
        return name.removeprefix(block), site.shape, str(planned.scheme), name in self.permuted


class _Block:
    """The Linears of one decoder block."""

    def __init__(self, of: Blocks, nodes: Sequence[Node]) -> None:
        self.of, self.nodes, self.tp = of, nodes, of.tp
        self.whole: dict[str, str] = {}  # Linears that are not divided, and why
        self.copies = 1

    def shares(self) -> tuple[dict[str, Share], dict[str, Share]]:
        """Shares of the Linears and of other parameters of the block."""
        while True:
            flow = follow(self.nodes, self.of.linears, frozenset(self.whole), self.copies)
            unit = units(flow, self.copies)
            shares: dict[str, Share] = {}
            ranks = torch.full((flow.count * self.copies,), FREE)
            if not all(self._divide(flow, unit, cluster, shares, ranks) for cluster in _clusters(flow, unit)):
                continue
            parameters, problem = self._parameters(flow, ranks)
            if problem:
                continue
            inputs_only = flow.inputs.keys() - shares.keys()
            shares |= {
                name: Share("whole", reason=reason) for name, reason in self.whole.items() if name not in inputs_only
            }
            return shares, parameters

    def _divide(
        self, flow: Flow, unit: Tensor, cluster: Sequence[str], shares: dict[str, Share], ranks: Tensor
    ) -> bool:
        """Deal the units of Linears that belong together; False after it was decided to leave one whole."""
        columns = [name for name in cluster if name in flow.columns]
        rows = [name for name in cluster if name in flow.inputs]
        problem, order = _order(flow, unit, columns, rows)
        if not problem and len(order) % self.tp:
            problem = f"{self.tp} ranks do not divide its {len(order)} units (such as key/value heads)"
            if self.tp % len(order) == 0 and self._copy_heads(flow, len(order)):
                return False
        if problem:
            own = {name: _alone(flow, name, self.copies) for name in columns}
            worst = min(columns, key=lambda name: (own[name], columns.index(name)))
            self.whole[worst] = problem
            return False
        rank_of_unit = torch.full((flow.count * self.copies,), FREE)
        rank_of_unit[order] = torch.arange(len(order)) * self.tp // len(order)
        held = rank_of_unit[unit]
        found: dict[str, Share] = {}
        for name in columns:
            numbers = torch.arange(flow.rows[name]) + flow.columns[name]
            every = torch.stack([held[numbers + part * flow.count] for part in range(self.copies)])
            parts = tuple(runs_of((every == rank).any(0).nonzero().flatten()) for rank in range(self.tp))
            if reason := self._refusal(name, "column", parts):
                self.whole |= dict.fromkeys(columns, f"{name}: {reason}")
                return False
            found[name] = Share("column", parts)
        for name in rows:
            parts = tuple(runs_of((held[flow.inputs[name]] == rank).nonzero().flatten()) for rank in range(self.tp))
            found[name] = self._row(name, parts)
        numbers = torch.cat([torch.arange(flow.rows[n]) + flow.columns[n] for n in columns])
        for part in range(self.copies):
            ranks[numbers + part * flow.count] = held[numbers + part * flow.count]
        shares |= found
        return True

    def _row(self, name: str, parts: tuple[Runs, ...]) -> Share:
        permuted, made = name in self.of.permuted, parts
        if permuted:
            parts = even(self.of.decided[name].site.in_features, self.tp)
        if reason := self._refusal(name, "row", parts):
            return Share("gathered", made, reason)
        return Share("row", parts, ordered=permuted)

    def _refusal(self, name: str, kind: str, parts: tuple[Runs, ...]) -> str:
        """Why a rank cannot hold its rows or columns of a weight; "" when all can."""
        planned = self.of.decided[name]
        if planned.scheme is None:
            return ""
        if reason := misaligned(planned.scheme, planned.site, kind, parts):
            return reason
        for runs in parts:
            site = dataclasses.replace(planned.site, in_features=length(runs))
            if kind == "column":
                site = dataclasses.replace(planned.site, out_features=length(runs))
            kernel, why = choose(self.of.backend, site, planned.scheme)
            if kernel is None:
                return why
        return ""

    def _copy_heads(self, flow: Flow, heads: int) -> bool:
        """Whether every head can be held by several ranks, which divide the copies that attention makes of it."""
        copies = self.tp // heads
        if self.copies != 1:
            return False
        again = follow(self.nodes, self.of.linears, frozenset(self.whole), copies)
        used = torch.cat([*again.inputs.values(), *(ties.reshape(-1) for ties in again.ties)])
        if not bool((used >= again.count).any()):
            return False
        self.copies = copies
        return True

    def _parameters(self, flow: Flow, ranks: Tensor) -> tuple[dict[str, Share], bool]:
        def rank_of(numbers: Tensor) -> Tensor:
            return torch.where(numbers == FREE, FREE, ranks[numbers.clamp(min=0)])

        for name, numbers in flow.values.items():
            if is_ragged(numbers, rank_of(numbers), flow.count):
                owner = flow.owner(int(numbers[numbers != FREE][0]))
                self.whole[owner] = f"{name} would be cut along two dimensions"
                return {}, True
        parameters: dict[str, Share] = {}
        for name, dim, held, problem in parameter_slices(flow.meetings, rank_of):
            if problem:
                fresh = dict.fromkeys(flow.columns.keys() - self.whole.keys(), problem)
                self.whole |= fresh
                return {}, bool(fresh)
            parts = tuple(runs_of((held == rank).nonzero().flatten()) for rank in range(self.tp))
            parameters[name] = Share("parameter", parts, dim=dim)
        return parameters, False


def _clusters(flow: Flow, unit: Tensor) -> list[list[str]]:
    """Linears that share units, in the order of the block."""
    names = [*flow.columns, *(name for name in flow.inputs if name not in flow.columns)]
    held = {}
    for name in names:
        numbers = flow.inputs[name] if name in flow.inputs else torch.arange(flow.rows[name]) + flow.columns[name]
        held[name] = set(unit[numbers[numbers != FREE]].tolist())
    clusters: list[tuple[set[int], list[str]]] = []
    for name in names:
        joined = [cluster for cluster in clusters if cluster[0] & held[name]]
        merged = (held[name].union(*(c[0] for c in joined)), [*(n for c in joined for n in c[1]), name])
        clusters = [c for c in clusters if all(c is not j for j in joined)] + [merged]
    return [sorted(cluster[1], key=names.index) for cluster in clusters if any(n in flow.columns for n in cluster[1])]


def _order(flow: Flow, unit: Tensor, columns: Sequence[str], rows: Sequence[str]) -> tuple[str, Tensor]:
    """(why the units of some Linears cannot be dealt, the units in the order in which they are)."""
    mixed = {int(unit[number]): reason for number, reason in flow.mixed}
    numbers = torch.cat([torch.arange(flow.rows[name]) + flow.columns[name] for name in columns])
    reasons = [mixed[u] for u in unit[numbers].unique().tolist() if u in mixed]
    if reasons:
        return reasons[0], numbers[:0]
    if not rows:
        return "no Linear after it sums what the ranks would compute", numbers[:0]
    read = torch.cat([flow.inputs[name] for name in rows])
    if bool((read == FREE).any()):
        return f"{rows[0]} reads channels that no divided Linear makes", numbers[:0]
    firsts = unit[flow.inputs[rows[0]]]
    order = firsts[torch.sort(_first_places(firsts)).values]
    counts = []
    for name in columns:
        own = unit[torch.arange(flow.rows[name]) + flow.columns[name]]
        counts.append(torch.bincount(own, minlength=len(unit))[order])
    every = torch.zeros(len(unit), dtype=torch.bool)
    every[order] = True
    if any(not bool(every[unit[flow.inputs[name]]].all()) for name in rows):
        return "the Linears that sum it read different channels", numbers[:0]
    for name in rows:
        counts.append(torch.bincount(unit[flow.inputs[name]], minlength=len(unit))[order])
    return "", order


def _first_places(values: Tensor) -> Tensor:
    """Where each different value comes first."""
    unique, inverse = torch.unique(values, return_inverse=True)
    places = torch.full((len(unique),), len(values))
    return places.scatter_reduce_(0, inverse, torch.arange(len(values)), "amin")


def _alone(flow: Flow, name: str, copies: int) -> int:
    """Into how many units the rows of one Linear would fall without the others."""
    first, end = flow.columns[name], flow.columns[name] + flow.rows[name]
    own = [ties[:, ((ties % flow.count >= first) & (ties % flow.count < end)).all(0)] for ties in flow.ties]
    return len(units(dataclasses.replace(flow, ties=own), copies)[first:end].unique())
