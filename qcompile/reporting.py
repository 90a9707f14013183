"""The facts of a plan or a report as text, as plain data and as one HTML page.

A model of 94 layers has 658 sites and about eight different ones. Rows that differ only in the numbers of their names
are merged: ``model.layers.{0..93}.self_attn.q_proj``. The plain data always has every site.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .types import GraphRecord, Moment, PassRecord, Plan, Report, SiteResult

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole component of a dotted name: 3 in layers.3, not 1 in fc1
_SHOWN_RUNS = 6


def plan_text(plan: Plan) -> str:
    """A plan as plain text with aligned columns."""
    results = _planned(plan)
    lines = [f"plan for {plan.device}", "", *_site_tables(results), *_totals(plan, results, plan.bytes_after)]
    return "\n".join([*lines, *_section("notes", plan.notes)])


def report_text(report: Report) -> str:
    """A report as plain text with aligned columns."""
    lines = [f"{report.model} on {report.plan.device}, quantized in {report.seconds:.1f} s", ""]
    lines += _site_tables(report.sites)
    lines += _totals(report.plan, report.sites, bytes_after(report))
    lines += _section("notes", all_notes(report))
    lines += _section("memory", memory_lines(report.memory))
    lines += _section("passes", [line for record in report.passes for line in _pass_lines(record)])
    lines += _section("compiled graphs", [line for graph in report.graphs for line in _graph_lines(graph)])
    return "\n".join(lines)


def plan_dict(plan: Plan) -> dict[str, Any]:
    """A plan as plain data, with every site."""
    return _facts(plan, _planned(plan), plan.bytes_after) | {"notes": list(plan.notes)}


def report_dict(report: Report) -> dict[str, Any]:
    """A report as plain data, with every site. ``sqnr_db`` is null for float sites and where ``exact`` is true."""
    return {
        "model": report.model,
        "seconds": report.seconds,
        "coverage": report.coverage,
        **_facts(report.plan, report.sites, bytes_after(report)),
        "notes": list(all_notes(report)),
        "expert_tokens": {site: list(tokens) for site, tokens in report.expert_tokens},
        "memory": [dataclasses.asdict(moment) for moment in report.memory],
        "frontier": [dataclasses.asdict(point) for point in report.frontier],
        "passes": [_pass_dict(record) for record in report.passes],
        "graphs": [
            {
                "inputs": graph.inputs,
                "nodes": graph.nodes,
                "regions": graph.regions,
                "compiled_regions": graph.compiled_regions,
                "seconds": graph.seconds,
                "passes": [_pass_dict(record) for record in graph.passes],
            }
            for graph in report.graphs
        ],
    }


def plan_html(plan: Plan, *, page: bool = True) -> str:
    """A plan as one self-contained HTML page, or (``page=False``) as a fragment to embed in another."""
    from .webpage import html_page

    return html_page(f"Plan for {plan.device}", [Report("", plan, _planned(plan))], page=page)


def report_html(report: Report, *, page: bool = True) -> str:
    """A report as one self-contained HTML page, or (``page=False``) as a fragment to embed in another."""
    from .webpage import html_page

    return html_page(report.model, [report], page=page)


def size(count: float) -> str:
    """Bytes for people: 812 B, 3.1 MB, 12.4 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Row:
    """Sites that differ in nothing but the numbers in their names."""

    name: str
    count: int
    shape: str
    scheme: str
    method: str
    kernel: str
    reason: str
    bytes_before: int
    bytes_after: int
    sqnr: str


Box = tuple[tuple[int, ...], ...]  # per number of a name, the values it takes


