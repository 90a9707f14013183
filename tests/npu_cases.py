"""Sites, weights and schemes that the tests of the NPU backend share."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from qcompile import numerics
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
