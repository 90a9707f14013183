"""int8 times int8: npu_quant_matmul for a Linear, npu_grouped_matmul for experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...types import PackedWeight, Scheme, Site
from . import chips, contract, layouts
from .grouping import Counts, Groups, Pairs, grouped_matmul, swiglu_quantized
from .integers import (
    IntegerKernel,
    has_stored_zero,
    is_static,
    scales_per_token,
    token_matmul_on_chip,
    zero_correction,
)  # fmt: skip
from .kernels import npu, number_of, permuted


class Int8Matmul(IntegerKernel):
    """int8 times int8: the weight [..., in, out], scales as float32, and a zero point's correction where there is one.

    Fewer bits fit as well, of weights and of activations, so that this is what narrower kernels fall back to.
    """

    name = "int8"
    kinds = ("linear", "experts")
    what = "integer weights with integer activations"
    rules = (
        token_matmul_on_chip, contract.half_precision, contract.within_limits, contract.one_scale_per_channel,
        contract.symmetric_weight, contract.no_token_zeros, scales_per_token,
    )  # fmt: skip
    nz_rules = (contract.nz_is_wanted, contract.chip_has(chips.NZ), contract.nz_aligned(32))

    def nbytes(self, site: Site, scheme: Scheme) -> int:
        tables = site.dtype.itemsize + 4 + (4 if has_stored_zero(scheme) else 0)
        return max(1, site.experts) * site.out_features * (site.in_features + tables)

    def _tables(self, packed: PackedWeight) -> list[Tensor]:
        return [packed.scales.squeeze(-1).float(), *zero_correction(packed)]

    def _table_count(self, scheme: Scheme) -> int:
        return 1 + has_stored_zero(scheme)

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
        rows = permuted(codes.reshape(-1, codes.shape[-1]), permutation)
        result = npu.npu_quant_matmul.default(
            rows, stored, scales, pertoken_scale=scale.reshape(-1), output_dtype=number_of(dtype),
            bias=None if bias is None else bias.float() if dtype == torch.float16 else bias.to(dtype),
        )  # fmt: skip
        return result.view(*codes.shape[:-1], out)

    def grouped(
        self, x: Sequence[Tensor], groups: Groups, weight: Sequence[Tensor], scheme: Scheme, dtype: torch.dtype
    ) -> Tensor:
        codes, scale = x[:2]
        stored, canonical, wide, *rest = weight
        correction = rest.pop(0) if has_stored_zero(scheme) else None
        return grouped_matmul(
            permuted(codes, rest, groups), stored, groups, dtype, bias=correction,
            scale=canonical.squeeze(-1).to(dtype) if dtype == torch.bfloat16 else wide,
            per_token_scale=scale.reshape(-1),
        )  # fmt: skip

    def swiglu_quantized(
        self, x: Sequence[Tensor], groups: Counts, weight: Sequence[Tensor], scheme: Scheme
    ) -> list[Tensor] | None:
        """npu_grouped_matmul_swiglu_quant_v2: FRACTAL_NZ weights, one scale per token."""
        codes, scale = x[:2]
        stored, _, scales, *permutation = weight
        _, inputs, outputs = stored.shape
        if not self.nz or is_static(scheme) or not contract.swiglu_fits(inputs, outputs, bits=8):
            return None
        return swiglu_quantized(permuted(codes, permutation, groups), stored, scales, scale, groups)

    def sums(self, weight: Sequence[Tensor], scheme: Scheme, rows: int | torch.SymInt) -> bool:
        """npu_grouped_matmul_finalize_routing: FRACTAL_NZ weights, and a number of tokens that is known beforehand."""
        experts, _, outputs = weight[0].shape
        if not self.nz or is_static(scheme) or not isinstance(rows, int):
            return False
        return contract.sum_fits(experts, outputs, rows)

    def summed(
        self,
        x: Sequence[Tensor],
        groups: Counts,
        weight: Sequence[Tensor],
        scheme: Scheme,
        pairs: Pairs,
        routing: Tensor,
    ) -> Tensor:
        codes, scale = x
        stored, _, scales, *permutation = weight
        tokens, k = routing.shape
        return npu.npu_grouped_matmul_finalize_routing.default(
            permuted(codes, permutation, groups), stored, groups.values, scale=scales,
            pertoken_scale=scale.reshape(-1), logit=routing.float().reshape(-1).index_select(0, pairs.pair),
            row_index=(pairs.pair // k).long(), output_bs=tokens, group_list_type=groups.list_type,
        )  # fmt: skip


class Int8Static(IntegerKernel):
    """int8 times int8 with one stored scale for all activations: a Linear's scales are multiplied beforehand.

    Tables: their product with the activations' scale, float32 [out], for bfloat16 results; the same as quant parameters
    for float16 ones, whose operation would otherwise convert them at every call; a zero point's correction.
    """

    name = "int8_static"
    kinds = ("linear",)
    what = "integer weights with static integer activations"
    rules = (
        contract.chip_has(chips.STATIC_MATMUL), contract.half_precision, contract.within_limits,
        contract.one_scale_per_channel, contract.symmetric_weight,
    )  # fmt: skip
    nz_rules = (contract.nz_is_wanted, contract.chip_has(chips.NZ), contract.nz_aligned(32))

    def computes(self, scheme: Scheme) -> bool:
        return super().computes(scheme) and is_static(scheme)

    def nbytes(self, site: Site, scheme: Scheme) -> int:
        tables = site.dtype.itemsize + 4 + 8 + (4 if has_stored_zero(scheme) else 0)
        return site.out_features * (site.in_features + tables)

    def _tables(self, packed: PackedWeight) -> list[Tensor]:
        assert packed.input_scale is not None
        scales = packed.scales.squeeze(-1).float() * packed.input_scale
        return [scales, layouts.to_quant_parameter(scales), *zero_correction(packed)]

    def _table_count(self, scheme: Scheme) -> int:
        return 2 + has_stored_zero(scheme)

    def scaled_linear(
        self,
        x: Sequence[Tensor],
        weight: Sequence[Tensor],
        bias: Tensor | None,
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """An int32 bias is added to the sums and a float one after the scale; float16 results have no float one."""
        codes = x[0]
        stored, _, scales, parameters, *rest = weight
        correction = rest.pop(0) if has_stored_zero(scheme) else None
        rows = permuted(codes.reshape(-1, codes.shape[-1]), rest)
        is_half = dtype == torch.float16
        inside = correction
        if bias is not None and not is_half:
            inside = bias if correction is None else torch.addcmul(bias.float(), correction.float(), scales)
        result = npu.npu_quant_matmul.default(
            rows, stored, parameters if is_half else scales, bias=inside, output_dtype=number_of(dtype)
        )
        if bias is not None and is_half:
            result = result + bias
        return result.view(*codes.shape[:-1], out)
