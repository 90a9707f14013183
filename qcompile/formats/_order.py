"""Columns that belong to groups in any order (``g_idx`` of act-order), brought into the order of their groups."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .. import numerics
from ..types import PackedWeight, Scheme


def in_groups(
    scheme: Scheme,
    shape: tuple[int, ...],
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    g_idx: Tensor,
    **others: Tensor | None,
) -> PackedWeight:
    """The canonical weight of codes uint8 [out, bytes] in the order of inputs; input i is of group ``g_idx[i]``.

    ``g_idx`` [in] may be anything within [0, groups). The canonical layout has as many columns in each group but the
    last; where these are not, groups are cut into smaller ones of equal size, which repeat their scales and zero
    points: then the weight has another scheme than ``scheme``. others: what else the weight holds.
    """
    inn, weight = shape[1], scheme.weight
    size, groups = weight.group_size or max(inn, 1), weight.groups(inn)
    counts = torch.bincount(g_idx.long(), minlength=groups)
    order = torch.argsort((counts % size != 0).int(), stable=True)  # what does not fill groups comes last
    rank = torch.empty_like(order).index_copy_(0, order, torch.arange(groups))
    permutation = torch.argsort(rank[g_idx.long()], stable=True)
    ends = counts[order].cumsum(0)
    size = math.gcd(size, *(end for end in ends.tolist() if end < inn))
    if not torch.equal(permutation, torch.arange(inn)):
        codes = numerics.pack_codes(numerics.unpack_codes(codes, weight.bits, inn)[:, permutation], weight.bits)
    source = g_idx.long()[permutation[::size]]
    if not torch.equal(source, torch.arange(groups)):
        scales, zeros = scales[:, source], None if zeros is None else zeros[:, source]
    if weight.group_size and size != weight.group_size:
        scheme = replace(scheme, weight=replace(weight, group_size=size))
    is_plain = torch.equal(permutation, torch.arange(inn))
    return PackedWeight(
        scheme, shape, codes, scales, zeros, None if is_plain else permutation.to(torch.int32), **others
    )
