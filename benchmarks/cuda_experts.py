"""Mixtures of experts on a GPU: our kernels beside bfloat16 experts (torch's grouped product) and other projects'.

    benchmarks/cuda_peers.sh peers                          # once: what it compares with
    python benchmarks/cuda_experts.py --peers peers         # the layers of Qwen3-30B-A3B, 1 to 1024 tokens
    python benchmarks/cuda_experts.py --device cpu          # a dry run without a GPU

The whole layer is timed: sorting by expert, both products, the activation and the weighted sum; all are checked first.
"""

from __future__ import annotations

from functools import partial

import torch
from cuda_common import Clock, Compiled, Table, arguments, build, ceilings, copies, measured
from cuda_linear import random_weight
from cuda_peer_experts import EXPERTS, Experts
from torch import Tensor

from qcompile import numerics
from qcompile.backends.cuda import BACKEND
from qcompile.kernels import choose
from qcompile.moe import run_float_experts
from qcompile.types import PackedWeight, Site

QWEN = (128, 8, 2048, 768)  # experts, chosen, hidden and intermediate size
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
    sizes, numbers = ((8, 2, 256, 128), (1, 6)) if dry else (QWEN, TOKENS)
    float_times: dict[int, float | None] = {}  # which are the same for every scheme
    for scheme in SCHEMES:
        one = Layer(scheme, sizes, chosen.device)
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in one.tensors)
        layers = [one, *(Layer(scheme, sizes, chosen.device) for _ in range(1 if dry else copies(nbytes) - 1))]
        made = EXPERTS if scheme == PEERS_HAVE else {}
        peers = {name: build(name, make, [layer.packed for layer in layers]) for name, make in made.items()}
        for tokens in numbers:
            measure(layers, peers, tokens, float_times, clock, table)
            if clock.is_over:
                return


def measure(
    layers: list[Layer], peers: dict[str, list[Experts]], tokens: int, float_times: dict[int, float | None],
    clock: Clock, table: Table,
) -> None:  # fmt: skip
    """One row of the table."""
    one, device = layers[0], clock.device
    x = torch.randn(tokens, one.hidden, device=device).bfloat16()
    ids = torch.rand(tokens, one.experts, device=device).topk(one.k).indices
    routing = torch.rand(tokens, one.k, device=device).softmax(-1)
    floats = [layer.floats() for layer in layers[:2]]  # two do not fit into the L2 cache
    expected, label = dense(x, ids, routing, *floats[0]), f"{one.name}, {tokens} tokens"
    calls = [partial(one.compiled, x, ids, routing, *layer.tensors) for layer in layers]
    tolerance = 0.02 if one.scheme.activation is None else 0.1
    row = {"ours": measured(f"ours, {label}", calls, expected, clock, tolerance)}
    if tokens not in float_times:
        calls = [partial(DENSE, x, ids, routing, *own) for own in floats]
        float_times[tokens] = measured(f"grouped_mm, {label}", calls, expected, clock)
    row["grouped_mm"] = float_times[tokens]
    for name, products in peers.items():
        calls = [partial(product, x, ids.int(), routing) for product in products]
        row[name] = measured(f"{name}, {label}", calls, expected, clock)
    table.add(scheme=one.name, tokens=tokens, experts=one.experts, chosen=one.k, **row)


def dense(x: Tensor, ids: Tensor, routing: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The float experts."""
    return run_float_experts(x, ids, routing, up, None, down, None, "silu", False, False)


DENSE = Compiled(dense)


if __name__ == "__main__":
    main()
