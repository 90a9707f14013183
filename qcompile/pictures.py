"""What the pictures of a report show, as plain data for its template: maps of layers × sites, bars, a line.

Every picture carries its facts as text, too: each cell a title, each strip a summary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from .reporting import bytes_after
from .tables import NUMBER, decibel, number_runs, size
from .types import FrontierPoint, Moment, Report, SiteResult

Cell = dict[str, str]  # kind: a CSS class, text: the same in words
_STEPS = 5  # shades of a map


def coverage_map(results: Sequence[SiteResult], schemes: Sequence[str]) -> list[dict[str, Any]]:
    """Per cell the scheme's number, "float", "mixed" or "none"."""

    def cell(here: Sequence[SiteResult]) -> Cell:
        names = sorted({str(r.planned.scheme) if r.planned.scheme else "float" for r in here})
        if not names:
            return {"kind": "none", "text": "no such site"}
        if len(names) > 1:
            return {"kind": "mixed", "text": " and ".join(names)}
        return {"kind": "float" if names == ["float"] else f"scheme-{schemes.index(names[0]) % 6}", "text": names[0]}

    return _site_map(results, cell)


def error_map(results: Sequence[SiteResult]) -> tuple[list[dict[str, Any]], list[Cell]]:
    """Per cell the lowest signal-to-noise ratio, in shades between the extremes; and their legend."""
    known = sorted({r.sqnr for r in results if r.sqnr is not None and math.isfinite(r.sqnr)})
    if len(known) < 2:
        return [], []
    low, high = known[0], known[-1]

    def cell(here: Sequence[SiteResult]) -> Cell:
        values = [r.sqnr for r in here if r.sqnr is not None]
        if not values:
            return {"kind": "float", "text": "float"} if here else {"kind": "none", "text": "no such site"}
        worst = min(values)
        shade = min(_STEPS - 1, int(_STEPS * (worst - low) / (high - low))) if math.isfinite(worst) else _STEPS - 1
        return {"kind": f"heat-{shade}", "text": decibel(worst)}

    measured = [r for r in results if r.sqnr is not None]
    width = (high - low) / _STEPS
    legend = [
        {"kind": f"heat-{i}", "text": f"{low + i * width:.1f} to {low + (i + 1) * width:.1f} dB"} for i in range(_STEPS)
    ]
    return _site_map(measured, cell), legend


def sensitivity_map(report: Report) -> tuple[list[dict[str, Any]], list[Cell]]:
    """Per cell what the site costs at its fewest bits, in shades of its logarithm; and their legend."""
    costs = {own.site: own.divergences for own in report.sensitivity}
    measured = [r for r in report.sites if r.planned.site.name in costs]
    known = sorted({cost for own in costs.values() if (cost := own[0][1]) > 0})
    if not known:
        return [], []
    span = math.log(known[-1] / known[0]) or 1.0

    def cell(here: Sequence[SiteResult]) -> Cell:
        if not here:
            return {"kind": "none", "text": "no such site"}
        worst = max(here, key=lambda r: costs[r.planned.site.name][0][1])
        scheme, cost = costs[worst.planned.site.name][0]
        depth = math.log(known[-1] / max(cost, known[0])) / span
        chosen = "" if worst.planned.scheme is None else f", became {worst.planned.scheme}"
        return {
            "kind": f"heat-{min(_STEPS - 1, int(_STEPS * depth))}",
            "text": f"{cost:.2g} at {scheme}{chosen}",
        }

    edges = [known[-1] * math.exp(-span * i / _STEPS) for i in range(_STEPS + 1)]
    legend = [{"kind": f"heat-{i}", "text": f"{edges[i]:.2g} to {edges[i + 1]:.2g}"} for i in range(_STEPS)]
    return _site_map(measured, cell), legend


def frontier_plot(frontier: Sequence[FrontierPoint]) -> dict[str, Any] | None:
    """The plot of divergence (logarithmic) against bits per weight, in percent of its box; None for less than a line.

    Bits and not bytes, because a kernel may store 2 bits in the space of 4.
    """
    floor = min((point.divergence for point in frontier if point.divergence > 0), default=0.0)
    if not floor or frontier[-1].bits <= frontier[0].bits:
        return None
    low, high = math.floor(math.log10(floor)), math.ceil(math.log10(frontier[0].divergence))
    high = max(high, low + 1)
    fewest, most = frontier[0].bits, frontier[-1].bits

    def place(point: FrontierPoint) -> dict[str, Any]:
        height = (math.log10(max(point.divergence, floor)) - low) / (high - low)
        x = 100 * (point.bits - fewest) / (most - fewest)
        text = f"{point.bits:.2f} bits per weight, {size(point.nbytes)}: divergence {point.divergence:.2g}"
        return {"x": round(x, 2), "y": round(100 * (1 - height), 2), "text": text}

    points = [place(point) for point in frontier]
    step = max(1, math.ceil((high - low) / 6))  # decades between lines
    return {
        "line": " ".join(f"{point['x']},{point['y']}" for point in points),
        "chosen": next((place(point) for point in frontier if point.chosen), None),
        "first": points[0],
        "last": points[-1],
        "x_ticks": [
            {"at": round(100 * (bits - fewest) / (most - fewest), 2), "text": f"{bits} bits"}
            for bits in range(math.ceil(fewest), math.floor(most) + 1)
        ],
        "y_ticks": [
            {"at": round(100 * (high - power) / (high - low), 2), "text": f"{10.0**power:g}"}
            for power in range(low, high + 1, step)
        ],
    }


