"""What ranks tell each other: functional collectives of ``torch.distributed``, which a compiled graph holds as well.

A group is the name of a process group ("" for one rank alone), a plain string, so that graphs and copies can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OPS = torch.ops._c10d_functional


def total(x: Tensor, group: str) -> Tensor:
    """The sum of x over the ranks of a group."""
    return _reduced(x, "sum", group)


def largest(x: Tensor, group: str) -> Tensor:
    """The largest of each element of x over the ranks of a group."""
    return _reduced(x, "max", group)


def _reduced(x: Tensor, how: str, group: str) -> Tensor:
    return _OPS.wait_tensor(_OPS.all_reduce(x.contiguous(), how, group)) if group else x


def stacked(x: Tensor, ranks: int, group: str) -> Tensor:
    """The x [n, ...] of all ranks above each other, [ranks * n, ...]."""
    if not group or ranks == 1:
        return x
    return _OPS.wait_tensor(_OPS.all_gather_into_tensor(x.contiguous(), ranks, group))


def exchanged(x: Tensor, taken: list[int], sent: list[int], group: str) -> Tensor:
    """x [sum(sent), ...] cut and sent to each rank; what they sent, [sum(taken), ...]."""
    return _OPS.wait_tensor(_OPS.all_to_all_single(x.contiguous(), taken, sent, group))


def joined(x: Tensor, ranks: int, group: str) -> Tensor:
    """The x [..., n] of all ranks beside each other, [..., ranks * n]; of one alone, as often as there are ranks."""
    if not group:
        return torch.cat([x] * ranks, -1)
    rows = x.reshape(-1, x.shape[-1])
    gathered = stacked(rows, ranks, group)
    return gathered.view(ranks, -1, x.shape[-1]).transpose(0, 1).reshape(*x.shape[:-1], ranks * x.shape[-1])
