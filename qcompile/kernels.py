"""What a kernel is: a device layout, a reason why not, and plain ATen operations that compute with it.

A kernel's ``linear`` and ``scaled_linear`` are ordinary traceable torch code. Eager execution calls them as they are;
the pass ``lower`` traces them into the compiled graph. A backend's folder lists its kernels, best first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from . import numerics
from .types import PackedWeight, Scheme, Site


class Kernel:
    """The kernel named "reference": canonical tensors, dequantized at every call. The definition of every other one."""

    name = "reference"

    def computes(self, scheme: Scheme) -> bool:
        """Whether this kernel is about such numbers at all; if not, its refusal is no news."""
        return True

    def refuses(self, site: Site, scheme: Scheme) -> str:
        """Why this kernel cannot run ``site`` under ``scheme``; "" when it can."""
        return ""

    def nbytes(self, site: Site, scheme: Scheme) -> int:
        """Bytes of the prepared tensors, for the memory estimate of a plan."""
        weight, groups = scheme.weight, scheme.weight.groups(site.in_features)
        row = -(-site.in_features * weight.bits // 8) + groups * site.dtype.itemsize
        return site.out_features * (row + (0 if weight.symmetric else groups))

    def prepare(self, packed: PackedWeight) -> list[Tensor]:
        """Device tensors of a canonical weight."""
        return list(packed.tensors().values())

    def restore(self, tensors: Sequence[Tensor], scheme: Scheme, shape: tuple[int, int]) -> PackedWeight:
        """Exact inverse of ``prepare``."""
        return PackedWeight(scheme, shape, *_named(tensors, scheme))

    def linear(self, x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, scheme: Scheme, out: int) -> Tensor:
        """``x @ W.T + bias`` for float x [..., in]; the result has the dtype of x."""
        return F.linear(x, self._dequantize(weight, scheme, x.shape[-1]).to(x.dtype), bias)

    def scaled_linear(
        self,
        codes: Tensor,
        scale: Tensor,
        weight: Sequence[Tensor],
        bias: Tensor | None,
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """``(codes * scale) @ W.T + bias`` for int8 codes [..., in]; sums are exact in float64."""
        packed, channel_scale, _, permutation = _named(weight, scheme)
        if permutation is not None:
            codes = codes.index_select(-1, permutation)
        total = F.linear(codes.double(), numerics.signed_codes(packed).double()).float()
        return finish_scaled(total, scale, channel_scale.flatten(), bias, dtype)

    @staticmethod
    def _dequantize(tensors: Sequence[Tensor], scheme: Scheme, in_features: int) -> Tensor:
        return numerics.dequantize(*_named(tensors, scheme), scheme, in_features)


def finish_scaled(
    total: Tensor, scale: Tensor, channel_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Float result of integer sums ``total`` [..., out]: token scale, then channel scale, then bias, in float32."""
    result = total.float() * scale * channel_scale.float()
    return (result if bias is None else result + bias.float()).to(dtype)


def _named(tensors: Sequence[Tensor], scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(codes, scales, zeros, permutation) from the flat list that ``PackedWeight.tensors`` gave."""
    codes, scales, *rest = tensors
    zeros = None if scheme.weight.symmetric else rest.pop(0)
    return codes, scales, zeros, rest[0] if rest else None


class Backend(Protocol):
    """A device: its kernels, best first, and whether it is there."""

    name: str
    kernels: Sequence[Kernel]

    def missing(self) -> str:
        """Why this device cannot be used on this machine; "" when it can."""
        ...

    def kernel(self, name: str) -> Kernel:
        """The kernel called ``name``."""
        ...


def choose(backend: Backend, site: Site, scheme: Scheme) -> tuple[Kernel | None, str]:
    """The first kernel of ``backend`` that can run ``site``, and why each better one for this scheme cannot.

    With no kernel at all the reason lists every refusal.
    """
    refusals = [(kernel, kernel.refuses(site, scheme)) for kernel in backend.kernels]
    chosen = next((kernel for kernel, reason in refusals if not reason), None)
    if chosen is None:
        every = "; ".join(f"{kernel.name}: {reason}" for kernel, reason in refusals)
        return None, every or f"backend {backend.name} has no kernels"
    better = refusals[: [kernel for kernel, _ in refusals].index(chosen)]
    return chosen, "; ".join(f"{k.name}: {reason}" for k, reason in better if k.computes(scheme))
