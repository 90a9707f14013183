"""Mixtures of experts on a GPU: our kernels beside torch's grouped product of bfloat16 experts.

    python benchmarks/cuda_experts.py                       # the layers of Qwen3-30B-A3B, 1 to 1024 tokens
    python benchmarks/cuda_experts.py --device cpu          # a dry run without a GPU

The whole layer is timed: routing, both products, the activation and the weighted sum; each scheme is checked first.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from cuda_common import Clock, Table, arguments, ceilings, copies, error, inductor
from cuda_linear import random_weight
from torch import Tensor

from qcompile import numerics
from qcompile.backends.cuda import BACKEND
from qcompile.kernels import choose
from qcompile.moe import run_float_experts
from qcompile.types import PackedWeight, Site

QWEN = (128, 8, 2048, 768)  # experts, chosen, hidden and intermediate size
TOKENS = (1, 4, 16, 64, 256, 1024)
SCHEMES = ("w4a16_g128", "w8a16", "w8a8", "w4a8_g128", "wfp8afp8")


def random_experts(scheme: str, experts: int, out: int, inn: int, device: str) -> PackedWeight:
    """The weights of one projection."""
    return PackedWeight.of_experts([random_weight(scheme, out, inn, device) for _ in range(experts)])


class Layer:
    """The experts of a layer in one scheme."""

    def __init__(self, scheme: str, sizes: tuple[int, int, int, int], device: str) -> None:
        self.experts, self.k, self.hidden, self.intermediate = sizes
        shapes = ((2 * self.intermediate, self.hidden), (self.hidden, self.intermediate))
        self.packed = [random_experts(scheme, self.experts, *shape, device) for shape in shapes]
        self.name, self.scheme, self.kernel = scheme, self.packed[0].scheme, ""
        self.tensors: list[Tensor] = []
        for packed, (out, inn) in zip(self.packed, shapes, strict=True):
            site = Site("experts", "experts", out, inn, torch.bfloat16, kind="experts", experts=self.experts)
            kernel, why = choose(BACKEND, site, self.scheme)
            assert kernel is not None, why
            self.kernel = f"cuda.{kernel.name}"
            self.tensors += kernel.prepare(packed)

    def compute(self, x: Tensor, ids: Tensor, routing: Tensor, *tensors: Tensor) -> Tensor:
        """As a compiled graph does."""
        half = len(tensors) // 2
        arguments = (
            [x], ids, routing, list(tensors[:half]), None, [], list(tensors[half:]), None, [],
            f"{self.name}|{self.name}", f"{self.kernel}|{self.kernel}", "silu",
            [self.experts, self.hidden, self.intermediate], x.dtype,
        )  # fmt: skip
        operation = BACKEND.operations["quant_experts"]
        assert not operation.refuses(*arguments), operation.refuses(*arguments)
        return operation.compute(*arguments)

    def floats(self) -> list[Tensor]:
        """The same weights in bfloat16."""
        return [numerics.dequantize_packed(packed).bfloat16() for packed in self.packed]


def main() -> None:
    chosen = arguments(__doc__.splitlines()[0])
    clock, dry = Clock(chosen.device, chosen.seconds), chosen.device == "cpu"
    table = Table("cuda_experts", chosen, {"ceilings": ceilings(clock)})
    sizes, numbers = ((8, 2, 256, 128), (1, 6)) if dry else (QWEN, TOKENS)
    for scheme in SCHEMES:
        one = Layer(scheme, sizes, chosen.device)
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in one.tensors)
        layers = [one, *(Layer(scheme, sizes, chosen.device) for _ in range(1 if dry else copies(nbytes) - 1))]
        for tokens in numbers:
            measure(scheme, layers, tokens, clock, table)
            if clock.is_over:
                return


def measure(scheme: str, layers: list[Layer], tokens: int, clock: Clock, table: Table) -> None:
    """One row of the table."""
    one, device = layers[0], clock.device
    x = torch.randn(tokens, one.hidden, device=device).bfloat16()
    ids = torch.rand(tokens, one.experts, device=device).topk(one.k).indices
    routing = torch.rand(tokens, one.k, device=device).softmax(-1)
    call = (x, ids, routing)
    floats = [layer.floats() for layer in layers[:2]]  # two do not fit into the L2 cache
    row: dict[str, float | None] = {}
    for name, function, weights in (
        ("ours", one.compute, [layer.tensors for layer in layers]),
        ("grouped_mm", dense, floats),
    ):
        try:
            compiled = inductor(function, [*call, *weights[0]])
            found = error(compiled(*call, *weights[0]), dense(*call, *floats[0]))
            assert found < (0.02 if one.scheme.activation is None else 0.1), f"relative error {found:.3f}"
            row[name] = clock.time([partial(compiled, *call, *own) for own in weights])
        except Exception as reason:
            print(f"{name}, {scheme}, {tokens}: {type(reason).__name__} {str(reason)[:200]}", file=sys.stderr)
            row[name] = None
    table.add(scheme=scheme, tokens=tokens, experts=one.experts, chosen=one.k, **row)


def dense(x: Tensor, ids: Tensor, routing: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The float experts."""
    return run_float_experts(x, ids, routing, up, None, down, None, "silu", False, False)


if __name__ == "__main__":
    main()
