"""Quantized activations: what the kernels with npu_quant_matmul and npu_grouped_matmul share.

Beside what an operation reads, each kernel keeps the canonical scales, so that ``restore`` is exact; that is 2 bytes
for each output channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ...kernels import NO_PARAMS
from ...types import PackedWeight, Scheme, Site
from . import chips, contract, layouts
from .kernels import NPUKernel


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
