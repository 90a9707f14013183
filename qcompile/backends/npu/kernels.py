"""What Ascend's kernels share: refusals made of constraints, and moving activations to the form the operations take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import Kernel
from ...types import Scheme, Site
from .contract import Rule, violations
from .grouping import Counts, Ends, Groups, Pairs, owners
from .layouts import TORCH_NUMBERS

npu = torch.ops.npu  # looked up when it is called: torch_npu need not be there to plan


class NPUKernel(Kernel):
    """A kernel whose refusals are the documented constraints of its operations.

    ``what`` completes "it computes ..." for schemes of other numbers. A kernel with ``nz`` lays its weight out as
    FRACTAL_NZ, which is faster; the same one without stands behind it in the list.
    """

    portable = False
    what = ""
    rules: tuple[Rule, ...] = ()
    nz_rules: tuple[Rule, ...] = ()

    def __init__(self, nz: bool = False) -> None:
        self.nz = nz
        if nz:
            self.name = f"{self.name}_nz"

    def refuses(self, site: Site, scheme: Scheme) -> str:
        if not self.can_express(scheme):
            return f"computes {self.what}, not {scheme}"
        reasons = violations(self.rules, site, scheme)
        if self.nz and reasons:
            return f"the same as {self.name.removesuffix('_nz')}"
        return reasons or violations(self.nz_rules if self.nz else (), site, scheme)

    def can_express(self, scheme: Scheme) -> bool:
        """Whether its numbers can hold those of the scheme, possibly in more bits; ``computes``: in as many."""
        return self.computes(scheme)

    def grouped_linear(
        self,
        x: Sequence[Tensor],
        ends: Tensor,
        weight: Sequence[Tensor],
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        return self.grouped(x, Ends(ends.to(torch.int64)), weight, scheme, dtype)

    def grouped(
        self, x: Sequence[Tensor], groups: Groups, weight: Sequence[Tensor], scheme: Scheme, dtype: torch.dtype
    ) -> Tensor:
        """``grouped_linear`` for either kind of group list."""
        raise NotImplementedError(f"{self.name} is for {' and '.join(self.kinds)} sites only")

    def swiglu_quantized(
        self, x: Sequence[Tensor], groups: Counts, weight: Sequence[Tensor], scheme: Scheme
    ) -> list[Tensor] | None:
        """``grouped``, then ``silu(gate) * up``, as int8 [codes, scale]; None where no operation joins them."""
        return None

    def summed(
        self,
        x: Sequence[Tensor],
        groups: Counts,
        weight: Sequence[Tensor],
        scheme: Scheme,
        pairs: Pairs,
        routing: Tensor,
    ) -> Tensor:
        """``grouped``, then each token's weighted sum: float32 [tokens, out]. Only where ``sums`` says so."""
        raise NotImplementedError(f"{self.name} has no operation that also sums")

    def sums(self, weight: Sequence[Tensor], scheme: Scheme, rows: int | torch.SymInt) -> bool:
        """Whether an operation joins the product of so many rows with the weighted sum of each token's."""
        return False


def number_of(dtype: torch.dtype) -> int:
    """How torch_npu's schemas write a dtype."""
    return TORCH_NUMBERS[dtype]


def permuted(x: Tensor, permutation: Sequence[Tensor], groups: Groups | None = None) -> Tensor:
    """x [..., in] with its columns in the order of the weight's; rows of experts each in that of its own."""
    if not permutation:
        return x
    order = permutation[0]
    if groups is None:
        return x.index_select(-1, order)
    return x.gather(-1, order.index_select(0, owners(groups, x.shape[0])).long())
