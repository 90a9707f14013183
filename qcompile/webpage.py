"""Reports as one HTML page: self-contained, offline, light and dark, readable on a phone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .reporting import (
    NUMBER,
    all_notes,
    bytes_after,
    footnotes,
    graph_summary,
    largest_error,
    number_runs,
    pass_summary,
    refusals,
    rows,
    size,
)
from .types import Report, SiteResult


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
    schemes = list(dict.fromkeys(row.scheme for row in quantized))
    coverage = _coverage(report.sites, schemes)
    passes = [("quantization", record) for record in report.passes]
    passes += [(graph.inputs, record) for graph in report.graphs for record in graph.passes]
    return {
        "model": report.model,
        "device": plan.device,
        "schemes": schemes,
        "seconds": f"{report.seconds:.1f} s",
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
        "notes": all_notes(report),
        "passes": [
            {"where": where, "record": record, "summary": pass_summary(record), "refusals": refusals(record)}
            for where, record in passes
        ],
        "graphs": [{"inputs": graph.inputs, "summary": graph_summary(graph)} for graph in report.graphs],
    }


def _coverage(results: Sequence[SiteResult], schemes: Sequence[str]) -> list[dict[str, Any]]:
    """The map of layers (columns) × sites (rows): per cell the scheme's number, "float", "mixed" or "none".

    The first number of a name is its layer; what else is counted (experts) falls into one cell.
    """
    strips: dict[str, dict[int | None, list[SiteResult]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        name = result.planned.site.name
        first = NUMBER.search(name)
        label = name if first is None else f"{name[: first.start()]}#{NUMBER.sub('*', name[first.end() :])}"
        strips[label][int(first.group()) if first else None].append(result)
    layers = sorted({layer for cells in strips.values() for layer in cells if layer is not None})
    coverage = []
    for label, cells in strips.items():
        columns = [None] if None in cells else layers
        drawn = [{"column": column, **_cell(cells.get(column, []), schemes)} for column in columns]
        where: dict[str, list[int]] = defaultdict(list)
        for cell in drawn:
            where[cell["text"]].append(cell["column"])
        if columns == [None]:
            summary = drawn[0]["text"]
        else:
            summary = "; ".join(f"layers {number_runs(at).strip('{}')}: {text}" for text, at in where.items())
        coverage.append({"label": label, "cells": drawn, "summary": summary})
    return coverage


def _cell(results: Sequence[SiteResult], schemes: Sequence[str]) -> dict[str, Any]:
    names = sorted({str(r.planned.scheme) if r.planned.scheme else "float" for r in results})
    if not names:
        return {"kind": "none", "text": "no such site"}
    if len(names) > 1:
        return {"kind": "mixed", "text": " and ".join(names)}
    return {"kind": "float" if names == ["float"] else f"scheme-{schemes.index(names[0]) % 6}", "text": names[0]}
