"""Sites as rows of a table: those that differ only in the numbers of their names are one row.

A model of 94 layers has 658 sites and about eight different ones: ``model.layers.{0..93}.self_attn.q_proj``.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .types import SiteResult

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole component of a dotted name: 3 in layers.3, not 1 in fc1
_SHOWN_RUNS = 6


def size(count: float) -> str:
    """Bytes for people: 812 B, 3.1 MB, 12.4 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def decibel(value: float) -> str:
    """A signal-to-noise ratio in words: "19.8 dB", or "exact" for an infinite one."""
    return "exact" if value == math.inf else f"{value:.1f} dB"


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


def footnotes(quantized: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Reasons told once, below a table: a mark per row, and the notes. One reason for all rows needs no marks."""
    if len({row.reason for row in quantized}) < 2:
        only = quantized[0].reason if quantized else ""
        return [""] * len(quantized), [f"why: {only}"] if only not in ("", "default") else []
    reasons = [reason for reason in dict.fromkeys(row.reason for row in quantized) if reason]
    marks = [f"[{reasons.index(row.reason) + 1}]" if row.reason else "" for row in quantized]
    return marks, [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)]
