"""Scales and zero points of groups of integers: searched for the least error that they leave in what is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..groups import join_groups, split_groups
from ..numerics import minmax_scales, representable
from ..types import WeightType

_COARSE = [1 - 0.1 * step for step in range(7)]  # of the range of a group, tried with both signs: down to 40 %
_FINE = [sign * 0.0125 * step for step in range(1, 9) for sign in (-1, 1)]  # then around the best of these
_REFINEMENTS = 3
_WEIGHTS = 1 << 17  # searched at once: what is made of them stays in the cache
_ROWS = 128  # at least, where H is multiplied with them


def search_ranges(
    weight: Tensor, weight_type: WeightType, dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales, representable in ``dtype``, and zero points of each group of a weight [out, in]: float32 [out, groups].

    What counts is the error d of a group after rounding to nearest: ``d @ H @ d``. importance: H of each group
    [groups, n, n]; or its diagonals [in]; None counts all weights alike. Tried are parts of the range, coarsely and
    then finely, with both signs of symmetric scales and zero points that are neighbours; of H only the largest part
    counts until then. Last, the scale of least squares for the codes is taken as long as that helps.
    """
    size = weight_type.group_size or weight.shape[1]
    rows, sketch = max(1, _WEIGHTS // max(1, weight.shape[1])), None
    if importance is not None and importance.dim() == 1:
        importance = split_groups(importance[None], size)[0]
    elif importance is not None:
        rows, sketch = max(rows, _ROWS), _sketch(importance)
    found = [_Search(part.float(), weight_type, dtype, importance).run(sketch) for part in weight.split(rows)]
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales, 1).T.contiguous(), torch.cat(zeros, 1).T.contiguous()


