"""Sites, weights and activations that the tests of the CUDA backend share."""

from __future__ import annotations

import dataclasses
import functools

import torch

from qcompile import numerics
from qcompile.backends.cuda import BACKEND
from qcompile.kernels import Kernel, choose
from qcompile.types import PackedWeight, Scheme, Site

ARCHS = ("sm_90", "sm_80")
DTYPES = (torch.bfloat16, torch.float16)
PARAMS = {  # what calibration would find for values around one
    "input_scale": torch.tensor([0.025]),
    "input_zero": torch.tensor([-9], dtype=torch.int32),
    "alpha": torch.tensor([0.8]),
}


def site(out: int, inn: int, dtype: torch.dtype, experts: int = 0) -> Site:
    return Site("layer", "experts" if experts else "linear", out, inn, dtype, kind="experts" if experts else "linear",
                experts=experts)  # fmt: skip


def kernel_for(scheme: Scheme, arch: str, dtype: torch.dtype = torch.bfloat16, experts: int = 0) -> Kernel:
    """What a GPU of that architecture would run such a site with; the reference does not count."""
    with BACKEND.target(arch):
        kernel, why = choose(BACKEND, site(64, 256, dtype, experts), scheme)
    assert kernel is not None, why
    assert kernel.name != "reference", why
    return kernel


@functools.cache
def packed_weight(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype, permuted: bool = False) -> PackedWeight:
    """A weight of random numbers, rounded to nearest."""
    generator = torch.Generator().manual_seed(sum(shape))
    if len(shape) == 3:
        return PackedWeight.of_experts([_one(scheme, shape[1:], dtype, permuted, generator) for _ in range(shape[0])])
    return _one(scheme, shape, dtype, permuted, generator)


def _one(scheme, shape, dtype, permuted, generator):
    weight = torch.randn(shape, generator=generator).to(dtype)
    packed = numerics.quantize_weight(weight, Scheme(scheme.weight))
    params = {name: PARAMS[name] for name in scheme.activation.params} if scheme.activation else {}
    order = torch.randperm(shape[1], generator=generator).to(torch.int32) if permuted else None
    return dataclasses.replace(packed, scheme=scheme, permutation=order, **params)


def quantized(x: torch.Tensor, packed: PackedWeight) -> list[torch.Tensor]:
    """What a product reads instead of x."""
    if packed.scheme.activation is None:
        return [x]
    params = list(packed.activation_tensors().values())
    parts = numerics.quantize_activation(x, packed.scheme.activation, params)
    return parts if packed.scheme.activation.dynamic else [*parts, *params]


def run(kernel: Kernel, packed: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    tensors, out = kernel.prepare(packed), packed.shape[-2]
    if packed.scheme.activation is None:
        return kernel.linear(x, tensors, bias, packed.scheme, out)
    return kernel.scaled_linear(quantized(x, packed), tensors, bias, packed.scheme, out, x.dtype)


def exact(packed: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product in float64."""
    inputs, activation = x.double(), packed.scheme.activation
    if activation is not None:
        inputs = numerics.dequantize_activation(quantized(x, packed), activation).double()
    weight = numerics.dequantize_packed(dataclasses.replace(packed, scales=_double(packed.scales))).double()
    return inputs @ weight.mT + (0 if bias is None else bias.double())


def _double(scales: torch.Tensor) -> torch.Tensor:
    return scales.double()


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """``|result - expected| / |expected|``."""
    return ((result.double() - expected).norm() / expected.norm()).item()
