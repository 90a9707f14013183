"""Products of quantized activations on a GPU: our kernels beside cuBLAS in bfloat16, torch's own and vLLM's CUTLASS.

    benchmarks/cuda_peers.sh peers                            # once: what it compares with
    python benchmarks/cuda_scaled.py --peers peers            # three schemes, 16 to 8192 rows, under ten minutes
    python benchmarks/cuda_scaled.py --device cpu             # a dry run without a GPU

The quantization of x is part of every time. Otherwise as ``cuda_linear.py``. vLLM's counterpart of ``w4a8`` has fp8
activations.
"""

from __future__ import annotations

from functools import partial

import torch
from cuda_common import Clock, Table, arguments, build, ceilings, copies, measured
from cuda_linear import Ours, random_weight
from cuda_peer_scaled import SCALED, TOLERANCE
from torch.nn import functional as F

from qcompile import numerics

SHAPES = ((24576, 4096), (4096, 12288), (6144, 4096))  # Qwen3-8B
ROWS = (1, 16, 64, 256, 1024, 4096, 8192)


def main() -> None:
    chosen = arguments(__doc__.splitlines()[0])
    clock, dry = Clock(chosen.device, chosen.seconds), chosen.device == "cpu"
    table = Table("cuda_scaled", chosen, {"ceilings": ceilings(clock)})
    shapes, numbers = (((256, 512),), (1, 33)) if dry else (SHAPES, ROWS)
    for out, inn in shapes:
        count = 2 if dry else copies(out * inn * 2)
        floats = [torch.randn(out, inn, device=chosen.device).bfloat16() for _ in range(count)]
        for scheme in SCALED:
            measure(scheme, floats, numbers, table, clock)
            if clock.is_over:
                return


def measure(scheme: str, floats: list[torch.Tensor], numbers: tuple[int, ...], table: Table, clock: Clock) -> None:
    """One scheme and shape."""
    (out, inn), device = floats[0].shape, floats[0].device.type
    count = 2 if device == "cpu" else copies(out * inn * (0.5 if scheme.startswith("w4") else 1))
    weights = [random_weight(scheme, out, inn, device) for _ in range(count)]
    products = {"ours": Ours(weights).products()}
    products |= {name: build(name, make, [(w,) for w in weights]) for name, make in SCALED[scheme].items()}
    exact, activation = numerics.dequantize_packed(weights[0]).double(), weights[0].scheme.activation
    for rows in numbers:
        x = torch.randn(rows, inn, device=device).bfloat16()
        row: dict[str, float | None] = {"cublas": clock.time([partial(F.linear, x, weight) for weight in floats])}
        parts = numerics.quantize_activation(x, activation, ())
        expected = numerics.dequantize_activation(parts, activation).double() @ exact.t()
        for name, own in products.items():
            calls = [partial(product, x) for product in own]
            label, tolerance = f"{name}, {scheme}, {rows} x {out} x {inn}", TOLERANCE.get((scheme, name), 0.02)
            row[name] = measured(label, calls, [expected], clock, tolerance)
        table.add(scheme=scheme, rows=rows, out=out, **{"in": inn}, **row)
        if clock.is_over:
            return


if __name__ == "__main__":
    main()