class _Search:
    """``search_ranges`` of a few rows. Groups are [G, R, n], their scales, zero points and errors [G, R]."""

    def __init__(self, weight: Tensor, weight_type: WeightType, dtype: torch.dtype, importance: Tensor | None) -> None:
        self.groups = split_groups(weight, weight_type.group_size or weight.shape[1]).transpose(0, 1).contiguous()
        self.importance, self.dtype, self.symmetric = importance, dtype, weight_type.symmetric
        self.whole, self.zeros = minmax_scales(self.groups, weight_type, dtype)
        self.scales, self.top = self.whole, 2**weight_type.bits - 1
        self.least = torch.full_like(self.scales, torch.inf)
        self._buffer = torch.empty_like(self.groups)

    def run(self, sketch: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """The best scales and zero points; with a ``sketch`` of H parts of the range are chosen by that."""
        best = torch.ones_like(self.scales)
        for share in [sign * share for share in _COARSE for sign in ((1, -1) if self.symmetric else (1,))]:
            best = torch.where(self._try(self._part(share), self.zeros, sketch), share, best)
        for zeros in () if self.symmetric else (self.zeros + 1, self.zeros - 1):
            self._try(self.scales, zeros.clamp_(0, self.top), sketch)
        for step in _FINE:
            self._try(self._part(best + step), self.zeros, sketch)
        if sketch is not None:
            self.least = self._lost(self.scales, self.zeros, None)
        for _ in range(_REFINEMENTS):
            if not self._try(self._least_squares(), self.zeros, None).any():
                break
        return self.scales, self.zeros

    def _part(self, share: float | Tensor) -> Tensor:
        """Scales of a share of the range."""
        return representable(self.whole * share, self.dtype)

    def _try(self, scales: Tensor, zeros: Tensor, sketch: tuple[Tensor, Tensor] | None) -> Tensor:
        """Take these scales and zero points where they are better; where that is, bool [G, R]."""
        error = self._lost(scales, zeros, sketch)
        better = error < self.least
        self.least = torch.where(better, error, self.least)
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = self.zeros if self.symmetric else torch.where(better, zeros, self.zeros)
        return better

    def _codes(self, scales: Tensor, zeros: Tensor) -> Tensor:
        """Codes less their zero points, until the next call."""
        codes = torch.mul(self.groups, scales.reciprocal()[..., None], out=self._buffer).round_()
        if self.symmetric:
            return codes.clamp_(-(self.top + 1) // 2, self.top // 2)
        return codes.clamp_(-zeros[..., None], self.top - zeros[..., None])

    def _lost(self, scales: Tensor, zeros: Tensor, sketch: tuple[Tensor, Tensor] | None) -> Tensor:
        """Weighted squared error of each group."""
        error = self._codes(scales, zeros).mul_(scales[..., None]).sub_(self.groups)
        if sketch is not None:
            large = torch.bmm(error, sketch[0]).square_().sum(-1)
            return large.add_(torch.matmul(error.square_(), sketch[1][..., None])[..., 0])
        if self.importance is None:
            return error.square_().sum(-1)
        if self.importance.dim() == 2:
            return torch.matmul(error.square_(), self.importance[..., None])[..., 0]
        return torch.bmm(error, self.importance).mul_(error).sum(-1)

    def _least_squares(self) -> Tensor:
        """The scales with the least error for the codes that the present ones make."""
        codes, h = self._codes(self.scales, self.zeros), self.importance
        weighted = codes * (1 if h is None else h[:, None]) if h is None or h.dim() == 2 else torch.bmm(codes, h)
        below, above = (weighted * codes).sum(-1), weighted.mul_(self.groups).sum(-1)
        usable = (below > 0) & (above != 0)
        return torch.where(usable, representable(torch.where(usable, above / below, 1.0), self.dtype), self.scales)


def _sketch(hessians: Tensor) -> tuple[Tensor, Tensor]:
    """L [groups, n, k] and d [groups, n] so that each H [groups, n, n] is near to ``L @ L.T + diag(d)``.

    Of k steps of a Cholesky factorization, each of the column with the largest diagonal that is left.
    """
    groups, size, _ = hessians.shape
    left, at = hessians.diagonal(dim1=1, dim2=2).clone(), torch.arange(groups, device=hessians.device)
    factor = hessians.new_zeros((groups, size, min(64, max(1, size // 4))))
    for step in range(factor.shape[2]):
        place = left.argmax(-1)
        done = factor[:, :, :step]
        column = hessians[at, place] - (done @ done[at, place][..., None])[..., 0]
        column /= left[at, place].clamp(min=torch.finfo(left.dtype).tiny).sqrt()[:, None]
        factor[:, :, step] = column
        left.sub_(column.square()).clamp_(min=0)
    return factor, left


def encode(weight: Tensor, weight_type: WeightType, scales: Tensor, zeros: Tensor) -> Tensor:
    """Codes uint8 [out, in] of a weight, rounded to nearest under scales and zero points [out, groups]."""
    groups = split_groups(weight.float(), weight_type.group_size or weight.shape[1])
    codes = torch.round(groups / scales[..., None]).add_(zeros[..., None]).clamp_(0, 2**weight_type.bits - 1)
    return join_groups(codes.to(torch.uint8), weight.shape[1])


def rounded(weight: Tensor, weight_type: WeightType) -> Tensor:
    """A float32 weight [out, in] after rounding to nearest within the range of each group."""
    result = torch.empty_like(weight)
    rows = max(1, _WEIGHTS // max(1, weight.shape[1]))
    for part, into in zip(weight.split(rows), result.split(rows), strict=True):
        groups = split_groups(part, weight_type.group_size or weight.shape[1])
        scales, zeros = (x[..., None] for x in minmax_scales(groups, weight_type, torch.float32))
        codes = (groups * scales.reciprocal()).round_().clamp_(-zeros, 2**weight_type.bits - 1 - zeros)
        into.copy_(join_groups(codes.mul_(scales), weight.shape[1]))
    return result


def group_blocks(hessian: Tensor, size: int) -> Tensor:
    """The blocks [groups, n, n] of ``hessian`` [in, in] on its diagonal; a short last one is padded with zeros."""
    features = hessian.shape[0]
    blocks = hessian.new_zeros((-(-features // size), size, size))
    for index, start in enumerate(range(0, features, size)):
        block = hessian[start : start + size, start : start + size]
        blocks[index, : len(block), : len(block)] = block
    return blocks
