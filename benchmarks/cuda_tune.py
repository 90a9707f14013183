"""Measures tiles for the shapes of common models on this GPU, and writes the table that the package ships for it.

    python benchmarks/cuda_tune.py                          # goes on where it was stopped, until all is measured
    python benchmarks/cuda_tune.py --seconds 540            # the most common shapes and numbers of rows come first
    python benchmarks/cuda_tune.py --device cpu             # a dry run without a GPU, whose times mean nothing

Written after each product, to ``qcompile/backends/cuda/tuned/``. ``mode="max-autotune"`` measures any other shape.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from cuda_common import Clock, arguments

from qcompile.backends.cuda import tables, tuning
from qcompile.backends.cuda.layouts import ROWS, round_up
from qcompile.backends.cuda.targets import Target, attached
from qcompile.backends.cuda.tiles import Weight

DENSE = {  # hidden and intermediate size, channels of q and of k or v: the config.json of each
    "Qwen3-0.6B": (1024, 3072, 2048, 1024),
    "Qwen3-1.7B": (2048, 6144, 2048, 1024),
    "Qwen3-4B": (2560, 9728, 4096, 1024),
    "Qwen3-8B": (4096, 12288, 4096, 1024),
    "Qwen3-14B": (5120, 17408, 5120, 1024),
    "Qwen3-32B": (5120, 25600, 8192, 1024),
    "Llama-3-8B": (4096, 14336, 4096, 1024),
    "Llama-3-70B": (8192, 28672, 8192, 1024),
    "Qwen3-30B-A3B": (2048, 0, 4096, 512),
    "Qwen3-235B-A22B": (4096, 0, 8192, 512),
}
EXPERTS = {  # experts, hidden and intermediate size
    "Qwen3-30B-A3B": (128, 2048, 768),
    "Qwen3-235B-A22B": (128, 4096, 1536),
    "Mixtral-8x7B": (8, 4096, 14336),
}
HEADS = {151936: (1024, 2048, 2560, 4096, 5120), 128256: (4096, 8192)}  # lm_head: vocabulary, hidden sizes
WIDE = ((6144, 4096), (24576, 4096), (8192, 8192))  # of cuda_linear.py: q, k and v in one; gate and up in one
KINDS = {"w4a16_g128": ("w4a16", 128), "w8a16": ("w8a16", 0), "w8a8": ("int8", 0), "wfp8afp8": ("fp8", 0)}
TOKENS = (1, 16, 64, 4, 32, 128, 256, 8, 512, 2, 1024, 4096, 2048, 8192)  # in the order in which they are measured
SLOTS = 8  # experts of a token


def linears() -> list[tuple[int, int]]:
    """(out, in) of the Linears of all models, each once."""
    found = []
    for hidden, intermediate, q, kv in DENSE.values():
        found += [(q, hidden), (kv, hidden), (hidden, q)]
        found += [(intermediate, hidden), (hidden, intermediate)] if intermediate else []
    return list(dict.fromkeys([*found, *WIDE]))


def products(target: Target) -> Iterator[tuple[Weight, int]]:
    """Weights and numbers of rows (of experts: of (token, slot) pairs), the most common first."""
    for tokens in TOKENS:
        for kind, group in KINDS.values():
            if kind == "fp8" and not target.has_fp8:
                continue
            for out, inn in linears():
                yield Weight(kind, out, inn, group=group), tokens
            for experts, hidden, inner in EXPERTS.values() if tokens <= 1024 else ():
                yield Weight(kind, round_up(2 * inner, ROWS), hidden, experts, group, "gate_up"), SLOTS * tokens
                yield Weight(kind, round_up(hidden, ROWS), inner, experts, group, "down"), SLOTS * tokens
            if kind == "w8a16":
                for vocabulary, sizes in HEADS.items():
                    yield from ((Weight(kind, vocabulary, hidden), tokens) for hidden in sizes)


def dry_products() -> Iterator[tuple[Weight, int]]:
    """Small ones of each kind."""
    for kind, group in KINDS.values():
        yield Weight(kind, 128, 256, group=group), 2
        yield Weight(kind, 128, 256, 8, group, "gate_up"), 2


def main() -> None:
    chosen = arguments(__doc__.splitlines()[0])
    clock, dry = Clock(chosen.device, chosen.seconds), chosen.device == "cpu"
    target = Target(device="cpu (a dry run)") if dry else attached()
    path = chosen.out or (None if dry else tables.shipped_path(target))
    table = (tables.read(path) if path else None) or tables.Table.of(target)
    timer = clock.time if dry else tuning.microseconds
    wanted = [one for one in (dry_products() if dry else products(target)) if tuning.is_measured(*one)]
    missing = [(weight, rows) for weight, rows in wanted if weight.key(rows) not in table.tiles]
    print(f"{target.device} {target.name}: {len(missing)} of {len(wanted)} products are to be measured")
    for count, (weight, rows) in enumerate(missing):
        if clock.is_over:
            print(f"{len(missing) - count} are left: run it again")
            return
        key = weight.key(rows)
        try:
            with torch.no_grad():
                found = tuning.measure(weight, rows, target, chosen.device, timer)
        except Exception as error:  # of Triton, or there is no room
            print(f"{key}: {type(error).__name__} {str(error)[:200]}", file=sys.stderr)
            continue
        print(f"{key}: {found}", flush=True)
        if path:
            tables.merge(path, target, {key: found.entry()})


if __name__ == "__main__":
    main()
