"""Float activations: npu_weight_quant_batchmatmul for a Linear, npu_grouped_matmul for experts.

Both compute ``x @ ((w + offset) * scale) + bias`` with signed codes w, so that a canonical weight ``(q - z) * s`` has
``w = q - 2 ** (b - 1)`` and ``offset = 2 ** (b - 1) - z``. Weights stay in the ordinary layout: for products with float
activations FRACTAL_NZ is documented inside of captured graphs only, and for experts not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...kernels import NO_PARAMS
from ...types import PackedWeight, Scheme, Site
from . import chips, contract, layouts
from .grouping import Groups, grouped_matmul
from .kernels import NPUKernel, npu, permuted


class WeightOnly(NPUKernel):
    """Tensors: codes, scales [groups, out], offsets like scales (only where there are any), permutation.

    Experts have a leading dimension; one scale per channel is [1, out], of experts [experts, out]. Offsets are stored
    for asymmetric weights, and for experts always, whose operation insists on them.

    Experts need positive scales (their kernel loses accuracy otherwise, as users of AutoRound checkpoints found out).
    Where a symmetric scale is negative, ``w * s = (~w + 1) * -s`` says the same exactly: the codes are inverted and the
    offset is 1.
    """

    stored_bits = 8
    scales_like_input = True

    def computes(self, scheme: Scheme) -> bool:
        return self.can_express(scheme) and (scheme.weight.bits > 4) == (self.stored_bits == 8)

    def can_express(self, scheme: Scheme) -> bool:
        return scheme.weight.number == "int" and scheme.activation is None and scheme.weight.bits <= self.stored_bits

    def nbytes(self, site: Site, scheme: Scheme) -> int:
        tables = 2 if site.experts or not scheme.weight.symmetric else 1
        scales = scheme.weight.groups(site.in_features) * site.out_features * site.dtype.itemsize
        codes = site.in_features * site.out_features * self.stored_bits // 8
        return max(1, site.experts) * (codes + tables * scales)

    def prepare(self, packed: PackedWeight) -> list[Tensor]:
        weight, inn = packed.scheme.weight, packed.shape[-1]
        scales, half = packed.scales, 2 ** (weight.bits - 1)
        is_experts = len(packed.shape) == 3
        offsets = None if packed.zeros is None else half - packed.zeros.to(torch.int16)
        change: layouts.Change = layouts.unchanged
        if is_experts and offsets is None:
            offsets = (scales < 0).to(torch.int16)
            change = _inverting(offsets, weight.group_size or inn)
            scales = scales.abs()
        tables = [table.to(scales.dtype) for table in (scales, offsets) if table is not None]
        tables = [table.transpose(-1, -2).contiguous() for table in tables]
        if is_experts and scales.shape[-1] == 1:
            tables = [table.squeeze(1) for table in tables]
        codes = self._stored(packed.codes, weight.bits, inn, change)
        return [codes, *tables, *_optional(packed.permutation)]

    def restore(
        self,
        tensors: Sequence[Tensor],
        scheme: Scheme,
        shape: tuple[int, ...],
        activation: Mapping[str, Tensor] = NO_PARAMS,
    ) -> PackedWeight:
        weight, is_experts = scheme.weight, len(shape) == 3
        stored, *tables = tensors
        count = 2 if is_experts or not weight.symmetric else 1
        tables, permutation = tables[:count], tables[count:]
        if is_experts and tables[0].dim() == 2:
            tables = [table[:, None] for table in tables]
        scales, *offsets = [table.transpose(-1, -2).contiguous() for table in tables]
        change: layouts.Change = layouts.unchanged
        zeros = None
        if weight.symmetric and is_experts:
            change = _inverting(offsets[0], weight.group_size or shape[-1])
            scales = torch.where(offsets[0] == 1, -scales, scales)
        elif offsets:
            zeros = (2 ** (weight.bits - 1) - offsets[0].to(torch.int16)).to(torch.uint8)
        codes = self._restored(stored, weight.bits, change)
        return PackedWeight(scheme, shape, codes, scales, zeros, *permutation, **activation)

    def _stored(self, codes: Tensor, bits: int, columns: int, change: layouts.Change) -> Tensor:
        return layouts.to_int8(codes, bits, columns, change)

    def _restored(self, stored: Tensor, bits: int, change: layouts.Change) -> Tensor:
        return layouts.from_int8(stored, bits, change)

    def linear(self, x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, scheme: Scheme, out: int) -> Tensor:
        codes, scales, offsets, permutation = _split(weight, scheme, is_experts=False)
        rows = permuted(x.reshape(-1, x.shape[-1]), permutation)
        size = scheme.weight.group_size
        result = npu.npu_weight_quant_batchmatmul.default(
            rows, codes, scales.to(x.dtype), None if offsets is None else offsets.to(x.dtype), None, None,
            None if bias is None else bias.to(torch.float32 if x.dtype == torch.bfloat16 else x.dtype),
            0 if size is None or size >= x.shape[-1] else size,
        )  # fmt: skip
        return result.view(*x.shape[:-1], out)

    def grouped(
        self, x: Sequence[Tensor], groups: Groups, weight: Sequence[Tensor], scheme: Scheme, dtype: torch.dtype
    ) -> Tensor:
        codes, scales, offsets, permutation = _split(weight, scheme, is_experts=True)
        rows = permuted(x[0], permutation, groups)
        assert offsets is not None
        tables = {"antiquant_scale": scales.to(rows.dtype), "antiquant_offset": offsets.to(rows.dtype)}
        return grouped_matmul(rows, codes, groups, rows.dtype, **tables).to(dtype)


class Int8WeightOnly(WeightOnly):
    """int8 codes [..., in, out]; weights of fewer bits fit as well, and 4-bit ones that int4 words cannot hold."""

    name = "weight_int8"
    what = "integer weights with float activations"
    rules = (
        contract.chip_has(chips.WEIGHT_QUANT_INT8), contract.half_precision, contract.within_limits,
        contract.groups_of_32, contract.channels_for_experts,
    )  # fmt: skip


class Int4WeightOnly(WeightOnly):
    """int4 words [..., in, out / 8], for weights of 2 to 4 bits."""

    name = "weight_int4"
    stored_bits = 4
    what = "integer weights of at most 4 bits with float activations"
    rules = (
        contract.chip_has(chips.WEIGHT_QUANT_INT4), contract.half_precision, contract.within_limits,
        contract.groups_of_32, contract.whole_int4_outputs, contract.more_than_one_word,
    )  # fmt: skip

    def _stored(self, codes: Tensor, bits: int, columns: int, change: layouts.Change) -> Tensor:
        return layouts.to_int4(codes, bits, columns, change).view(torch.int32)

    def _restored(self, stored: Tensor, bits: int, change: layouts.Change) -> Tensor:
        return layouts.from_int4(stored, bits, change)


def _optional(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


def _split(
    weight: Sequence[Tensor], scheme: Scheme, is_experts: bool
) -> tuple[Tensor, Tensor, Tensor | None, Sequence[Tensor]]:
    """(codes, scales, offsets, permutation) of what ``prepare`` made."""
    codes, scales, *rest = weight
    offsets = rest.pop(0) if is_experts or not scheme.weight.symmetric else None
    return codes, scales, offsets, rest


def _inverting(flipped: Tensor, group_size: int) -> layouts.Change:
    """Inverts every bit of the groups whose ``flipped`` [..., out, groups] is 1."""

    def change(place: layouts.Place, values: Tensor) -> Tensor:
        own = flipped[place].to(torch.int8).repeat_interleave(group_size, dim=-1)[:, : values.shape[1]]
        return values ^ -own

    return change
