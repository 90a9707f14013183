"""Quantized activations: npu_quant_matmul for a Linear, npu_grouped_matmul for experts.

Beside what an operation reads, each kernel keeps the canonical scales, so that ``restore`` is exact; that is 2 bytes
for each output channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...kernels import NO_PARAMS
from ...numerics import pack_int4, unpack_int4
from ...types import PackedWeight, Scheme, Site
from . import chips, contract, layouts
from .grouping import Ends, Groups, grouped_matmul
from .kernels import NPUKernel, npu, number_of, permuted


def is_static(scheme: Scheme) -> bool:
    """Whether activations have stored scales."""
    return scheme.activation is not None and not scheme.activation.dynamic


def has_stored_zero(scheme: Scheme) -> bool:
    """Whether activations have a stored zero point."""
    return is_static(scheme) and not scheme.activation.symmetric  # type: ignore[union-attr]


def zero_correction(packed: PackedWeight) -> list[Tensor]:
    """``-z * sum_k w[n, k]``, int32 [..., out], where activations have a stored zero point z; empty otherwise."""
    if packed.input_zero is None:
        return []
    zero = packed.input_zero[:, None] if len(packed.shape) == 3 else packed.input_zero
    return [-zero * layouts.column_sums(packed.codes, packed.scheme.weight.bits, packed.shape[-1])]


def token_matmul_on_chip(site: Site, scheme: Scheme) -> str:
    """The chip has what products with a scale per token are made of."""
    operation = chips.GROUPED_MATMUL if site.experts else chips.TOKEN_MATMUL
    return contract.chip_has(operation, *(() if is_static(scheme) else (chips.DYNAMIC_QUANT,)))(site, scheme)


def scales_per_token(site: Site, scheme: Scheme) -> str:
    """A Linear with one stored scale for all tokens has a kernel of its own."""
    return "a static scale of a Linear belongs to int8_static" if is_static(scheme) and not site.experts else ""


class IntegerKernel(NPUKernel):
    """A kernel whose tensors are the weight, the canonical scales, what else ``_tables`` makes, and a permutation."""

    def computes(self, scheme: Scheme) -> bool:
        return scheme.weight.number == "int" and scheme.activation is not None

    def prepare(self, packed: PackedWeight) -> list[Tensor]:
        weight = self._codes(packed.codes, packed.scheme.weight.bits, packed.shape[-1])
        permutation = [] if packed.permutation is None else [packed.permutation]
        return [weight, packed.scales, *self._tables(packed), *permutation]

    def restore(
        self,
        tensors: Sequence[Tensor],
        scheme: Scheme,
        shape: tuple[int, ...],
        activation: Mapping[str, Tensor] = NO_PARAMS,
    ) -> PackedWeight:
        weight, scales, *rest = tensors
        codes = self._restored_codes(weight, scheme.weight.bits).reshape(*shape[:-1], -1)
        permutation = rest[self._table_count(scheme) :]
        return PackedWeight(scheme, shape, codes, scales, None, *permutation, **activation)

    def _tables(self, packed: PackedWeight) -> list[Tensor]:
        """What the operation reads beside the weight."""
        raise NotImplementedError

    def _table_count(self, scheme: Scheme) -> int:
        raise NotImplementedError

    def _codes(self, codes: Tensor, bits: int, columns: int) -> Tensor:
        stored = layouts.to_int8(codes, bits, columns)
        return layouts.to_nz(stored) if self.nz else stored

    def _restored_codes(self, stored: Tensor, bits: int) -> Tensor:
        return layouts.from_int8(layouts.to_nd(stored), bits)


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
        contract.symmetric_weight, contract.no_token_zeros,
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
