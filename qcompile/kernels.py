"""What a kernel is: a device layout, a reason why not, and plain ATen operations that compute with it.

A kernel's ``linear``, ``scaled_linear`` and ``grouped_linear`` are ordinary traceable torch code. Eager execution calls
them as they are; the pass ``lower`` traces them into the compiled graph. A backend's folder lists its kernels, best
first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from . import numerics
from .small_floats import SCALE_DTYPES
from .types import PackedWeight, Scheme, Site

NO_PARAMS: Mapping[str, Tensor] = {}


class Kernel:
    """The kernel named "reference": canonical tensors, dequantized at every call. The definition of every other one."""

    name = "reference"
    kinds: tuple[str, ...] = ("linear", "experts")  # which sites it is for
    takes_words = False  # whether 4-bit activations may also come as words of eight (``numerics.pack_int4``)
    scales_like_input = False  # whether scales must have the dtype of float activations, and are rounded to it
    portable = True  # whether torch alone can run its operations, as a package made ahead of time must be
    merges = False  # whether ``linears`` is one product, and pays

    def computes(self, scheme: Scheme) -> bool:
        """Whether this kernel is about such numbers at all; if not, its refusal is no news."""
        return True

    def refuses(self, site: Site, scheme: Scheme) -> str:
        """Why this kernel cannot run ``site`` under ``scheme``; "" when it can."""
        return ""

    def nbytes(self, site: Site, scheme: Scheme) -> int:
        """Bytes of the prepared tensors, for the memory estimate of a plan."""
        weight, groups = scheme.weight, scheme.weight.groups(site.in_features)
        scales = weight.scale_rows(site.out_features) * groups
        codes = site.out_features * -(-site.in_features * weight.bits // 8)
        one = codes + scales * (1 if weight.number in SCALE_DTYPES else site.dtype.itemsize)
        one += (0 if weight.symmetric else scales) + (4 if weight.number == "nvfp4" else 0)
        return max(1, site.experts) * one

    def prepare(self, packed: PackedWeight) -> list[Tensor]:
        """Device tensors of a canonical weight."""
        tensors = packed.tensors()
        if packed.scales.dtype == torch.float8_e8m0fnu:  # its bits: Inductor cannot compute with it
            tensors["scales"] = packed.scales.view(torch.uint8)
        return list(tensors.values())

    def restore(
        self,
        tensors: Sequence[Tensor],
        scheme: Scheme,
        shape: tuple[int, ...],
        activation: Mapping[str, Tensor] = NO_PARAMS,
    ) -> PackedWeight:
        """Exact inverse of ``prepare``; ``activation`` holds ``PackedWeight.activation_tensors`` by name."""
        codes, scales, zeros, permutation, outer = _named(tensors, scheme)
        scales = scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales
        return PackedWeight(scheme, shape, codes, scales, zeros, permutation, outer, **activation)

    def linear(self, x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, scheme: Scheme, out: int) -> Tensor:
        """``x @ W.T + bias`` for float x [..., in]; the result has the dtype of x."""
        return F.linear(x, self._dequantize(weight, scheme, x.shape[-1]).to(x.dtype), bias)

    def scaled_linear(
        self,
        x: Sequence[Tensor],
        weight: Sequence[Tensor],
        bias: Tensor | None,
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """``x @ W.T + bias`` for quantized activations, [codes, scale] or [codes, scale, zero]; exact in float64."""
        assert scheme.activation is not None
        inputs = numerics.dequantize_activation(x, scheme.activation)
        exact = self._dequantize(weight, scheme, inputs.shape[-1], torch.float64)
        return F.linear(inputs, exact, None if bias is None else bias.double()).to(dtype)

    def refuses_merging(self, weights: Sequence[Sequence[Tensor]], scheme: Scheme, outs: Sequence[int]) -> str:
        """Why ``linears`` of such (fake) weights is not to be called; asked of a kernel that ``merges``."""
        return ""

    def linears(
        self,
        x: Sequence[Tensor],
        weights: Sequence[Sequence[Tensor]],
        biases: Sequence[Tensor | None],
        scheme: Scheme,
        outs: Sequence[int],
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """Several Linears of the same input: x is [float] or what ``scaled_linear`` takes; the result of each."""
        each = zip(weights, biases, outs, strict=True)
        if scheme.activation is None:
            return [self.linear(x[0], weight, bias, scheme, out) for weight, bias, out in each]
        return [self.scaled_linear(x, weight, bias, scheme, out, dtype) for weight, bias, out in each]

    def grouped_linear(
        self,
        x: Sequence[Tensor],
        ends: Tensor,
        weight: Sequence[Tensor],
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Rows sorted by expert, each times the weight of its own: [rows, in] -> [rows, out] in ``dtype``.

        x: [rows] of floats for weight-only schemes, else quantized activations as for ``scaled_linear``; static ones
        have one scale per row here. ends: int32 [experts], where the rows of each expert end; an expert without rows
        costs nothing.
        """
        return torch.ops.qcompile_reference.grouped_linear(list(x), ends, list(weight), str(scheme), out, dtype)

    @staticmethod
    def _dequantize(
        tensors: Sequence[Tensor], scheme: Scheme, in_features: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        codes, scales, zeros, permutation, outer = _named(tensors, scheme)
        return numerics.dequantize(codes, scales, zeros, permutation, scheme, in_features, outer, dtype)


def _grouped_reference(
    x: list[Tensor], ends: Tensor, weight: list[Tensor], scheme: str, out: int, dtype: torch.dtype
) -> Tensor:
    """One product per expert that has rows, on its own slice of the weight; nothing else is dequantized."""
    kernel, parsed = Kernel(), Scheme.parse(scheme)
    result = x[0].new_empty((x[0].shape[0], out), dtype=dtype)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            rows = [tensor[start:end] for tensor in x]
            own = [tensor[expert] for tensor in weight]
            if parsed.activation is None:
                result[start:end] = kernel.linear(rows[0], own, None, parsed, out)
            else:
                result[start:end] = kernel.scaled_linear(rows, own, None, parsed, out, dtype)
        start = end
    return result


# Its loop depends on data, so no graph can hold it: the one op of a lowered graph that needs Python to run.
torch.library.custom_op("qcompile_reference::grouped_linear", _grouped_reference, mutates_args=())
torch.library.register_fake(
    "qcompile_reference::grouped_linear",
    lambda x, ends, weight, scheme, out, dtype: x[0].new_empty((x[0].shape[0], out), dtype=dtype),
)


def finish_scaled(
    total: Tensor, scale: Tensor, channel_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Float result of integer sums ``total`` [..., out]: token scale, then channel scale, then bias, in float32."""
    result = total.float() * scale * channel_scale.float()
    return (result if bias is None else result + bias.float()).to(dtype)


def _named(
    tensors: Sequence[Tensor], scheme: Scheme
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(codes, scales, zeros, permutation, outer) from the flat list that ``PackedWeight.tensors`` gave."""
    codes, scales, *rest = tensors
    zeros = None if scheme.weight.symmetric else rest.pop(0)
    outer = rest.pop(0) if scheme.weight.number == "nvfp4" else None
    return codes, scales, zeros, rest[0] if rest else None, outer


class Operation(Protocol):
    """A device's own implementation of one semantic op that is no matrix product, such as ``rms_norm_quantize``."""

    def refuses(self, *arguments: Any) -> str:
        """Why it cannot compute this call, whose tensors are fake; "" when it can."""
        ...

    def compute(self, *arguments: Any) -> Any:
        """What the op of ``fused_ops`` (or ``quantize``) computes, in traceable torch code."""
        ...


class Backend(Protocol):
    """A device: its kernels, best first, and whether it is there.

    It may have ``operations``, a mapping from names of semantic ops to an Operation; the others are lowered to their
    definitions.
    """

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
    suited = [kernel for kernel in backend.kernels if site.kind in kernel.kinds]
    refusals = [(kernel, kernel.refuses(site, scheme)) for kernel in suited]
    chosen = next((kernel for kernel, reason in refusals if not reason), None)
    if chosen is None:
        every = "; ".join(f"{kernel.name}: {reason}" for kernel, reason in refusals)
        return None, every or f"backend {backend.name} has no kernels for {site.kind} sites"
    better = refusals[: [kernel for kernel, _ in refusals].index(chosen)]
    return chosen, "; ".join(f"{k.name}: {reason}" for k, reason in better if k.computes(scheme))
