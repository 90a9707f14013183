"""Integer weights times float or integer activations, in C++ (``native/``), for linears and for experts.

Float activations become integers of 15 bits and a sign, with one scale for each row and group of at most 256 columns
(float32: twice as many bits), so that products are sums of integers, and exact in the weights: the zero point is
subtracted as an integer. The result is as close to the float product as one rounding to bfloat16 or float16 is; in
float32 the relative error is some 1e-7. On a CPU with AMX or AVX512-BF16, many rows in bfloat16 are multiplied by
weights that are rounded to bfloat16, as a dequantized model has them (``native/tiled.h``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import numerics
from ...kernels import NO_PARAMS, Kernel
from ...types import PackedWeight, Scheme, Site, WeightType
from . import native

PANEL = 64  # output channels that are stored together; the others are padded
STEP = 8  # input features that are stored together
LONGEST = 32768  # input features that share one scale of integer activations, at most: 32-bit sums hold their products


class Prepared(NamedTuple):
    """The tensors of a weight, as ``native/product.h`` describes them; experts come first where there are several.

    codes        uint8 [panels, steps, 64, 4] for up to 4 bits, int8 [panels, steps, 2, 64, 4] above
    scales       [panels, groups, 64], in the dtype of the canonical ones
    zeros        int8 [panels, groups, 64], or None for symmetric weights
    sums         int32 [panels, groups, 64], the sums of q - z, or None for float activations
    permutation  int32 [in] or None, as in the canonical weight
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    sums: Tensor | None
    permutation: Tensor | None

    @classmethod
    def named(cls, tensors: Sequence[Tensor], scheme: Scheme) -> Prepared:
        """The same from the flat list of those that are not None."""
        rest = list(tensors)
        codes, scales = rest.pop(0), rest.pop(0)
        zeros = None if scheme.weight.symmetric else rest.pop(0)
        sums = None if scheme.activation is None else rest.pop(0)
        return cls(codes, scales, zeros, sums, rest[0] if rest else None)


