"""Reports as one HTML page: self-contained, offline, light and dark, readable on a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import pictures
from .reporting import (
    all_notes,
    bytes_after,
    graph_summary,
    largest_error,
    most_sensitive,
    pass_summary,
    refusals,
    shown_points,
)
from .tables import footnotes, kernel_rows, rows, site_cells, size
from .types import Report, Scheme


def html_page(
    title: str,
    reports: Sequence[Report],
    comparison: Sequence[Mapping[str, str]] = (),
    *,
    lead: str = "",
    page: bool = True,
) -> str:
    """Several reports on one page, after a table that compares them (rows of column title → text)."""
    import jinja2  # only HTML needs it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["size"] = size
    sections = [_html_section(report) for report in reports]
    return environment.get_template("report.html").render(
        title=title, lead=lead, comparison=list(comparison), sections=sections, page=page
    )


def _html_section(report: Report) -> dict[str, Any]:
    """What the template shows of one report."""
    plan = report.plan
    merged = rows(report.sites)
    quantized = [row for row in merged if row.scheme]
    marks, notes = footnotes(quantized)
    schemes = sorted({row.scheme for row in quantized}, key=lambda name: (Scheme.parse(name).weight.bits, name))
    coverage = pictures.coverage_map(report.sites, schemes)
    errors, error_legend = pictures.error_map(report.sites)
    costs, cost_legend = pictures.sensitivity_map(report)
    passes = [("quantization", record) for record in report.passes]
    passes += [(graph.inputs, record) for graph in report.graphs for record in graph.passes]
    return {
        "model": report.model,
        "device": plan.device,
        "schemes": schemes,
        "seconds": f"{report.seconds:.1f} s" if report.seconds else "",
        "quantized": len(plan.quantized),
        "total": len(plan),
        "before": plan.bytes_before,
        "after": bytes_after(report),
        "worst": largest_error(report.sites),
        "rows": list(zip(quantized, marks, strict=True)),
        "footnotes": notes,
        "float_rows": [row for row in merged if not row.scheme],
        "coverage": coverage,
        "mixed": any(cell["kind"] == "mixed" for strip in coverage for cell in strip["cells"]),
        "bars": pictures.byte_bars(report, schemes),
        "errors": errors,
        "error_legend": error_legend,
        "frontier": pictures.frontier_plot(report.frontier),
        "points": shown_points(report.frontier),
        "costs": costs,
        "cost_legend": cost_legend,
        "most_sensitive": most_sensitive(report),
        "experts": pictures.expert_map(report.expert_tokens),
        "memory": pictures.memory_line(report.memory),
        "kernels": kernel_rows(report.sites),
        "sites": [site_cells(result) for result in report.sites],
        "notes": all_notes(report),
        "passes": [
            {"where": where, "record": record, "summary": pass_summary(record), "refusals": refusals(record)}
            for where, record in passes
        ],
        "graphs": [{"inputs": graph.inputs, "summary": graph_summary(graph)} for graph in report.graphs],
    }
