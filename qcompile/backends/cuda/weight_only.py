"""Float activations times integer weights: ``w2a16`` to ``w8a16``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ... import numerics
from ...kernels import NO_PARAMS
from ...types import PackedWeight, Scheme, Site
from . import layouts, tiles
from .kernels import TritonKernel, in_stored_order
from .layouts import COLUMNS, ROWS, Fragments, round_up
from .targets import Target, current

GROUPS = (32, 64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16)


class WeightOnly(TritonKernel):
    """Weights of up to 4 bits in 4, or of up to 8 in 8, turned into the dtype of the activations in registers.

    codes        uint8 [out' / 16, 16 in' * bits / 8], in the order of the tensor cores (``layouts.py``)
    pairs        [groups', out', 2] in the dtype of the activations: scale, and what is added to a code (zero point)
    permutation  int32 [in], as in the canonical weight, if it has one

    out' and in' are padded to multiples of 64 (in': and of the group) with scales of zero; experts come first.
    """

    kinds = ("linear", "experts")
    scales_like_input = True

    def __init__(self, bits: int, order: Fragments) -> None:
        self.bits = bits
        self.name = self.kind = f"w{bits}a16"
        self.what = f"integer weights of {'2 to 4' if bits == 4 else '5 to 8'} bits with float activations"
        super().__init__(order)

    def computes(self, scheme: Scheme) -> bool:
        bits = scheme.weight.bits
        return scheme.weight.number == "int" and scheme.activation is None and self.bits - 4 < bits <= self.bits

    def is_centered(self, scheme: Scheme) -> bool:
        """Whether every zero point is the middle of the stored codes, so that a kernel need not read it."""
        return scheme.weight.symmetric and scheme.weight.bits == self.bits

    def refuses_on(self, gpu: Target, site: Site, scheme: Scheme) -> str:
        if site.dtype not in _DTYPES:
            return f"multiplies bfloat16 and float16, not {site.dtype}: load the model with one of them"
        group = scheme.weight.group_size
        if group is not None and group not in GROUPS:
            return f"group size {group} is none of {', '.join(map(str, GROUPS))}"
        return ""

    def nbytes(self, site: Site, scheme: Scheme) -> int:
        rows, columns, groups = _stored(site.out_features, site.in_features, scheme)
        return max(1, site.experts) * rows * (columns * self.bits // 8 + groups * 2 * site.dtype.itemsize)

    def arrange(self, packed: PackedWeight) -> list[Tensor]:
        weight, (*experts, out, inn) = packed.scheme.weight, packed.shape
        rows, columns, groups = _stored(out, inn, packed.scheme)
        count = experts[0] if experts else 1
        codes = packed.codes.new_empty((count, rows // 16, columns * self.bits * 2))
        step = round_up(max(1, numerics.CHUNK // columns), ROWS)  # bounds the temporaries
        for expert, own in enumerate(packed.codes.view(count, out, -1)):
            for first in range(0, rows, step):
                some = numerics.unpack_codes(own[first : first + step], weight.bits, inn)
                some = layouts.pad_rows(some, min(step, rows - first), columns)
                some = some ^ 0x80 if self.bits == 8 else some
                tiled = layouts.to_fragments(some, self.bits, self.order)
                codes[expert, first // 16 : first // 16 + len(tiled)] = tiled
        zeros = packed.zeros
        if zeros is None:
            zeros = torch.full_like(packed.scales, 2 ** (weight.bits - 1), dtype=torch.uint8)
        offset = layouts.offset_of(self.bits, packed.scales.dtype)
        scales, zeros = (layouts.pad_rows(t, rows, groups) for t in (packed.scales, zeros))
        pairs = layouts.scale_pairs(scales, zeros, offset)
        tensors = [codes if experts else codes[0], pairs]
        return tensors if packed.permutation is None else [*tensors, packed.permutation]

    def restore(
        self,
        tensors: Sequence[Tensor],
        scheme: Scheme,
        shape: tuple[int, ...],
        activation: Mapping[str, Tensor] = NO_PARAMS,
    ) -> PackedWeight:
        codes, pairs, *permutation = tensors
        bits, (*experts, out, inn) = scheme.weight.bits, shape
        canonical = []
        for own in codes.view(-1, *codes.shape[-2:]):
            step = max(1, numerics.CHUNK // codes.shape[-1])
            for some in own.split(step):
                rows = layouts.from_fragments(some, self.bits, self.order)[:, :inn]
                canonical.append(numerics.pack_codes(rows ^ 0x80 if self.bits == 8 else rows, bits))
        packed = torch.cat(canonical).unflatten(0, (*experts, -1))[..., :out, :].contiguous()
        scales, zeros = layouts.from_scale_pairs(pairs, layouts.offset_of(self.bits, pairs.dtype))
        groups = scheme.weight.groups(inn)
        scales, zeros = (t[..., :out, :groups].contiguous() for t in (scales, zeros))
        return PackedWeight(
            scheme, shape, packed, scales, None if scheme.weight.symmetric else zeros, *permutation, **activation
        )

    def linear(self, x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, scheme: Scheme, out: int) -> Tensor:
        result = self._multiply(x.reshape(-1, x.shape[-1]), None, weight, bias, scheme, out)
        return result.view(*x.shape[:-1], out)

    def grouped_linear(
        self,
        x: Sequence[Tensor],
        ends: Tensor,
        weight: Sequence[Tensor],
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        return self._multiply(x[0], ends, weight, None, scheme, out)

    def _multiply(
        self, x: Tensor, ends: Tensor | None, weight: Sequence[Tensor], bias: Tensor | None, scheme: Scheme, out: int
    ) -> Tensor:
        """A known number of rows that is best computed in several parts: their sum is left to the graph, where it
        becomes part of what reads it."""
        codes, pairs, *permutation = weight
        x = in_stored_order(x, permutation, ends)
        experts = 0 if ends is None else ends.shape[0]
        stored = tiles.Weight.of(codes, self.kind, scheme.weight.group_size or 0, experts)
        splits = tiles.splits_in_graph(stored, x.shape[0], current())
        multiplied = torch.ops.qcompile_cuda.float_linear(
            x, codes, pairs, bias if splits < 2 else None, ends, self.bits, self.order == "wgmma",
            scheme.weight.group_size or 0, self.is_centered(scheme), out,
            splits if splits > 1 else 0,
        )  # fmt: skip
        if splits < 2:
            return multiplied
        total = multiplied.sum(0)
        return (total if bias is None else total + bias.float()).to(x.dtype)


def _stored(out: int, inn: int, scheme: Scheme) -> tuple[int, int, int]:
    """Rows, columns and groups of the prepared weight."""
    group = scheme.weight.group_size
    columns = round_up(inn, max(COLUMNS, group or 0))
    return round_up(out, ROWS), columns, columns // group if group else 1
