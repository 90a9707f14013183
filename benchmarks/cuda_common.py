"""What the benchmarks of CUDA kernels share: times in CUDA graphs, weights that no cache holds, a table that is kept.

Peers are whatever is installed, or (``--peers FOLDER``) the libraries that ``cuda_peers.sh`` put there. One that is
missing or fails is printed and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from qcompile.backends.cuda import tables
from qcompile.backends.cuda.targets import attached

L2_BYTES = 64 * 2**20  # of the largest GPU; weights are rotated until their sum is four times that


def arguments(description: str) -> argparse.Namespace:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda", help="cpu: a dry run on small shapes, whose times mean nothing")
    parser.add_argument("--out", type=Path, help="where to write JSON (default: results/<name>_<date>.json)")
    parser.add_argument("--seconds", type=float, default=540, help="stop after so long")
    parser.add_argument("--peers", type=Path, help="folder with libraries of peers (_C.so ...)")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu does a dry run")
    sys.path += [str(chosen.peers.resolve())] if chosen.peers else []
    for library in sorted(chosen.peers.glob("*.so")) if chosen.peers else []:
        try:
            torch.ops.load_library(str(library.resolve()))
        except OSError as error:
            print(f"{library}: {str(error)[:200]}", file=sys.stderr)
    return chosen


class Clock:
    """Microseconds of a call: the median over replays of a CUDA graph that calls every closure in turn."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.end = device, time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        """Whether the time that was given is spent."""
        return time.monotonic() > self.end

    def time(self, calls: Sequence[Callable[[], object]], replays: int = 12) -> float:
        """calls: the same work on different weights."""
        for call in calls:
            call()
        if self.device == "cpu":
            started = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - started) * 1e6 / len(calls)
        repeats = max(1, 48 // len(calls))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                for call in calls:
                    call()
        times = []
        for _ in range(replays):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            graph.replay()
            after.record()
            torch.cuda.synchronize()
            times.append(before.elapsed_time(after) * 1e3 / (repeats * len(calls)))
        return statistics.median(times)


def ceilings(clock: Clock) -> dict[str, float]:
    """What this GPU can do: reading and copying memory, a large product, an empty node of a graph."""
    if clock.device == "cpu":
        return {}
    data = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    other, floats = torch.empty_like(data), data.view(torch.float32).view(-1, 4096)
    square, one = torch.randn(8192, 8192, device="cuda").bfloat16(), torch.zeros(1, device="cuda")
    return {
        "copy_tb_s": 2 * data.numel() / clock.time([lambda: other.copy_(data)]) / 1e6,
        "read_tb_s": data.numel() / clock.time([lambda: torch.amax(floats, 1)]) / 1e6,
        "bf16_tflop_s": 2 * 8192**3 / clock.time([lambda: square @ square]) / 1e6,
        "empty_node_us": clock.time([lambda: one.add_(1)]),
    }


def inductor(function: Callable, inputs: Sequence[torch.Tensor]) -> Callable:
    """``function`` as a compiled graph has it: traced for these shapes, then Inductor."""
    from torch._inductor import compile as compile_graph
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        graph = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
        return compile_graph(graph, list(inputs))


class Compiled:
    """``function`` as a compiled graph has it, made once for inputs of the same shapes."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.graphs: dict[tuple, Callable] = {}

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        shapes = tuple(one.shape for one in inputs)
        if shapes not in self.graphs:
            self.graphs[shapes] = inductor(self.function, inputs)
        return self.graphs[shapes](*inputs)


@contextmanager
def launches_apart(device: str) -> Iterator[None]:
    """Within, none of our kernels starts before the one before it is complete."""
    if device == "cpu":
        yield
        return
    from qcompile.backends.cuda.device import launch

    launch.OVERLAP = False
    try:
        yield
    finally:
        launch.OVERLAP = True


def copies(nbytes: float) -> int:
    """How many weights of so many bytes no cache holds."""
    return max(2, int(4 * L2_BYTES / nbytes) + 1)


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """``|result - expected| / |expected|``, in float64."""
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def build(name: str, make: Callable, weights: Sequence[tuple]) -> list:
    """``make`` of each weight; none of them when that fails, which is printed."""
    try:
        return [make(*weight) for weight in weights]
    except Exception as reason:  # whatever another project raises
        print(f"{name} is left out: {type(reason).__name__} {str(reason)[:200]}", file=sys.stderr)
        return []


def measured(
    name: str, calls: Sequence[Callable[[], torch.Tensor]], expected: Sequence[torch.Tensor], clock: Clock,
    tolerance: float = 0.02,
) -> float | None:  # fmt: skip
    """Microseconds of a call; None where there is none, where one fails, or is wrong by more than ``tolerance``.

    expected: results of the first calls.
    """
    if not calls:
        return None
    try:
        for call, right in zip(calls, expected, strict=False):
            found = error(call(), right)
            assert found < tolerance, f"relative error {found:.3f}"
        return clock.time(calls)
    except Exception as reason:
        print(f"{name}: {type(reason).__name__} {str(reason)[:200]}", file=sys.stderr)
        return None


class Table:
    """Rows of a benchmark; written after each number, to another name first."""

    def __init__(self, name: str, chosen: argparse.Namespace, facts: dict) -> None:
        folder = Path(__file__).parent / "results"
        self.path = chosen.out or folder / f"{name}_{time.strftime('%Y-%m-%d')}.json"
        gpu = torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu (a dry run)"
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": gpu}
        versions["tuned_products"] = len(tables.keys(attached()))  # 0: tiles are those of the rules
        self.content: dict = {**versions, **facts, "rows": []}
        self.keep = chosen.device == "cuda" or chosen.out is not None

    def add(self, **row) -> dict:
        """Print and keep one row."""
        self.content["rows"].append(row)
        self.extend(row)
        return row

    def extend(self, row: dict, **more) -> None:
        """Print and keep what a row has now."""
        row |= more
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        if self.keep:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.content, indent=1) + "\n")
            os.replace(partial, self.path)
