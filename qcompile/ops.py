"""The semantic ops of qcompile: what quantization means, independent of any device.

Each op has a schema, a reference in plain torch that *is* its definition, and a fake. The first tensors of ``weight``
are in the layout of ``kernel``, ``"backend.name"``; the kernel named ``reference`` takes the canonical layout. A
lowered graph holds none of these ops: the pass ``lower`` replaces each by its kernel's ATen operations.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import numerics, plugins
from .types import Scheme


@functools.cache
def scheme_of(name: str) -> Scheme:
    """Parse a scheme name once."""
    return Scheme.parse(name)


@functools.cache
def find_kernel(name: str):
    """The kernel called ``"backend.kernel"``."""
    backend, _, kernel = name.partition(".")
    return plugins.find("backends", backend).kernel(kernel)


@torch.library.custom_op("qcompile::linear", mutates_args=())
def linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, scheme: str, kernel: str, out_features: int) -> Tensor:
    """``x @ W.T + bias`` with a quantized weight and float activations: x [..., in] -> [..., out] in x's dtype."""
    return find_kernel(kernel).linear(x, weight, bias, scheme_of(scheme), out_features)


@linear.register_fake
def _(x, weight, bias, scheme, kernel, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("qcompile::quantize", mutates_args=())
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize activations per token: x [..., n] -> int8 codes [..., n], float32 scale [..., 1]."""
    return numerics.quantize_per_token(x.contiguous())


@quantize.register_fake
def _(x):
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@torch.library.custom_op("qcompile::scaled_linear", mutates_args=())
def scaled_linear(
    codes: Tensor,
    scale: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    scheme: str,
    kernel: str,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """``(codes * scale) @ W.T + bias`` with integer products: int8 [..., in], float32 [..., 1] -> dtype [..., out]."""
    return find_kernel(kernel).scaled_linear(codes, scale, weight, bias, scheme_of(scheme), out_features, dtype)


@scaled_linear.register_fake
def _(codes, scale, weight, bias, scheme, kernel, out_features, dtype):
    return codes.new_empty(*codes.shape[:-1], out_features, dtype=dtype)
