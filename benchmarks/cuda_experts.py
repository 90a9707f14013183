"""Mixtures of experts on a GPU: our kernels beside bfloat16 experts (torch's grouped product) and other projects'.

    benchmarks/cuda_peers.sh peers                          # once: what it compares with
    python benchmarks/cuda_experts.py --peers peers         # the layers of Qwen3-30B-A3B and DeepSeek-V3
    python benchmarks/cuda_experts.py --device cpu          # a dry run without a GPU

The whole layer is timed: sorting by expert, both products, the activation and the weighted sum; all are checked first.
"""

from __future__ import annotations

from functools import partial

import torch
from cuda_common import Clock, Compiled, Table, arguments, build, ceilings, copies, measured
from cuda_linear import random_weight
from cuda_peer_experts import EXPERTS
from torch import Tensor

from qcompile import numerics
from qcompile.backends.cuda import BACKEND
from qcompile.kernels import choose
from qcompile.moe import run_float_experts
from qcompile.types import PackedWeight, Site

QWEN = (128, 8, 2048, 768)  # experts, chosen, hidden and intermediate size
DEEPSEEK = (256, 8, 7168, 2048)
TOKENS = (1, 4, 16, 64, 256, 1024)
PEERS_HAVE = "w4a16_g128"
SCHEMES = (PEERS_HAVE, "w8a16", "w8a8", "w4a8_g128", "wfp8afp8")


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
        self.compiled = Compiled(self.compute)

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
    plan = [(scheme, QWEN, TOKENS) for scheme in SCHEMES] + [(PEERS_HAVE, DEEPSEEK, (1, 16))]
    if dry:
        plan = [(scheme, (8, 2, 256, 128), (1, 6)) for scheme in SCHEMES]
    float_times: dict[tuple, float | None] = {}  # which are the same for every scheme
    for scheme, sizes, numbers in plan:
        one = Layer(scheme, sizes, chosen.device)
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in one.tensors)
        layers = [one, *(Layer(scheme, sizes, chosen.device) for _ in range(1 if dry else copies(nbytes) - 1))]
        measure(layers, numbers, float_times, clock, table)
        if clock.is_over:
            return


def measure(
    layers: list[Layer], numbers: tuple[int, ...], float_times: dict[tuple, float | None], clock: Clock, table: Table
) -> None:
    """Rows for one scheme and size: ours for all numbers of tokens, then one peer after the other."""
    one, found = layers[0], []
    floats = [layer.floats() for layer in layers[:2]]  # two do not fit into the L2 cache
    for tokens in numbers:
        x = torch.randn(tokens, one.hidden, device=clock.device).bfloat16()
        ids = torch.rand(tokens, one.experts, device=clock.device).topk(one.k).indices
        call = (x, ids, torch.rand(tokens, one.k, device=clock.device).softmax(-1))
        expected, label = dense(*call, *floats[0]), f"{one.name}, {tokens} tokens"
        calls = [partial(one.compiled, *call, *layer.tensors) for layer in layers]
        tolerance = 0.02 if one.scheme.activation is None else 0.1
        row = {"scheme": one.name, "tokens": tokens, "experts": one.experts, "chosen": one.k}
        row["ours"] = measured(f"ours, {label}", calls, [expected], clock, tolerance)
        key = (tokens, one.experts)
        if key not in float_times:
            calls = [partial(DENSE, *call, *own) for own in floats]
            float_times[key] = measured(f"grouped_mm, {label}", calls, [expected], clock)
        found.append((table.add(**row, grouped_mm=float_times[key]), call, expected))
        if clock.is_over:
            return
    for name, make in EXPERTS.items() if one.name == PEERS_HAVE else ():
        products = build(name, make, [layer.packed for layer in layers])
        for row, (x, ids, routing), expected in found:
            calls = [partial(product, x, ids.int(), routing) for product in products]
            label = f"{name}, {one.name}, {row['tokens']} tokens"
            table.extend(row, **{name: measured(label, calls, [expected], clock)})
            if clock.is_over:
                return


def dense(x: Tensor, ids: Tensor, routing: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The float experts."""
    return run_float_experts(x, ids, routing, up, None, down, None, "silu", False, False)


DENSE = Compiled(dense)


if __name__ == "__main__":
    main()