class Native(Kernel):
    """C++ kernels for weights of 2 to 8 bits; up to 4 bits are stored in 4, others in 8."""

    name = "native"
    kinds = ("linear", "experts")
    portable = False  # it needs its library
    merges = True  # one run over the panels of all weights, which stay where they are

    def computes(self, scheme: Scheme) -> bool:
        return scheme.weight.number == "int"

    def refuses(self, site: Site, scheme: Scheme) -> str:
        weight = scheme.weight
        if not self.computes(scheme):
            return f"computes integer weights, not {scheme}"
        if site.dtype not in native.DTYPES:
            return f"computes bfloat16, float16 and float32, not {site.dtype}"
        if weight.group_size is not None and weight.group_size % STEP:
            return f"group size {weight.group_size} is no multiple of {STEP}"
        if scheme.activation is not None:
            if weight.bits > 4 and (weight.bits < 8 or not weight.symmetric):
                return (
                    f"with quantized activations, weights above 4 bits must be symmetric ones of 8 bits, not {scheme}"
                )
            if _columns(weight, site.in_features)[1] > LONGEST:
                return f"{site.in_features} input features that share a scale are more than {LONGEST}"
        return native.unavailable()

    def nbytes(self, site: Site, scheme: Scheme) -> int:
        weight = scheme.weight
        rows, (groups, size) = _round_up(site.out_features, PANEL), _columns(weight, site.in_features)
        group = site.dtype.itemsize + (0 if weight.symmetric else 1) + (0 if scheme.activation is None else 4)
        return max(1, site.experts) * rows * groups * (size // (2 if weight.bits <= 4 else 1) + group)

    def prepare(self, packed: PackedWeight) -> list[Tensor]:
        weight, (*experts, out, inn) = packed.scheme.weight, packed.shape
        groups, size = _columns(weight, inn)
        rows = _round_up(out, PANEL)
        codes, scales, zeros = (_padded(t, rows) for t in (packed.codes, packed.scales, packed.zeros))
        assert codes is not None
        assert scales is not None
        panels = _empty_panels(codes.shape[0], groups * size, weight.bits)
        sums = torch.empty(codes.shape[0], groups, dtype=torch.int32) if packed.scheme.activation else None
        step = _round_up(max(1, numerics.CHUNK // (groups * size)), PANEL)  # bounds the temporaries
        for start in range(0, codes.shape[0], step):
            chunk = numerics.unpack_codes(codes[start : start + step], weight.bits, inn)
            chunk = F.pad(chunk, (0, groups * size - inn))
            panels[start // PANEL : (start + step) // PANEL] = _panel_codes(chunk, weight.bits)
            if sums is not None:
                zero = 2 ** (weight.bits - 1) if zeros is None else zeros[start : start + step].int()
                sums[start : start + step] = chunk.view(-1, groups, size).sum(-1, dtype=torch.int32) - size * zero
        if zeros is not None:
            zeros = (zeros if weight.bits <= 4 else zeros ^ 0x80).view(torch.int8)
        tensors = [
            panels,
            _panel_values(scales),
            None if zeros is None else _panel_values(zeros),
            None if sums is None else _panel_values(sums),
        ]
        stacked = [t.unflatten(0, (*experts, -1)) if experts else t for t in tensors if t is not None]
        return stacked if packed.permutation is None else [*stacked, packed.permutation]

    def restore(
        self,
        tensors: Sequence[Tensor],
        scheme: Scheme,
        shape: tuple[int, ...],
        activation: Mapping[str, Tensor] = NO_PARAMS,
    ) -> PackedWeight:
        weight, (*experts, out, inn) = scheme.weight, shape
        prepared = Prepared.named(tensors, scheme)

        def rows(values: Tensor) -> Tensor:
            """[experts * rows, n] -> [experts, out, n]"""
            return values.unflatten(0, (*experts, -1))[..., :out, :].contiguous()

        panels = prepared.codes.flatten(0, len(experts))
        step = max(1, numerics.CHUNK // panels[:1].numel())
        codes = [
            numerics.pack_codes(_codes_of_panels(part, weight.bits)[:, :inn], weight.bits)
            for part in panels.split(step)
        ]
        zeros = None
        if prepared.zeros is not None:
            zeros = rows(_values_of_panels(prepared.zeros).view(torch.uint8))
            zeros = zeros if weight.bits <= 4 else zeros ^ 0x80
        scales = rows(_values_of_panels(prepared.scales))
        return PackedWeight(scheme, shape, rows(torch.cat(codes)), scales, zeros, prepared.permutation, **activation)

    def linear(self, x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, scheme: Scheme, out: int) -> Tensor:
        return self._multiply([x], None, weight, bias, scheme, out, x.dtype)

    def scaled_linear(
        self,
        x: Sequence[Tensor],
        weight: Sequence[Tensor],
        bias: Tensor | None,
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        return self._multiply(x, None, weight, bias, scheme, out, dtype)

    def refuses_merging(self, weights: Sequence[Sequence[Tensor]], scheme: Scheme, outs: Sequence[int]) -> str:
        if any(Prepared.named(weight, scheme).permutation is not None for weight in weights):
            return "each of them has an order of input features of its own"
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
        assert not native.unavailable()
        parts = [Prepared.named(weight, scheme) for weight in weights]
        codes, scales = [part.codes for part in parts], [part.scales for part in parts]
        zeros = [part.zeros for part in parts if part.zeros is not None]
        inputs, *params = x
        zero = 2 ** (scheme.weight.bits - 1)
        if scheme.activation is None:
            return torch.ops.qcompile_cpu.linears(inputs, codes, scales, zeros, biases, zero, outs, dtype)
        sums = [part.sums for part in parts]
        return torch.ops.qcompile_cpu.scaled_linears(
            inputs, params[0], params[1] if len(params) > 1 else None, codes, scales, zeros, sums, biases, zero, outs,
            dtype,
        )  # fmt: skip

    def grouped_linear(
        self,
        x: Sequence[Tensor],
        ends: Tensor,
        weight: Sequence[Tensor],
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        return self._multiply(x, ends, weight, None, scheme, out, dtype)

    @staticmethod
    def _multiply(
        x: Sequence[Tensor],
        ends: Tensor | None,
        weight: Sequence[Tensor],
        bias: Tensor | None,
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        assert not native.unavailable()  # loads the ops in a process that did not choose this kernel
        codes, scales, zeros, sums, permutation = Prepared.named(weight, scheme)
        inputs, *params = x
        if permutation is not None:
            inputs = _permuted(inputs, permutation, ends)
        zero = 2 ** (scheme.weight.bits - 1)
        if scheme.activation is None:
            return torch.ops.qcompile_cpu.linear(inputs, codes, scales, zeros, bias, ends, zero, out, dtype)
        return torch.ops.qcompile_cpu.scaled_linear(
            inputs, params[0], params[1] if len(params) > 1 else None, codes, scales, zeros, sums, bias, ends, zero,
            out, dtype,
        )  # fmt: skip


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _columns(weight: WeightType, in_features: int) -> tuple[int, int]:
    """Number of groups as stored, and the columns of each."""
    if weight.group_size is None:
        return 1, _round_up(in_features, STEP)
    return weight.groups(in_features), weight.group_size


def _permuted(x: Tensor, permutation: Tensor, ends: Tensor | None) -> Tensor:
    """Columns of x in stored order: that of each row's expert where there are several."""
    if ends is None:
        return x.index_select(-1, permutation)
    owner = torch.searchsorted(ends, torch.arange(x.shape[0], dtype=ends.dtype), right=True)
    return x.gather(1, permutation.index_select(0, owner.clamp(max=ends.shape[0] - 1)).long())


def _padded(values: Tensor | None, rows: int) -> Tensor | None:
    """[(experts,) out, n] -> [experts * rows, n], where zeros fill up each expert."""
    if values is None:
        return None
    missing = rows - values.shape[-2]
    return (F.pad(values, (0, 0, 0, missing)) if missing else values).flatten(0, -2)


def _empty_panels(rows: int, columns: int, bits: int) -> Tensor:
    """Room for the codes of [rows, columns], in huge pages: decoding is a third faster than from small ones."""
    assert not native.unavailable()
    sizes = [rows // PANEL, columns // STEP, *([2] if bits > 4 else []), PANEL, 4]
    return torch.ops.qcompile_cpu.empty(sizes, torch.int8 if bits > 4 else torch.uint8)


def _panel_codes(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [rows, columns] -> [panels, steps, 64, 4] of two codes each, or int8 [panels, steps, 2, 64, 4]."""
    parts = codes.view(codes.shape[0] // PANEL, PANEL, codes.shape[1] // STEP, 2, 4)
    if bits > 4:
        return (parts ^ 0x80).view(torch.int8).permute(0, 2, 3, 1, 4).contiguous()
    return (parts[:, :, :, 0] | parts[:, :, :, 1] << 4).permute(0, 2, 1, 3).contiguous()


def _codes_of_panels(panels: Tensor, bits: int) -> Tensor:
    """Inverse of ``_panel_codes``."""
    if bits > 4:
        return (panels.permute(0, 3, 1, 2, 4).contiguous().view(torch.uint8) ^ 0x80).flatten(0, 1).flatten(1)
    return torch.stack([panels & 15, panels >> 4], 2).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1)


def _panel_values(values: Tensor) -> Tensor:
    """[rows, groups] -> [panels, groups, 64]"""
    return values.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def _values_of_panels(panels: Tensor) -> Tensor:
    """[(experts,) panels, groups, 64] -> [(experts *) rows, groups]"""
    return panels.transpose(-1, -2).flatten(0, -2)
