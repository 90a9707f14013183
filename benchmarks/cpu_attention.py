"""Attention on the CPU: our kernel against ATen's, as a prompt or a token needs it.

    python benchmarks/cpu_attention.py --json

Query heads share the heads of a cache; the mask is causal, as transformers makes it for a static cache: added numbers.
Both run in one process, in turn; medians are reported, and errors against float64, over the largest value.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from cpu_common import cpu_name
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from qcompile.backends.cpu import native

# heads, heads of the cache, rows, positions before them, unused positions after them, width
CASES = [
    (16, 8, 1, 127, 40, 128), (16, 8, 4, 1020, 0, 128), (12, 12, 128, 0, 0, 64), (16, 8, 128, 0, 40, 128),
    (16, 8, 512, 0, 0, 128), (32, 8, 128, 1920, 0, 128), (16, 8, 2048, 0, 0, 128),
]  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def inputs(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the mask of a case."""
    heads, shared, rows, before, after, width = case
    positions = before + rows + after
    torch.manual_seed(0)
    q = torch.randn(1, rows, heads, width).to(dtype).transpose(1, 2)
    k, v = (torch.randn(1, shared, positions, width).to(dtype) for _ in range(2))
    hidden = torch.full((rows, positions), -torch.inf).triu(before + 1)
    return q, k, v, hidden.to(dtype)[None, None]


def measure(case: tuple[int, ...], dtype: torch.dtype, seconds: float) -> dict[str, tuple[float, float]]:
    """Median seconds and error, of ours and of ATen's."""
    q, k, v, mask = inputs(case, dtype)
    scale = q.shape[3] ** -0.5
    variants = {
        "ours": lambda: torch.ops.qcompile_cpu.attend(q, k, v, mask, scale, False),
        "ATen": lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
    }
    exact = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v, mask)), enable_gqa=True)
    errors = {name: ((run() - exact).abs().max() / exact.abs().max()).item() for name, run in variants.items()}
    taken: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken["ours"]) < 5:
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - started)
    return {name: (statistics.median(taken[name]), errors[name]) for name in variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--seconds", type=float, default=0.5, help="of each case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if reason := native.unavailable():
        parser.error(f"our kernel is not there: {reason}")
    table = Table(title=f"attention, {cpu_name()}, {native.instruction_set()}, {chosen.threads} threads")
    for column in ("dtype", "heads", "rows", "positions", "width", "ours ms", "× ATen", "error", "ATen's"):
        table.add_column(column, justify="right")
    ratios, milliseconds = {}, {}
    for name in chosen.dtypes:
        for case in CASES:
            heads, shared, rows, before, after, width = case
            found = measure(case, DTYPES[name], chosen.seconds)
            (ours, error), (aten, error_of_aten) = found["ours"], found["ATen"]
            sizes = (f"{heads}/{shared}", f"{rows}", f"{before + rows}+{after}", f"{width}")
            table.add_row(
                name, *sizes, f"{ours * 1e3:.2f}", f"{aten / ours:.2f}", f"{error:.0e}", f"{error_of_aten:.0e}"
            )
            key = f"{name}_{heads}_{shared}_{rows}_{before + rows}_{width}"
            ratios[key], milliseconds[key] = aten / ours, ours * 1e3
    Console(width=120).print(table)
    if chosen.json:
        facts = {"machine": cpu_name(), "threads": chosen.threads, "instruction_set": native.instruction_set()}
        print(json.dumps(facts | {"torch": torch.__version__, "ours_ms": milliseconds, "ratios": ratios}))


if __name__ == "__main__":
    main()
