"""Quantized activations times quantized weights: ``w8a8``, ``w4a8``, ``w4a4`` and fp8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import numerics
from ...errors import UnsupportedError
from ...kernels import NO_PARAMS
from ...types import PackedWeight, Scheme, Site
from . import layouts, tiles
from .kernels import TritonKernel, in_stored_order, owners
from .layouts import COLUMNS, ROWS, round_up
from .targets import Target, current

LONGEST = 2**17 - 1  # input features whose products, 16 * 8 * 128 at most, a 32-bit sum holds
INT_GROUPS = (32, 64, 128, 256)
BLOCK = (128, 128)


class ScaledKernel(TritonKernel):
    """What integers and fp8 have in common: how a product is asked for, and finished where the graph must do it."""

    kinds = ("linear", "experts")
    kind = ""

    def __init__(self) -> None:  # one layout for all GPUs
        pass

    def scale_rows(self, scheme: Scheme, out: int) -> int:
        """Channels that share a scale."""
        return 1

    def scaled_linear(
        self,
        x: Sequence[Tensor],
        weight: Sequence[Tensor],
        bias: Tensor | None,
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        codes, *params = x
        flat = [p.reshape(-1, p.shape[-1]) if p.dim() > 1 else p for p in params]
        result = self._multiply([codes.reshape(-1, codes.shape[-1]), *flat], None, weight, bias, scheme, out, dtype)
        return result.view(*codes.shape[:-1], out)

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

    def _multiply(
        self,
        x: Sequence[Tensor],
        ends: Tensor | None,
        weight: Sequence[Tensor],
        bias: Tensor | None,
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        raise NotImplementedError

    def _product(
        self,
        x: Tensor,
        x_scale: Tensor,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        ends: Tensor | None,
        scale_rows: int,
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
        correction: Tensor | None = None,
    ) -> Tensor:
        """``x_scale * (x @ W.T + correction) + bias``.

        In several parts, for a known number of rows, or with a correction, the sums are finished in the graph.
        """
        group = scheme.weight.scale_columns or 0
        grouped = scheme.weight.block is not None and x_scale.shape[-1] > 1
        experts = 0 if ends is None else ends.shape[0]
        stored = tiles.Weight.of(codes, self.kind, group, experts)
        splits = tiles.splits_in_graph(stored, x.shape[0], current())
        partial = splits if splits > 1 else 1 if correction is not None else 0
        result = torch.ops.qcompile_cuda.scaled_linear(
            x, x_scale if grouped or not partial else None, codes, scales, None if partial else bias, ends, self.kind,
            group, scale_rows, grouped, out, partial, dtype,
        )  # fmt: skip
        if not partial:
            return result
        total = result.sum(0) if partial > 1 else result[0]
        total = total if correction is None else total + correction
        total = total if grouped else total * x_scale
        return (total if bias is None else total + bias.float()).to(dtype)


class Integers(ScaledKernel):
    """int8 tensor cores. ``bits`` 8: int8 weights; 4: codes of up to 4 bits, which become int8 in registers.

    codes        int8 [out', in'], q minus the middle code; of 4 bits uint8 [out' / 16, 8 in'] (``layouts.py``)
    pairs        [groups', out', 2] in the dtype of the scales: scale, and the middle code minus the zero point
    sums         float32 [out], of the scaled weights, where activations have a zero point
    permutation  int32 [in], if there is one

    Zero points, of weights and of activations, are corrections that the graph adds: products of row sums.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.kind = bits, f"int{bits}"
        self.name = f"w{bits}a8"
        self.what = f"integer weights of {'2 to 4' if bits == 4 else '5 to 8'} bits with integer activations"

    def computes(self, scheme: Scheme) -> bool:
        weight, activation = scheme.weight, scheme.activation
        of_integers = weight.number == "int" and activation is not None
        return of_integers and self.bits - 4 < weight.bits <= self.bits

    def refuses_on(self, gpu: Target, site: Site, scheme: Scheme) -> str:
        group = scheme.weight.group_size
        if group is not None and group not in INT_GROUPS:
            return (
                f"group size {group} is none of {', '.join(map(str, INT_GROUPS))}, of which a step of a product has "
                "one or two"
            )
        if site.in_features > LONGEST:
            return f"{site.in_features} input features are more than {LONGEST}, whose products a 32-bit sum holds"
        return ""

    def nbytes(self, site: Site, scheme: Scheme) -> int:
        rows, columns, groups = _stored(site.out_features, site.in_features, scheme)
        one = rows * (columns * self.bits // 8 + groups * 2 * site.dtype.itemsize)
        return max(1, site.experts) * (one + (4 * site.out_features if _has_zero(scheme) else 0))

    def arrange(self, packed: PackedWeight) -> list[Tensor]:
        weight, (*experts, out, inn) = packed.scheme.weight, packed.shape
        rows, columns, groups = _stored(out, inn, packed.scheme)
        middle, count = 2 ** (weight.bits - 1), experts[0] if experts else 1
        shape = (rows // 16, columns * 8) if self.bits == 4 else (rows, columns)
        codes = packed.codes.new_empty((count, *shape))
        step, high = round_up(max(1, numerics.CHUNK // columns), ROWS), 16 if self.bits == 4 else 1
        for expert, own in enumerate(packed.codes.view(count, out, -1)):
            for first in range(0, rows, step):
                signed = numerics.unpack_codes(own[first : first + step], weight.bits, inn).view(torch.int8) - middle
                some = layouts.pad_rows(signed, min(step, rows - first), columns).view(torch.uint8)
                some = layouts.to_fragments(some & 15, 4, "int8") if self.bits == 4 else some
                codes[expert, first // high : first // high + len(some)] = some
        zeros = packed.zeros
        if zeros is None:
            zeros = torch.full_like(packed.scales, middle, dtype=torch.uint8)
        scales, zeros = (layouts.pad_rows(t, rows, groups) for t in (packed.scales, zeros))
        pairs = layouts.scale_pairs(scales, zeros, -middle)
        codes = codes if self.bits == 4 else codes.view(torch.int8)
        tensors = [codes if experts else codes[0], pairs]
        if _has_zero(packed.scheme):
            tensors.append(_weight_sums(packed))
        return tensors if packed.permutation is None else [*tensors, packed.permutation]

    def restore(
        self,
        tensors: Sequence[Tensor],
        scheme: Scheme,
        shape: tuple[int, ...],
        activation: Mapping[str, Tensor] = NO_PARAMS,
    ) -> PackedWeight:
        codes, pairs, _, permutation = _named(tensors, scheme)
        bits, (*experts, out, inn) = scheme.weight.bits, shape
        middle, canonical = 2 ** (bits - 1), []
        for own in codes.view(-1, *codes.shape[-2:]):
            for some in own.split(max(1, numerics.CHUNK // codes.shape[-1])):
                signed = some
                if self.bits == 4:
                    signed = (layouts.from_fragments(some, 4, "int8") ^ 8).view(torch.int8) - 8
                canonical.append(numerics.pack_codes((signed[:, :inn] + middle).view(torch.uint8), bits))
        packed = torch.cat(canonical).unflatten(0, (*experts, -1))[..., :out, :].contiguous()
        scales, zeros = layouts.from_scale_pairs(pairs, -middle)
        scales, zeros = (t[..., :out, : scheme.weight.groups(inn)].contiguous() for t in (scales, zeros))
        return PackedWeight(
            scheme, shape, packed, scales, None if scheme.weight.symmetric else zeros, permutation, **activation
        )

    def _multiply(
        self,
        x: Sequence[Tensor],
        ends: Tensor | None,
        weight: Sequence[Tensor],
        bias: Tensor | None,
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        codes, scale, *zero = x
        stored, pairs, sums, permutation = _named(weight, scheme)
        codes = in_stored_order(codes, [] if permutation is None else [permutation], ends)
        correction = None
        if sums is not None:
            correction = -zero[0] * (sums if ends is None else sums.index_select(0, owners(codes, ends)))
        if not scheme.weight.symmetric:
            shifted = self._shifts(codes, pairs, scheme, out, ends)
            correction = shifted if correction is None else correction + shifted
        return self._product(codes, scale, stored, pairs, bias, ends, 1, scheme, out, dtype, correction)

    def _shifts(self, codes: Tensor, pairs: Tensor, scheme: Scheme, out: int, ends: Tensor | None) -> Tensor:
        """What zero points of the weight add: sums of each row's groups, times scale * (middle code - zero point)."""
        groups = pairs.shape[-3]
        size = scheme.weight.group_size or codes.shape[-1]
        padded = F.pad(codes, (0, groups * size - codes.shape[-1]))
        sums = padded.view(-1, groups, size).sum(-1, dtype=torch.int32).float()
        shifts = (pairs[..., 0].float() * pairs[..., 1].float())[..., :out]
        if ends is None:
            return sums @ shifts
        return torch.bmm(sums[:, None], shifts.index_select(0, owners(codes, ends)))[:, 0]


class Fp8(ScaledKernel):
    """e4m3 tensor cores: scales per channel, for the whole tensor, or for blocks of 128 x 128.

    codes    float8_e4m3fn [out', in'], padded with zeros to multiples of 64 (blocks: 128 columns)
    scales   as in the canonical weight
    """

    name = "fp8"
    kind = "fp8"
    what = "e4m3 weights with e4m3 activations"

    def computes(self, scheme: Scheme) -> bool:
        return scheme.weight.number == "fp8" and scheme.activation is not None

    def refuses_on(self, gpu: Target, site: Site, scheme: Scheme) -> str:
        if gpu.arch or not gpu.has_fp8:
            return f"{gpu.name} does not multiply e4m3; NVIDIA GPUs do from sm_89 on. w8a8 runs there"
        if scheme.weight.block not in (None, BLOCK):
            return f"blocks of {scheme.weight.block[0]} x {scheme.weight.block[1]} are not 128 x 128"
        if scheme.weight.group_size is not None:
            return f"groups of {scheme.weight.group_size}: it has scales per channel, per tensor and per 128 x 128"
        return ""

    def nbytes(self, site: Site, scheme: Scheme) -> int:
        rows, columns = self._stored(site.out_features, site.in_features, scheme)
        weight = scheme.weight
        scales = weight.scale_rows(site.out_features) * weight.groups(site.in_features)
        return max(1, site.experts) * (rows * columns + scales * site.dtype.itemsize)

    @staticmethod
    def _stored(out: int, inn: int, scheme: Scheme) -> tuple[int, int]:
        return round_up(out, ROWS), round_up(inn, BLOCK[1] if scheme.weight.block else COLUMNS)

    def arrange(self, packed: PackedWeight) -> list[Tensor]:
        if packed.permutation is not None and packed.scheme.weight.block:
            raise UnsupportedError(
                f"a {packed.scheme} weight with permuted columns: they are no longer in the blocks whose activations "
                "share a scale"
            )
        rows, columns = self._stored(packed.shape[-2], packed.shape[-1], packed.scheme)
        codes = layouts.pad_rows(packed.codes, rows, columns)
        tensors = [codes.contiguous().view(torch.float8_e4m3fn), packed.scales]
        return tensors if packed.permutation is None else [*tensors, packed.permutation]

    def restore(
        self,
        tensors: Sequence[Tensor],
        scheme: Scheme,
        shape: tuple[int, ...],
        activation: Mapping[str, Tensor] = NO_PARAMS,
    ) -> PackedWeight:
        codes, scales, *permutation = tensors
        out, inn = shape[-2:]
        canonical = codes.view(torch.uint8)[..., :out, :inn].contiguous()
        return PackedWeight(scheme, shape, canonical, scales, None, *permutation, **activation)

    def _multiply(
        self,
        x: Sequence[Tensor],
        ends: Tensor | None,
        weight: Sequence[Tensor],
        bias: Tensor | None,
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        codes, scale = x
        stored, scales, *permutation = weight
        codes = in_stored_order(codes.view(torch.uint8), permutation, ends).view(torch.float8_e4m3fn)
        rows = self.scale_rows(scheme, out)
        return self._product(codes, scale, stored, scales, bias, ends, rows, scheme, out, dtype)

    def scale_rows(self, scheme: Scheme, out: int) -> int:
        return BLOCK[0] if scheme.weight.block else round_up(out, ROWS) if scheme.weight.per_tensor else 1


def _stored(out: int, inn: int, scheme: Scheme) -> tuple[int, int, int]:
    """Rows, columns and groups of the prepared weight."""
    group = scheme.weight.group_size
    columns = round_up(inn, max(COLUMNS, group or 0))
    return round_up(out, ROWS), columns, columns // group if group else 1


def _has_zero(scheme: Scheme) -> bool:
    return scheme.activation is not None and not scheme.activation.symmetric


def _named(tensors: Sequence[Tensor], scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(codes, pairs, sums, permutation) from the list that ``Integers.arrange`` gave."""
    codes, pairs, *rest = tensors
    sums = rest.pop(0) if _has_zero(scheme) else None
    return codes, pairs, sums, rest[0] if rest else None


def _weight_sums(packed: PackedWeight) -> Tensor:
    """float32 [(experts,) out]: the sum of each row of the dequantized weight, a few rows at a time."""
    scheme, inn = packed.scheme, packed.shape[-1]
    codes, scales = packed.codes.flatten(0, -2), packed.scales.flatten(0, -2)
    zeros = None if packed.zeros is None else packed.zeros.flatten(0, -2)
    step = max(1, numerics.CHUNK // max(1, inn))
    sums = []
    for first in range(0, codes.shape[0], step):
        own = slice(first, first + step)
        part = None if zeros is None else zeros[own]
        weight = numerics.dequantize(codes[own], scales[own], part, None, scheme, inn, None, torch.float64)
        sums.append(weight.sum(-1).float())
    return torch.cat(sums).view(packed.shape[:-1])
