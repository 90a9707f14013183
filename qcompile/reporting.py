"""The facts of a plan or a report as text, as plain data and as one HTML page.

In text, sites that differ only in the numbers of their names are one row. The plain data always has every site.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .tables import decibel, footnotes, rows, size
from .types import FrontierPoint, GraphRecord, Moment, PassRecord, Plan, Report, SiteResult

_SHOWN_POINTS = 9  # of a frontier
_SHOWN_SITES = 5  # that cost the most


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
    lines += _section("budget", _budget_lines(report))
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
        "sensitivity": {own.site: dict(own.divergences) for own in report.sensitivity},
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


def memory_lines(moments: Sequence[Moment]) -> list[str]:
    """Where the memory of the process began, what it was at most, and how it ended."""
    if not moments:
        return []
    first, last, most = moments[0], moments[-1], max(moments, key=lambda moment: moment.resident_bytes)
    return [
        f"{size(first.resident_bytes)} at the start, at most {size(most.resident_bytes)} ({most.what}), "
        f"{size(last.resident_bytes)} at the end"
    ]


def shown_points(frontier: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """Some points of a frontier, evenly spread: the first, the chosen and the last one among them."""
    count = len(frontier)
    spread = {round(i * (count - 1) / (_SHOWN_POINTS - 2)) for i in range(_SHOWN_POINTS - 1)} if count else set()
    return [point for index, point in enumerate(frontier) if index in spread or point.chosen]


def most_sensitive(report: Report) -> list[tuple[str, str, float]]:
    """The sites that cost the most at their fewest bits, most first: site, that scheme, divergence."""
    worst = sorted(report.sensitivity, key=lambda own: -own.divergences[0][1])
    return [(own.site, *own.divergences[0]) for own in worst[:_SHOWN_SITES]]


def _budget_lines(report: Report) -> list[str]:
    """What other sizes would have cost, and the sites that decide it."""
    if not report.frontier:
        return []
    lines = ["predicted divergence of plans from the fewest to the most bits per weight:"]
    body = [
        [f"{point.bits:.2f} bits", size(point.nbytes), f"{point.divergence:.2g}", "← chosen" if point.chosen else ""]
        for point in shown_points(report.frontier)
    ]
    lines += _table(["bits", "size", "divergence", ""], body, right={0, 1, 2})
    costs = _table(
        ["most sensitive", "alone at", "divergence"],
        [[name, scheme, f"{divergence:.2g}"] for name, scheme, divergence in most_sensitive(report)],
        right={2},
    )
    return [*lines, *costs[:-1]]


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
    return ["", title, *(f"  {line}".rstrip() for line in lines)] if lines else []


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
        "shape": list(site.shape),
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