def merge_names(names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Merge names that differ in their numbers: (label, indices of the names it stands for), in order of appearance.

    A label always stands for exactly its names: experts that exist in some layers only get their own row.
    """
    families: dict[str, dict[Box, list[int]]] = defaultdict(dict)
    for index, name in enumerate(names):
        numbers = tuple((int(n),) for n in NUMBER.findall(name))
        families[NUMBER.sub("{}", name)].setdefault(numbers, []).append(index)
    merged = []
    for template, boxes in families.items():
        for axis in reversed(range(template.count("{}"))):
            along: dict[Box, list[Box]] = defaultdict(list)
            for box in boxes:
                along[box[:axis] + box[axis + 1 :]].append(box)
            boxes = {
                (*rest[:axis], tuple(sorted(n for box in same for n in box[axis])), *rest[axis:]): [
                    index for box in same for index in boxes[box]
                ]
                for rest, same in along.items()
            }
        merged += [(template.format(*map(number_runs, box)), indices) for box, indices in boxes.items()]
    return sorted(merged, key=lambda item: min(item[1]))


def number_runs(numbers: Sequence[int]) -> str:
    """The numbers 0, 1, 2, 5 as "{0..2,5}"; a single one as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    if len(texts) > _SHOWN_RUNS:
        texts = [*texts[: _SHOWN_RUNS - 1], "…", texts[-1]]
    return "{" + ",".join(texts) + "}"


def rows(results: Sequence[SiteResult]) -> list[Row]:
    """Merge results that are alike; ``sqnr`` of a row spans its sites."""
    alike: dict[tuple, list[SiteResult]] = defaultdict(list)
    for result in results:
        planned, site = result.planned, result.planned.site
        reason = planned.reason or site.obstacle
        key = (
            NUMBER.sub("#", site.name),
            str(list(site.shape)),
            str(planned.scheme) if planned.scheme else "",
            " ".join([planned.method, *(f"{key}={value}" for key, value in planned.options)]),
            planned.kernel,
            reason.replace(site.name, "this site") if "." in site.name else reason,
        )
        alike[key].append(result)
    found = []
    for (_, shape, scheme, method, kernel, reason), members in alike.items():
        for name, indices in merge_names([r.planned.site.name for r in members]):
            group = [members[i] for i in indices]
            before = sum(r.planned.site.float_bytes for r in group)
            after = sum(r.bytes_after for r in group)
            span = _span([r.sqnr for r in group if r.sqnr is not None])
            found.append(Row(name, len(group), shape, scheme, method, kernel, reason, before, after, span))
    return found


def _span(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = decibel(min(values)), decibel(max(values))
    return low if low == high else f"{low.removesuffix(' dB')}..{high}"


@dataclass(frozen=True)
class KernelRow:
    """Sites that one kernel runs, for the same reason: why no better kernel does."""

    kernel: str
    count: int
    bytes: int
    refusals: str


def kernel_rows(results: Sequence[SiteResult]) -> list[KernelRow]:
    """The kernels that were chosen, and why better ones were refused, most bytes first."""
    alike: dict[tuple[str, str], list[int]] = defaultdict(list)
    for result in results:
        if result.planned.kernel:
            alike[result.planned.kernel, result.planned.refusals].append(result.bytes_after)
    found = [KernelRow(kernel, len(own), sum(own), why) for (kernel, why), own in alike.items()]
    return sorted(found, key=lambda row: -row.bytes)


def site_cells(result: SiteResult) -> dict[str, str]:
    """Column title → text of one site."""
    planned, site = result.planned, result.planned.site
    return {
        "Site": site.name,
        "Shape": str(list(site.shape)),
        "Scheme": str(planned.scheme) if planned.scheme else "float",
        "Kernel": planned.kernel,
        "Bytes": f"{size(site.float_bytes)} → {size(result.bytes_after)}",
        "Signal to noise": decibel(result.sqnr) if result.sqnr is not None else "",
    }


def memory_lines(moments: Sequence[Moment]) -> list[str]:
    """Where the memory of the process began, what it was at most, and how it ended."""
    if not moments:
        return []
    first, last, most = moments[0], moments[-1], max(moments, key=lambda moment: moment.resident_bytes)
    return [
        f"{size(first.resident_bytes)} at the start, at most {size(most.resident_bytes)} ({most.what}), "
        f"{size(last.resident_bytes)} at the end"
    ]


def decibel(value: float) -> str:
    """A signal-to-noise ratio in words: "19.8 dB", or "exact" for an infinite one."""
    return "exact" if value == math.inf else f"{value:.1f} dB"


def _planned(plan: Plan) -> tuple[SiteResult, ...]:
    return tuple(SiteResult(planned, planned.bytes_after) for planned in plan)


def bytes_after(report: Report) -> int:
    """Bytes of the quantized model: every site as it became, and what belongs to no site."""
    return report.plan.other_bytes + sum(result.bytes_after for result in report.sites)


def all_notes(report: Report) -> tuple[str, ...]:
    """Notes of the plan and of the report, each once."""
    return tuple(dict.fromkeys((*report.plan.notes, *report.notes)))


def _site_tables(results: Sequence[SiteResult]) -> list[str]:
    merged = rows(results)
    quantized = [row for row in merged if row.scheme]
    marks, notes = footnotes(quantized)
    lines = _table(
        ["quantized", "sites", "shape", "scheme", "method", "kernel", "bytes", "", "", "error", "why"],
        [
            [r.name, str(r.count), r.shape, r.scheme, r.method, r.kernel,
             size(r.bytes_before), "→", size(r.bytes_after), r.sqnr, mark]
            for r, mark in zip(quantized, marks, strict=True)
        ],
        right={1, 6, 8, 9},
    )  # fmt: skip
    if notes:
        lines += [*notes, ""]
    lines += _table(
        ["float", "sites", "shape", "bytes", "why"],
        [[r.name, str(r.count), r.shape, size(r.bytes_after), r.reason] for r in merged if not r.scheme],
        right={1, 3},
    )
    return lines


def footnotes(quantized: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Reasons told once, below a table: a mark per row, and the notes. One reason for all rows needs no marks."""
    if len({row.reason for row in quantized}) < 2:
        only = quantized[0].reason if quantized else ""
        return [""] * len(quantized), [f"why: {only}"] if only not in ("", "default") else []
    reasons = [reason for reason in dict.fromkeys(row.reason for row in quantized) if reason]
    marks = [f"[{reasons.index(row.reason) + 1}]" if row.reason else "" for row in quantized]
    return marks, [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)]


def _table(headers: list[str], body: list[list[str]], right: set[int]) -> list[str]:
    """Aligned lines, without the columns that are empty throughout, then an empty line; nothing for no rows."""
    if not body:
        return []
    kept = [i for i in range(len(headers)) if any(row[i] for row in body)]
    widths = {i: max(len(row[i]) for row in [headers, *body]) for i in kept}
    lines = []
    for row in [headers, *body]:
        cells = [row[i].rjust(widths[i]) if i in right else row[i].ljust(widths[i]) for i in kept]
        lines.append("  ".join(cells).rstrip())
    return [*lines, ""]


def summary(report: Report) -> str:
    """A report in one line."""
    totals = "; ".join(_totals(report.plan, report.sites, bytes_after(report)))
    return f"{report.model} on {report.plan.device}: {totals}"


def _totals(plan: Plan, results: Sequence[SiteResult], after: int) -> list[str]:
    line = f"{len(plan.quantized)} of {len(plan)} sites quantized, {size(plan.bytes_before)} → {size(after)}"
    if plan.bytes_before:
        line += f" ({after / plan.bytes_before:.0%} of the float model)"
    worst = largest_error(results)
    return [line, f"largest error: {worst}"] if worst else [line]


def largest_error(results: Sequence[SiteResult]) -> str:
    """Where the signal-to-noise ratio is lowest, and what it is; "" if nothing was measured."""
    known = [(result.sqnr, result.planned.site.name) for result in results if result.sqnr is not None]
    if not known:
        return ""
    sqnr, name = min(known)
    return f"{decibel(sqnr)} at {name}"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", title, *(f"  {line}" for line in lines)] if lines else []


def _pass_lines(record: PassRecord) -> list[str]:
    lines = [f"{record.name}: {pass_summary(record)}"]
    return lines + [f"  not matched {line}" for line in refusals(record)]


def pass_summary(record: PassRecord) -> str:
    """What one pass did, in one line: matches, nodes before and after, numerics."""
    matches = f"{record.matches} match" + ("" if record.matches == 1 else "es")
    return f"{matches}, {record.nodes_before} → {record.nodes_after} nodes, {record.numerics}"


def refusals(record: PassRecord) -> list[str]:
    """One line per reason: how often, why, and one node as an example."""
    counts = Counter(reason for _, reason in record.rejected)
    example = {reason: node for node, reason in reversed(record.rejected)}
    return [f"{count}×: {reason} (at {example[reason]})" for reason, count in counts.most_common()]


def _graph_lines(graph: GraphRecord) -> list[str]:
    lines = [f"{graph.inputs}: {graph_summary(graph)}"]
    return lines + [f"  {line}" for record in graph.passes for line in _pass_lines(record)]


def graph_summary(graph: GraphRecord) -> str:
    """What one compilation was, in one line: nodes, regions compiled and reused, seconds."""
    regions = ""
    if graph.regions:
        reused = graph.regions - graph.compiled_regions
        regions = f"{graph.regions} regions ({graph.compiled_regions} compiled, {reused} reused), "
    return f"{graph.nodes} nodes, {regions}{graph.seconds:.1f} s"


def _facts(plan: Plan, results: Sequence[SiteResult], after: int) -> dict[str, Any]:
    return {
        "device": plan.device,
        "sites_quantized": len(plan.quantized),
        "sites_total": len(plan),
        "bytes_before": plan.bytes_before,
        "bytes_after": after,
        "sites": [_site_dict(result) for result in results],
    }


def _site_dict(result: SiteResult) -> dict[str, Any]:
    planned, site = result.planned, result.planned.site
    return {
        "name": site.name,
        "role": site.role,
        "shape": [site.out_features, site.in_features],
        "dtype": str(site.dtype).removeprefix("torch."),
        "scheme": str(planned.scheme) if planned.scheme else None,
        "method": planned.method or None,
        "kernel": planned.kernel or None,
        "kernels_refused": planned.refusals or None,
        "reason": planned.reason or site.obstacle,
        "tied_to": site.tied_to or None,
        "bytes_before": site.float_bytes,
        "bytes_after": result.bytes_after,
        "sqnr_db": result.sqnr if result.sqnr is not None and math.isfinite(result.sqnr) else None,
        "exact": result.sqnr == math.inf,
    }


def _pass_dict(record: PassRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "numerics": record.numerics,
        "matches": record.matches,
        "nodes_before": record.nodes_before,
        "nodes_after": record.nodes_after,
        "rejected": [{"node": node, "reason": reason} for node, reason in record.rejected],
    }
