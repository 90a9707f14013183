"""int4 weights: with int8 activations npu_grouped_matmul, with int4 ones npu_quant_matmul or npu_grouped_matmul."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...numerics import pack_int4, unpack_int4
from ...types import PackedWeight, Scheme, Site
from . import chips, contract, layouts
from .grouping import Counts, Ends, Groups, grouped_matmul, swiglu_quantized
from .integers import IntegerKernel, is_static, token_matmul_on_chip
from .kernels import npu, number_of, permuted


class Int8Int4(IntegerKernel):
    """int8 activations times int4 weights: npu_grouped_matmul, which for a Linear has one group.

    Tables: scale containers int64 [experts, groups, out] and the compensation float32 [experts, out]. Scales of groups
    are rounded to float16, in which the operation adds up its partial sums. It overwrites its activations: those of a
    Linear, which others may read, are copied first.
    """

    name = "int8_int4"
    kinds = ("linear", "experts")
    what = "integer weights of at most 4 bits with dynamic integer activations"
    rules = (
        contract.chip_has(chips.GROUPED_MATMUL, chips.DYNAMIC_QUANT), contract.half_precision,
        contract.within_limits, contract.int8_int4_groups, contract.int8_int4_inputs, contract.whole_int4_outputs,
        contract.more_than_one_word, contract.symmetric_weight, contract.no_token_zeros,
    )  # fmt: skip
    nz_rules = (contract.nz_is_wanted, contract.chip_has(chips.NZ), contract.nz_aligned(64))

    def computes(self, scheme: Scheme) -> bool:
        return super().computes(scheme) and scheme.weight.bits <= 4 and not is_static(scheme)

    def nbytes(self, site: Site, scheme: Scheme) -> int:
        groups = scheme.weight.groups(site.in_features)
        tables = groups * (site.dtype.itemsize + 8) + 4
        return max(1, site.experts) * site.out_features * (site.in_features // 2 + tables)

    def _codes(self, codes: Tensor, bits: int, columns: int) -> Tensor:
        stored = layouts.to_int4(codes if codes.dim() == 3 else codes[None], bits, columns)
        return (layouts.to_nz(stored) if self.nz else stored).view(torch.int32)

    def _restored_codes(self, stored: Tensor, bits: int) -> Tensor:
        return layouts.from_int4(_words_in_order(stored), bits)

    def _tables(self, packed: PackedWeight) -> list[Tensor]:
        codes, scales = (t if t.dim() == 3 else t[None] for t in (packed.codes, packed.scales))
        bits, inn = packed.scheme.weight.bits, packed.shape[-1]
        exact = scales.float() if scales.shape[-1] == 1 else scales.to(torch.float16).float()
        bias = layouts.compensation(codes, bits, inn, exact, packed.scheme.weight.group_size or inn)
        return [layouts.to_container(exact.transpose(-1, -2)), bias]

    def _table_count(self, scheme: Scheme) -> int:
        return 2

    def scaled_linear(
        self,
        x: Sequence[Tensor],
        weight: Sequence[Tensor],
        bias: Tensor | None,
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        codes, scale = x
        rows = codes.reshape(-1, codes.shape[-1])
        permutation = weight[4:]
        groups = Ends(torch.full((1,), rows.shape[0], dtype=torch.int64, device=rows.device))
        own = permuted(rows, permutation) if permutation else rows.clone()
        result = self.grouped([own, scale], groups, weight[:4], scheme, dtype).view(*codes.shape[:-1], out)
        return result if bias is None else result + bias

    def grouped_linear(
        self,
        x: Sequence[Tensor],
        ends: Tensor,
        weight: Sequence[Tensor],
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        codes, scale = x
        return super().grouped_linear([codes.clone(), scale], ends, weight, scheme, out, dtype)

    def grouped(
        self, x: Sequence[Tensor], groups: Groups, weight: Sequence[Tensor], scheme: Scheme, dtype: torch.dtype
    ) -> Tensor:
        """Overwrites x. Without looking the operation takes any list for counts: ends would give garbage."""
        codes, scale = x
        stored, _, containers, bias, *permutation = weight
        counts: Groups = groups if stored.shape[0] == 1 else groups.counts()
        return grouped_matmul(
            permuted(codes, permutation, groups), stored, counts, dtype,
            scale=containers, bias=bias, per_token_scale=scale.reshape(-1),
        )  # fmt: skip

    def swiglu_quantized(
        self, x: Sequence[Tensor], groups: Counts, weight: Sequence[Tensor], scheme: Scheme
    ) -> list[Tensor] | None:
        """npu_grouped_matmul_swiglu_quant_v2, whose assist matrix is the compensation."""
        codes, scale = x
        stored, _, containers, assist, *permutation = weight
        inputs, outputs = stored.shape[1], 8 * stored.shape[2]
        if not contract.swiglu_fits(inputs, outputs, bits=4):
            return None
        one = containers.shape[1] == 1
        scales = containers.squeeze(1) if one else containers
        rows = permuted(codes, permutation, groups)
        return swiglu_quantized(rows, stored, scales, scale, groups, assist, 0 if one else 1)


class Int4Matmul(IntegerKernel):
    """int4 times int4: both as int4 words.

    Tables: for a Linear scales as float32 [out], for experts scale containers [experts, 1, out]. Activations come as
    words already (the pass ``pack_activations`` sees to that) or as int8 codes, which are packed here. The operations
    have no bias. npu_quant_matmul takes the ordinary layout, npu_grouped_matmul FRACTAL_NZ alone.
    """

    name = "int4"
    takes_words = True
    what = "integer weights of at most 4 bits with dynamic 4-bit activations"
    rules = (
        token_matmul_on_chip, contract.half_precision, contract.within_limits, contract.one_scale_per_channel,
        contract.symmetric_weight, contract.no_token_zeros, contract.whole_int4_inputs, contract.whole_int4_outputs,
    )  # fmt: skip
    nz_rules = (contract.nz_is_wanted, contract.chip_has(chips.NZ), contract.nz_aligned(64))

    def __init__(self, nz: bool = False) -> None:
        super().__init__(nz)
        self.kinds = ("experts",) if nz else ("linear",)

    def computes(self, scheme: Scheme) -> bool:
        activation = scheme.activation
        small = scheme.weight.bits <= 4 and activation is not None and activation.bits == 4
        return super().computes(scheme) and small and not is_static(scheme)

    def nbytes(self, site: Site, scheme: Scheme) -> int:
        tables = site.dtype.itemsize + (8 if site.experts else 4)
        return max(1, site.experts) * site.out_features * (site.in_features // 2 + tables)

    def _codes(self, codes: Tensor, bits: int, columns: int) -> Tensor:
        stored = layouts.to_int4(codes, bits, columns)
        return (layouts.to_nz(stored) if self.nz else stored).view(torch.int32)

    def _restored_codes(self, stored: Tensor, bits: int) -> Tensor:
        return layouts.from_int4(_words_in_order(stored), bits)

    def _tables(self, packed: PackedWeight) -> list[Tensor]:
        if len(packed.shape) == 3:
            return [layouts.to_container(packed.scales.transpose(-1, -2))]
        return [packed.scales.squeeze(-1).float()]

    def _table_count(self, scheme: Scheme) -> int:
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
        codes, scale = x
        stored, _, scales, *permutation = weight
        words = _words(codes.reshape(-1, codes.shape[-1]), permutation)
        result = npu.npu_quant_matmul.default(
            words, stored, scales, pertoken_scale=scale.reshape(-1), output_dtype=number_of(dtype)
        ).view(*codes.shape[:-1], out)
        return result if bias is None else result + bias

    def grouped(
        self, x: Sequence[Tensor], groups: Groups, weight: Sequence[Tensor], scheme: Scheme, dtype: torch.dtype
    ) -> Tensor:
        codes, scale = x
        stored, _, containers, *permutation = weight
        words = _words(codes, permutation, groups)
        return grouped_matmul(words, stored, groups, dtype, scale=containers, per_token_scale=scale.reshape(-1))


def _words(codes: Tensor, permutation: Sequence[Tensor], groups: Groups | None = None) -> Tensor:
    """Activations as int4 words, in the order of the weight's columns."""
    if codes.dtype == torch.int32:
        if not permutation:
            return codes
        codes = unpack_int4(codes)
    return pack_int4(permuted(codes, permutation, groups))


def _words_in_order(stored: Tensor) -> Tensor:
    """int4 words in the ordinary layout; FRACTAL_NZ was made of, and is undone on, pairs."""
    return layouts.to_nd(stored.view(torch.int8)).view(torch.int32)
