"""Columns in groups that share a scale, where the last group may be short."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def split_groups(x: Tensor, size: int) -> Tensor:
    """View [..., columns] as [..., groups, size]; zeros fill up a short last group."""
    columns = x.shape[-1]
    if columns % size:
        x = F.pad(x, (0, -columns % size))
    return x.unflatten(-1, (-(-columns // size), size))


def join_groups(groups: Tensor, columns: int) -> Tensor:
    """Inverse of ``split_groups`` for groups that were just computed: [..., columns], contiguous.

    The padding of a short last group is cut off by ``as_strided``, before which Inductor stores what it computed.
    Joined with the cut in one loop, the C++ of torch 2.13 would leave that group out (pytorch issue 195582).
    """
    joined = groups.flatten(-2)
    if joined.shape[-1] == columns:
        return joined
    return joined.as_strided((*joined.shape[:-1], columns), joined.stride()).contiguous()
