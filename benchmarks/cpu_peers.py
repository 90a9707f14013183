"""One Linear on the CPU: ours against bfloat16 and against other projects' kernels, compiled where they can be.

    pip install onnxruntime onnx openvino torchao          # in an environment of its own, with qcompile
    python benchmarks/cpu_peers.py --json
    python benchmarks/cpu_peers.py --sizes 2048x2048 12288x4096 --rows 1 256

Sizes are in x out. All run in one process; rounds are interleaved, with weights that no cache holds: each call takes
another copy of the weight. A peer that is not installed or fails is printed with the reason and left out. The last
column is the part of the measured memory bandwidth that reading the weight takes at one row: the limit is 1. w8a8 takes
float activations here and quantizes them, as a model does.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cpu_common import cpu_name
from cpu_peer_ops import PEERS
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import qcompile
from qcompile import numerics
from qcompile.backends.cpu import BACKEND, native
from qcompile.types import Scheme

LEAST_COLD, MOST_COLD = 64 << 20, 128 << 20  # bytes of the copies of a weight that are read in turn
MOST_COPIES = 16  # each is a session with threads of its own for some peers, which more of them slow down
L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
OUTLIER = 0.2  # relative error of a peer's product above which it computes something else


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", default=["2048x2048", "2048x6144", "4096x4096", "4096x12288", "12288x4096"]
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 64, 256, 1024])
    parser.add_argument("--schemes", nargs="+", default=[*PEERS])
    parser.add_argument("--seconds", type=float, default=0.5, help="of each variant, size and number of rows")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end")
    return parser.parse_args()


def bandwidth() -> float:
    """Bytes per second that all threads together read from memory, at best."""
    buffer = torch.zeros(512 << 20, dtype=torch.uint8).view(torch.float32)
    seconds = []
    for _ in range(12):
        started = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - started)
    return buffer.nbytes / min(seconds)


def cold_copies(nbytes: int) -> int:
    """How many copies of a weight are twice what the last cache holds, as far as the limits above allow."""
    cache = int(L3.read_text().strip().removesuffix("K")) << 10 if L3.exists() else 0
    return max(2, min(MOST_COPIES, -(-min(max(2 * cache, LEAST_COLD), MOST_COLD) // nbytes)))


def ours(scheme: Scheme, packed, copies: int) -> Callable[[Tensor], Tensor]:
    """Our kernel on some copies in turn."""
    kernel, out = BACKEND.kernel("native"), packed.shape[0]
    quantize = torch.compile(lambda x: numerics.quantize_activation(x, scheme.activation), dynamic=True)

    def product() -> Callable[[Tensor], Tensor]:
        weight = kernel.prepare(packed)
        if scheme.activation is None:
            return lambda x: kernel.linear(x, weight, None, scheme, out)
        return lambda x: kernel.scaled_linear(quantize(x), weight, None, scheme, out, x.dtype)

    return in_turn(product, copies)


def in_turn(make: Callable[[], Callable[[Tensor], Tensor]], copies: int) -> Callable[[Tensor], Tensor]:
    """The same product made several times, called in turn."""
    functions = itertools.cycle([make() for _ in range(copies)])
    return lambda x: next(functions)(x)


class Case:
    """All variants of one size."""

    def __init__(self, size: str, chosen: argparse.Namespace) -> None:
        self.inn, self.out = map(int, size.split("x"))
        self.missing: dict[str, str] = {}
        self.bytes: dict[str, int] = {}
        torch.manual_seed(0)
        weight = (torch.randn(self.out, self.inn) * 0.02).bfloat16()
        plain = in_turn(lambda: functools.partial(F.linear, weight=weight.clone()), cold_copies(weight.nbytes))
        self.variants: dict[str, Callable[[Tensor], Tensor]] = {"bfloat16": plain}
        self.bytes["bfloat16"] = weight.nbytes
        for name in chosen.schemes:
            scheme = Scheme.parse(name)
            packed = numerics.quantize_weight(weight, scheme)
            self.bytes[name] = sum(t.nbytes for t in BACKEND.kernel("native").prepare(packed))
            copies = cold_copies(self.bytes[name])
            self.variants[name] = ours(scheme, packed, copies)
            for peer, make in {} if chosen.no_peers else PEERS.get(name, {}).items():
                self._add(f"{name} {peer}", make, packed, scheme, copies)

    def _add(self, name: str, make: Callable, packed, scheme: Scheme, copies: int) -> None:
        codes = numerics.unpack_codes(packed.codes, scheme.weight.bits, self.inn)
        codes = codes if scheme.weight.bits == 4 else (codes ^ 0x80).view(torch.int8)
        exact = numerics.dequantize_packed(packed)
        try:
            variant = in_turn(lambda: make(codes, packed.scales.float(), exact), copies)
            x = torch.randn(4, self.inn).bfloat16()
            expected = x.float() @ exact.float().t()
            error = ((variant(x).float() - expected).norm() / expected.norm()).item()
            if not error < OUTLIER:
                raise ValueError(f"its product differs by {error:.2g}")
            self.variants[name] = variant
        except Exception as error:  # whatever a peer raises, the others are measured
            self.missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"

    @torch.no_grad()
    def measure(self, rows: int, seconds: float) -> dict[str, float]:
        """Median seconds of a call of each variant."""
        x = torch.randn(rows, self.inn).bfloat16()
        taken: dict[str, list[float]] = {name: [] for name in self.variants}
        for name, variant in self.variants.items():
            if (shape := tuple(variant(x).shape)) != (rows, self.out):
                raise RuntimeError(f"{name} computed {shape} of {rows} rows and {self.out} channels")
        end = time.perf_counter() + seconds * len(taken)
        while time.perf_counter() < end or len(taken["bfloat16"]) < 15:
            for name, variant in self.variants.items():
                warm = time.perf_counter() + 0.005  # threads of the one before may still spin
                while time.perf_counter() < warm:
                    variant(x)
                for _ in range(4):
                    started = time.perf_counter()
                    variant(x)
                    taken[name].append(time.perf_counter() - started)
        return {name: statistics.median(values) for name, values in taken.items()}


def versions() -> dict[str, str]:
    """Of everything that is compared."""
    found = {"qcompile": qcompile.__version__, "torch": torch.__version__}
    for name in ("onnxruntime", "openvino", "torchao"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    # one function is compiled for all weights of a peer: past the limit it would silently run uncompiled
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
    limit = bandwidth()
    console = Console(width=120)
    console.print(f"{cpu_name()}, {chosen.threads} threads, {limit / 1e9:.1f} GB/s; {versions()}")
    ratios, microseconds, missing, shares = {}, {}, {}, {}
    for size in chosen.sizes:
        case = Case(size, chosen)
        missing |= case.missing
        table = Table(title=f"{size}: times as fast as bfloat16")
        for column in ("variant", *map(str, chosen.rows), "bandwidth"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        taken = {rows: case.measure(rows, chosen.seconds) for rows in chosen.rows}
        for name in case.variants:
            base = name == "bfloat16"
            values = [seconds["bfloat16"] / seconds[name] for seconds in taken.values()]
            cells = [
                f"{s[name] * 1e6:.0f} us" if base else f"{v:.2f}" for s, v in zip(taken.values(), values, strict=True)
            ]
            share = case.bytes[name] / taken[1][name] / limit if 1 in taken and name in case.bytes else None
            table.add_row(name, *cells, "" if share is None else f"{share:.2f}")
            if share is not None:
                shares[f"{name}_{size}"] = share
            if not base:
                key = name if name in chosen.schemes else f"peer {name}"
                ratios |= {f"{key}_{size}_{rows}": v for rows, v in zip(taken, values, strict=True)}
        for rows, seconds in taken.items():
            microseconds[f"{size}_{rows}"] = {name: round(value * 1e6, 1) for name, value in seconds.items()}
        console.print(table)
        del case
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if chosen.json:
        facts = {
            "machine": cpu_name(),
            "threads": chosen.threads,
            "instruction_set": native.instruction_set(),
            "versions": versions(),
            "bandwidth_GBps": limit / 1e9,
            "microseconds": microseconds,
            "share_of_bandwidth": shares,
            "left_out": missing,
            "ratios": ratios,
        }
        print(json.dumps(facts))


if __name__ == "__main__":
    main()
