"""Products of a Linear on a GPU: our kernels beside cuBLAS and other projects' kernels, in one run.

    benchmarks/cuda_peers.sh peers                            # once: what it compares with
    python benchmarks/cuda_linear.py --peers peers            # five shapes x nine numbers of rows, under ten minutes
    python benchmarks/cuda_linear.py --device cpu             # a dry run without a GPU

Microseconds in CUDA graphs, over weights that the L2 cache does not hold; each product is checked first. Those of
quantized activations are in ``cuda_scaled.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from cuda_common import Clock, Compiled, Table, arguments, build, ceilings, copies, measured
from cuda_peers import GROUP, INT4
from torch import Tensor
from torch.nn import functional as F

from qcompile import numerics
from qcompile.backends.cuda import BACKEND
from qcompile.kernels import choose
from qcompile.types import PackedWeight, Scheme, Site

SHAPES = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (8192, 8192))  # Qwen3-8B, and the anchor of Marlin
ROWS = (1, 4, 16, 32, 64, 128, 256, 1024, 4096)


def random_weight(scheme: str, out: int, inn: int, device: str) -> PackedWeight:
    """Random codes: rounding real floats would take longer than the benchmark."""
    parsed = Scheme.parse(scheme)
    weight = parsed.weight
    codes = torch.randint(0, 256, (out, inn * weight.bits // 8), dtype=torch.uint8, device=device)
    if weight.number == "fp8":
        codes = codes & 0xBF  # neither NaN nor large
    scales = torch.rand(out, weight.groups(inn), device=device) * 0.02 + 0.005
    return PackedWeight(parsed, (out, inn), codes, scales.bfloat16())


def kernel_of(packed: PackedWeight):
    """Our kernel on this GPU."""
    out, inn = packed.shape
    kernel, why = choose(BACKEND, Site("layer", "linear", out, inn, torch.bfloat16), packed.scheme)
    assert kernel is not None, why
    return kernel


class Ours:
    """x -> x @ W.T for each of several weights, compiled once for each shape of x."""

    def __init__(self, weights: Sequence[PackedWeight]) -> None:
        self.kernel, self.scheme, self.out = kernel_of(weights[0]), weights[0].scheme, weights[0].shape[0]
        self.tensors = [self.kernel.prepare(weight) for weight in weights]
        self.compiled = Compiled(self._product)

    def _product(self, x: Tensor, *tensors: Tensor) -> Tensor:
        if self.scheme.activation is None:
            return self.kernel.linear(x, tensors, None, self.scheme, self.out)
        parts = numerics.quantize_activation(x, self.scheme.activation, ())
        return self.kernel.scaled_linear(parts, tensors, None, self.scheme, self.out, x.dtype)

    def products(self) -> list[Callable[[Tensor], Tensor]]:
        """One function for each weight."""
        return [partial(self._run, tensors) for tensors in self.tensors]

    def _run(self, tensors: list[Tensor], x: Tensor) -> Tensor:
        return self.compiled(x, *tensors)


def main() -> None:
    chosen = arguments(__doc__.splitlines()[0])
    clock, dry = Clock(chosen.device, chosen.seconds), chosen.device == "cpu"
    table = Table("cuda_linear", chosen, {"ceilings": ceilings(clock)})
    print(table.content["ceilings"])
    shapes, numbers = (((256, 512),), (1, 5)) if dry else (SHAPES, ROWS)
    for out, inn in shapes:
        bytes_of = out * inn / 2
        weights = [random_weight("w4a16_g128", out, inn, chosen.device) for _ in range(2 if dry else copies(bytes_of))]
        floats = [numerics.dequantize_packed(w) for w in weights]
        peers = [(numerics.unpack_codes(w.codes, 4, inn), w.scales, f) for w, f in zip(weights, floats, strict=True)]
        built = {"ours": Ours(weights).products()} | {name: build(name, make, peers) for name, make in INT4.items()}
        for rows in numbers:
            x = torch.randn(rows, inn, device=chosen.device).bfloat16()
            expected, row = x.double() @ floats[0].double().t(), {"rows": rows, "out": out, "in": inn}
            for name, products in built.items():
                label, calls = f"{name}, {rows} x {out} x {inn}", [partial(product, x) for product in products]
                row[name] = measured(label, calls, [expected], clock)
            if row.get("ours"):
                moved = bytes_of * (1 + 4 / GROUP) + 2 * rows * (out + inn)
                row["ours_tb_s"] = moved / row["ours"] / 1e6
            table.add(scheme="w4a16_g128", **row)
            if clock.is_over:
                return
        eight_bits(out, inn, floats, numbers, table, clock)
        if clock.is_over:
            return


def eight_bits(out, inn, floats, numbers, table, clock) -> None:
    """Weights of eight bits, of which there are no peers here, beside the float product."""
    weights = [random_weight("w8a16", out, inn, floats[0].device.type) for _ in floats]
    products, exact = Ours(weights).products(), numerics.dequantize_packed(weights[0]).double()
    for rows in numbers:
        x = torch.randn(rows, inn, device=floats[0].device).bfloat16()
        calls = [partial(product, x) for product in products]
        row = {"ours": measured(f"ours, {rows} x {out} x {inn}", calls, [x.double() @ exact.t()], clock)}
        row["cublas"] = clock.time([partial(F.linear, x, w) for w in floats])
        table.add(scheme="w8a16", rows=rows, out=out, **{"in": inn}, **row)
        if clock.is_over:
            return


if __name__ == "__main__":
    main()
