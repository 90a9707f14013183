"""Correctness of the kernels on a GPU, before anything is timed: every scheme against float64.

    python benchmarks/cuda_check.py                         # exits with 1 if anything is wrong
    python benchmarks/cuda_check.py --device cpu            # a dry run without a GPU

Each product is computed twice, in a CUDA graph, and by two streams at once, into memory that begins as NaN: always the
same bits, within the error that ``README.md`` of the backend promises. So are products that read each other's results,
with launches that overlap and without. Layers of experts are held to the same ops on a
CPU.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import torch
from cuda_common import Clock, Table, arguments, error, launches_apart
from cuda_experts import Layer
from cuda_linear import kernel_of
from torch import Tensor

from qcompile import numerics
from qcompile.types import PackedWeight, Scheme

SCHEMES = (
    "w4a16_g128", "w4a16_g32_asym", "w4a16", "w3a16_g64_asym", "w8a16", "w8a16_g64_asym", "w8a8", "w8a8_g32",
    "w8a8_g128", "w4a8", "w4a8_g32", "w4a8_g128", "w4a8_g64_asym_dynamic_asym", "w4a4", "wfp8afp8", "wfp8afp8_tensor",
    "wfp8afp8_b128x128",
)  # fmt: skip
LIMITS = {torch.bfloat16: 5e-3, torch.float16: 1e-3}  # relative errors
SHAPES, ROWS = ((192, 448), (4096, 4096)), (1, 5, 33, 100, 600, 1500)  # padded or not; a tile of each height
LAYER, TOKENS, EXPERTS = (16, 4, 512, 256), (1, 5, 200), ("w4a16_g128", "w8a16", "w8a8", "w4a8_g128", "wfp8afp8")
LAYER_LIMIT = 1e-2  # gate and up are rounded on the CPU, and not on a GPU


def weight_of(scheme: Scheme, out: int, inn: int, dtype: torch.dtype, device: str) -> PackedWeight:
    """Random numbers, rounded to nearest."""
    packed = numerics.quantize_weight(torch.randn(out, inn, device=device).to(dtype), Scheme(scheme.weight))
    return dataclasses.replace(packed, scheme=scheme)


def product(packed: PackedWeight, x: Tensor, bias: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
    """Our product of x, and the same in float64."""
    kernel, scheme, out = kernel_of(packed), packed.scheme, packed.shape[0]
    tensors, exact = kernel.prepare(packed), dataclasses.replace(packed, scales=packed.scales.double())
    weight = numerics.dequantize_packed(exact).double()
    if scheme.activation is None:
        expected = x.double() @ weight.t() + bias.double()
        return lambda: kernel.linear(x, tensors, bias, scheme, out), expected
    parts = numerics.quantize_activation(x, scheme.activation, ())
    inputs = numerics.dequantize_activation(parts, scheme.activation).double()
    return lambda: kernel.scaled_linear(parts, tensors, bias, scheme, out, x.dtype), inputs @ weight.t() + bias.double()


def differences(call: Callable[[], Tensor], first: Tensor, device: str) -> str:
    """In which other way of calling it the result has other bits; "" in none."""
    if not torch.equal(call(), first):
        return "a second run differs"
    if device == "cpu":
        return ""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append([call() for _ in range(3)])
    torch.cuda.synchronize()
    if not torch.equal(captured, first):
        return "a CUDA graph differs"
    return "" if all(torch.equal(one, first) for own in results for one in own) else "streams differ"


def checked(call: Callable[[], Tensor], expected: Tensor, limit: float, device: str) -> dict:
    """What is known of one product; the first time, launches do not overlap."""
    try:
        with launches_apart(device):
            first = call()
        found = error(first, expected)
        why = "" if found <= limit else "the error is above the limit"  # NaN is not below it
        return {"error": found, "limit": limit, "wrong": why or differences(call, first, device)}
    except Exception as reason:
        return {"error": None, "limit": limit, "wrong": f"{type(reason).__name__}: {str(reason)[:200]}"}


def linears(device: str, clock: Clock, table: Table) -> None:
    """Every scheme, dtype, shape and number of rows."""
    for dtype, limit in LIMITS.items():
        for scheme in map(Scheme.parse, SCHEMES):
            for out, inn in SHAPES[:1] if device == "cpu" else SHAPES:
                packed = weight_of(scheme, out, inn, dtype, device)
                for rows in ROWS[:2] if device == "cpu" else ROWS:
                    x = torch.randn(rows, 2 * inn, device=device).to(dtype)[:, :inn]  # rows that are not contiguous
                    call, expected = product(packed, x, torch.randn(out, device=device).to(dtype))
                    where = {"scheme": str(scheme), "dtype": str(dtype).removeprefix("torch."), "rows": rows}
                    table.add(**where, out=out, **{"in": inn}, **checked(call, expected, limit, device))
                    if clock.is_over:
                        return


def layers(device: str, clock: Clock, table: Table) -> None:
    """Experts in every scheme."""
    for scheme in EXPERTS:
        layer = Layer(scheme, LAYER, device)
        for tokens in TOKENS[:2] if device == "cpu" else TOKENS:
            x = torch.randn(tokens, layer.hidden).bfloat16()
            ids = torch.rand(tokens, layer.experts).topk(layer.k).indices
            given = (x, ids, torch.rand(tokens, layer.k).softmax(-1), *layer.tensors)
            there = [one.to(device) for one in given]
            expected = layer.compute(*(one.cpu() for one in given)).to(device)
            found = checked(lambda there=there, layer=layer: layer.compute(*there), expected, LAYER_LIMIT, device)
            table.add(scheme=scheme, tokens=tokens, experts=layer.experts, **found)
            if clock.is_over:
                return


def chains(device: str, table: Table) -> None:
    """Products that read each other's results, in memory that is used again: the same bits if launches overlap."""
    size, count = (64, 3) if device == "cpu" else (4096, 24)
    for scheme in map(Scheme.parse, ("w4a16_g64", "w8a16")):
        weights = []
        for _ in range(3):
            numbers = torch.randn(size, size, device=device) / size**0.5  # so that results stay as large as they were
            packed = numerics.quantize_weight(numbers.bfloat16(), scheme)
            weights.append(kernel_of(packed).prepare(packed))
        kernel = kernel_of(packed)
        for rows in (1, 100):
            x = torch.randn(rows, size, device=device).bfloat16()

            def call(x=x, kernel=kernel, weights=weights, scheme=scheme) -> Tensor:
                for i in range(count):
                    x = kernel.linear(x, weights[i % 3], None, scheme, size)
                return x

            with launches_apart(device):
                apart = call()
            finite = "" if apart.isfinite().all() else "not finite"
            wrong = finite or differences(call, apart, device)
            table.add(scheme=str(scheme), rows=rows, chain=f"{count} products", wrong=wrong)


def main() -> None:
    chosen = arguments(__doc__.splitlines()[0])
    clock = Clock(chosen.device, chosen.seconds)
    table = Table("cuda_check", chosen, {})
    torch.manual_seed(0)
    with torch.no_grad():
        chains(chosen.device, table)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    with torch.no_grad():
        layers(chosen.device, clock, table)
        linears(chosen.device, clock, table)
    rows = table.content["rows"]
    wrong = [row for row in rows if row["wrong"]]
    print(f"{len(rows)} products, {len(wrong)} wrong" + ("; stopped by --seconds" if clock.is_over else ""))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