def expert_map(expert_tokens: Sequence[tuple[str, Sequence[int]]]) -> list[dict[str, Any]]:
    """One strip per site of experts, a cell per expert, shaded by the tokens it saw (to the power of one half)."""
    strips = []
    for name, tokens in expert_tokens:
        most = max(tokens, default=0) or 1
        cells = [
            {
                "kind": f"tokens-{math.ceil((_STEPS - 1) * math.sqrt(count / most))}",
                "text": f"expert {expert}: {count} tokens",
            }
            for expert, count in enumerate(tokens)
        ]
        unseen = sum(not count for count in tokens)
        summary = f"{min(tokens)} to {max(tokens)} tokens" + (f", {unseen} saw none" if unseen else "")
        strips.append({"label": name, "cells": cells, "summary": summary})
    return strips


def byte_bars(report: Report, schemes: Sequence[str]) -> list[dict[str, Any]]:
    """Two bars on one scale, before and after: what is to be quantized by scheme, other sites, and the rest."""
    before, after = report.plan.bytes_before, bytes_after(report)
    if not before:
        return []
    bars = []
    for label, total, own in (
        ("before", before, [r.planned.site.float_bytes for r in report.sites]),
        ("after", after, [r.bytes_after for r in report.sites]),
    ):
        sums: dict[str, int] = defaultdict(int)
        for result, count in zip(report.sites, own, strict=True):
            sums[str(result.planned.scheme or "")] += count
        parts = [(f"scheme-{i % 6}", scheme, sums[scheme]) for i, scheme in enumerate(schemes)]
        parts += [
            ("float", "sites that stay float", sums[""]),
            ("rest", "embeddings, norms, the rest", report.plan.other_bytes),
        ]
        bars.append(
            {
                "label": label,
                "total": total,
                "parts": [
                    {
                        "kind": kind,
                        "text": f"{what}: {size(count)}",
                        "percent": round(100 * count / max(before, after), 2),
                    }
                    for kind, what, count in parts
                    if count
                ],
            }
        )
    return bars


def memory_line(moments: Sequence[Moment], width: int = 640, height: int = 120) -> dict[str, Any] | None:
    """Points of a line in a box of ``width`` × ``height``, from zero to the most; None for fewer than two."""
    if len(moments) < 2:
        return None
    most = max(moments, key=lambda moment: moment.resident_bytes)
    duration = moments[-1].seconds - moments[0].seconds or 1.0

    def point(moment: Moment) -> str:
        x = (moment.seconds - moments[0].seconds) / duration * width
        return f"{x:.1f},{height * (1 - moment.resident_bytes / most.resident_bytes):.1f}"

    points = [point(moment) for moment in moments]
    return {
        "width": width,
        "height": height,
        "line": " ".join(points),
        "area": " ".join([f"0,{height}", *points, f"{width},{height}"]),
        "most": most,
        "peak": point(most).split(","),
        "first": moments[0],
        "last": moments[-1],
    }


def _site_map(results: Sequence[SiteResult], cell: Callable[[Sequence[SiteResult]], Cell]) -> list[dict[str, Any]]:
    """The map of layers (columns) × sites (rows).

    The first number of a name is its layer; what else is counted (experts) falls into one cell.
    """
    strips: dict[str, dict[int | None, list[SiteResult]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        name = result.planned.site.name
        first = NUMBER.search(name)
        label = name if first is None else f"{name[: first.start()]}#{NUMBER.sub('*', name[first.end() :])}"
        strips[label][int(first.group()) if first else None].append(result)
    layers = sorted({layer for cells in strips.values() for layer in cells if layer is not None})
    drawn = []
    for label, cells in strips.items():
        columns = [None] if None in cells else layers
        own = [(column, cell(cells.get(column, []))) for column in columns]
        where: dict[str, list[int]] = defaultdict(list)
        for column, made in own:
            if column is not None:
                where[made["text"]].append(column)
        summary = "; ".join(f"layers {number_runs(at).strip('{}')}: {text}" for text, at in where.items())
        titled = [
            {"kind": made["kind"], "text": made["text"] if column is None else f"layer {column}: {made['text']}"}
            for column, made in own
        ]
        drawn.append({"label": label, "cells": titled, "summary": summary or own[0][1]["text"]})
    return drawn
