"""Scales and zero points of groups of integers: searched for the least error that they leave in what is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..groups import join_groups, split_groups
from ..numerics import CHUNK, minmax_scales, representable
from ..types import WeightType

SHARES = [1 - 0.025 * step for step in range(25)]  # of the range of a group, tried: down to 40 %
_REFINEMENTS = 4


def search_ranges(
    weight: Tensor, weight_type: WeightType, dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales, representable in ``dtype``, and zero points of each group of a weight [out, in]: float32 [out, groups].

    What counts is the error d of a group after rounding to nearest: ``d @ H @ d``. importance: H of each group
    [groups, n, n]; or its diagonals [in]; None counts all weights alike. Tried are parts of the range, with both signs
    of symmetric scales and neighbouring zero points; then the scale of least squares for the codes is taken as long as
    that helps.
    """
    size = weight_type.group_size or weight.shape[1]
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    if importance is not None and importance.dim() == 1:
        importance = split_groups(importance[None], size)[0]
    found = [_search(split_groups(part.float(), size), weight_type, dtype, importance) for part in weight.split(rows)]
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _search(
    groups: Tensor, weight_type: WeightType, dtype: torch.dtype, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``search_ranges`` of groups [R, G, n]."""
    first, zeros = minmax_scales(groups, weight_type, dtype)
    scales, least = first, _lost(groups, first, zeros, weight_type, importance)
    for scale, zero in _candidates(groups, first, zeros, weight_type, dtype):
        error = _lost(groups, scale, zero, weight_type, importance)
        better = error < least
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
        least = torch.where(better, error, least)
    for _ in range(_REFINEMENTS):
        codes = _codes(groups, scales, zeros, weight_type) - zeros[..., None]
        weighted = _weighted(codes, importance)
        above, below = (weighted * groups).sum(-1), (weighted * codes).sum(-1)
        usable = (below > 0) & (above != 0)
        scale = torch.where(usable, representable(torch.where(usable, above / below, scales), dtype), scales)
        error = _lost(groups, scale, zeros, weight_type, importance)
        better = error < least
        if not better.any():
            break
        scales, least = torch.where(better, scale, scales), torch.where(better, error, least)
    return scales, zeros


def _candidates(
    groups: Tensor, scales: Tensor, zeros: Tensor, weight_type: WeightType, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    top = 2**weight_type.bits - 1
    low = groups.amin(-1).clamp(max=0)
    for share in SHARES:
        scale = representable(scales * share, dtype)
        if weight_type.symmetric:
            yield scale, zeros
            yield -scale, zeros
            continue
        centre = torch.round(-low * share / scale)
        for shift in (0, -1, 1):
            yield scale, (centre + shift).clamp(0, top)


def _codes(groups: Tensor, scales: Tensor, zeros: Tensor, weight_type: WeightType) -> Tensor:
    return torch.round(groups / scales[..., None]).add_(zeros[..., None]).clamp_(0, 2**weight_type.bits - 1)


def _lost(groups: Tensor, scales: Tensor, zeros: Tensor, weight_type: WeightType, importance: Tensor | None) -> Tensor:
    """Weighted squared error of each group, [R, G]."""
    codes = _codes(groups, scales, zeros, weight_type)
    error = codes.sub_(zeros[..., None]).mul_(scales[..., None]).sub_(groups)
    return (_weighted(error, importance) * error).sum(-1)


def _weighted(error: Tensor, importance: Tensor | None) -> Tensor:
    """``error @ H`` of each group."""
    if importance is None:
        return error
    if importance.dim() == 2:
        return error * importance
    return torch.bmm(error.transpose(0, 1), importance).transpose(0, 1)


def encode(weight: Tensor, weight_type: WeightType, scales: Tensor, zeros: Tensor) -> Tensor:
    """Codes uint8 [out, in] of a weight, rounded to nearest under scales and zero points [out, groups]."""
    groups = split_groups(weight.float(), weight_type.group_size or weight.shape[1])
    return join_groups(_codes(groups, scales, zeros, weight_type).to(torch.uint8), weight.shape[1])


def rounded(weight: Tensor, weight_type: WeightType) -> Tensor:
    """A float32 weight [out, in] after rounding to nearest within the range of each group."""
    groups = split_groups(weight, weight_type.group_size or weight.shape[1])
    scales, zeros = minmax_scales(groups, weight_type, torch.float32)
    codes = _codes(groups, scales, zeros, weight_type)
    return join_groups((codes - zeros[..., None]) * scales[..., None], weight.shape[1])


def group_blocks(hessian: Tensor, size: int) -> Tensor:
    """The blocks [groups, n, n] of ``hessian`` [in, in] on its diagonal; a short last one is padded with zeros."""
    features = hessian.shape[0]
    blocks = hessian.new_zeros((-(-features // size), size, size))
    for index, start in enumerate(range(0, features, size)):
        block = hessian[start : start + size, start : start + size]
        blocks[index, : len(block), : len(block)] = block
    return blocks
