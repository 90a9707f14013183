"""Sites, weights and schemes that the tests of the NPU backend share."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from qcompile import gates, numerics, ops
from qcompile.backends.npu import BACKEND
from qcompile.kernels import Kernel, choose
from qcompile.types import PackedWeight, Scheme, Site

HALF = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3}
LINEAR = {  # kernel: schemes of a Linear with 256 inputs and 64 outputs for which it is chosen
    "weight_int4": ("w4a16", "w4a16_g32", "w4a16_g64_asym", "w4a16_g128", "w4a16_g256_asym", "w3a16_g32", "w2a16_asym"),
    "weight_int8": ("w8a16", "w8a16_g64", "w8a16_g128_asym", "w5a16_g32", "w6a16_asym"),
    "int8_nz": ("w8a8", "w8a8_clip", "w5a8", "w8a4"),
    "int8_static_nz": ("w8a8_static", "w8a8_static_sym", "w4a8_static"),
    "int8_int4_nz": ("w4a8", "w4a8_clip", "w3a8", "w4a8_g256"),
    "int4": ("w4a4", "w3a4", "w4a4_clip"),
    "reference": ("w4a16_g48", "w8a8_dynamic_asym", "w4a8_g128", "w8a8_g64", "w8a8_asym", "w4a4_g32"),
}
EXPERTS = {  # of experts with 256 inputs and 64 outputs
    "weight_int4": ("w4a16", "w4a16_g32", "w4a16_g64_asym", "w4a16_asym", "w3a16_g128"),
    "weight_int8": ("w8a16", "w8a16_asym", "w5a16"),
    "int8_nz": ("w8a8", "w8a8_clip", "w8a8_static", "w8a8_static_sym", "w5a8"),
    "int8_int4_nz": ("w4a8", "w4a8_clip", "w4a8_g256"),
    "int4_nz": ("w4a4", "w4a4_clip"),
    "reference": ("w4a16_g48", "w8a16_g64", "w4a8_g128", "w8a8_dynamic_asym"),
}


def linear_site(out: int, inn: int, dtype: torch.dtype = torch.bfloat16) -> Site:
    return Site("layer", "linear", out, inn, dtype)


def experts_site(experts: int, out: int, inn: int, dtype: torch.dtype = torch.bfloat16) -> Site:
    return Site("layer.experts.up_proj", "experts", out, inn, dtype, kind="experts", experts=experts)


@functools.cache
def packed_weight(
    shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype = torch.bfloat16, permuted: bool = False
) -> PackedWeight:
    """A random weight, and random stored parameters of its activations."""
    random = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=random).to(dtype) * 0.1
    packed = numerics.quantize_weight(weight, Scheme(scheme.weight))
    experts = shape[:-2] or (1,)
    made = {
        "alpha": lambda: torch.rand(experts, generator=random) * 0.5 + 0.5,
        "input_scale": lambda: torch.rand(experts, generator=random) * 0.03 + 0.02,
        "input_zero": lambda: torch.randint(-20, 20, experts, generator=random, dtype=torch.int32),
    }
    params = {name: made[name]() for name in (scheme.activation.params if scheme.activation else ())}
    order = torch.rand(*shape[:-2], shape[-1], generator=random).argsort(-1).to(torch.int32) if permuted else None
    return dataclasses.replace(packed, scheme=scheme, permutation=order, **params)


def quantized(x: Tensor, packed: PackedWeight) -> list[Tensor]:
    """What ``scaled_linear`` takes for float activations x."""
    kind = packed.scheme.activation
    params = list(packed.activation_tensors().values())
    parts = numerics.quantize_activation(x, kind, params)
    return parts if kind.dynamic else [*parts, *params]


def equal_weights(actual: PackedWeight, expected: PackedWeight) -> bool:
    """Whether two weights are the same, tensor by tensor, bit by bit."""
    a, b = ({**w.tensors(), **w.activation_tensors()} for w in (actual, expected))
    return a.keys() == b.keys() and all(t.dtype == b[n].dtype and torch.equal(t, b[n]) for n, t in a.items())


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


HIDDEN, COUNT, K = 256, 6, 2
LIMIT = {torch.bfloat16: 1.6e-2, torch.float16: 5e-3}  # of the error's norm: int8 codes of either side of a tie differ


class Layer:
    """The packed experts of one layer, prepared by the kernels that are chosen for them."""

    def __init__(self, scheme, dtype=torch.bfloat16, activation="silu", experts=COUNT, permuted=False, inter=256):
        self.scheme, self.dtype, self.activation = Scheme.parse(scheme), dtype, activation
        self.sizes = [experts, HIDDEN, inter]
        shapes = (experts, gates.up_rows(activation, inter), HIDDEN), (experts, HIDDEN, inter)
        self.packed = [packed_weight(shape, self.scheme, dtype, permuted) for shape in shapes]
        self.kernels = [choose(BACKEND, experts_site(*shape, dtype), self.scheme)[0] for shape in shapes]
        self.biases = [torch.randn(shape[:2]).to(dtype) * 0.1 for shape in shapes]

    def run(self, x, ids, routing, *, definition=False, biases=True):
        kind = self.scheme.activation
        is_early = kind is not None and kind.dynamic and not kind.clip
        parts = numerics.quantize_activation(x, kind) if is_early else [x]
        kernels = [Kernel()] * 2 if definition else self.kernels
        (up, down), (up_bias, down_bias) = self.packed, self.biases if biases else (None, None)
        names = [f"{'cpu' if definition else 'npu'}.{kernel.name}" for kernel in kernels]
        operation = BACKEND.operations["quant_experts"]
        is_plain = definition or operation.refuses(parts, ids)
        return (ops.compute_experts if is_plain else operation.compute)(
            parts, ids, routing,
            kernels[0].prepare(up), up_bias, list(up.activation_tensors().values()),
            kernels[1].prepare(down), down_bias, list(down.activation_tensors().values()),
            f"{self.scheme}|{self.scheme}", "|".join(names), self.activation, self.sizes, self.dtype,
        )  # fmt: skip


def routed(tokens=9, experts=COUNT, k=K, idle=()):
    allowed = torch.tensor([e for e in range(experts) if e not in idle])
    ids = torch.stack([allowed[torch.randperm(len(allowed))[:k]] for _ in range(tokens)])
    return ids, torch.rand(tokens, k)


def assert_as_defined(layer, ids, routing, limit=None, **kwargs):
    x = torch.randn(ids.shape[0], HIDDEN).to(layer.dtype)
    actual = layer.run(x, ids, routing, **kwargs)
    expected = layer.run(x, ids, routing, definition=True, **kwargs)
    assert actual.dtype == layer.dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    four_bits = layer.scheme.activation is not None and layer.scheme.activation.bits == 4
    assert error.item() <= (limit or LIMIT[layer.dtype]) * (8 if four_bits else 1)
