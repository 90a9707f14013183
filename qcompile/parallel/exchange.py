"""Calibration data divided among ranks: each runs its own sequences, and all see what every one of them read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Record = tuple[str, list[Tensor | None]]
"""The name of a site, and tensors about what it read."""


class Exchange:
    """Ranks of a group that deal sequences to each other: sequence i is that of rank ``i % size``.

    What is learned from all of them, in the order of the sequences, is what one rank would have learned alone, bit for
    bit; only the forward passes are divided.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def own(self, sequences: Sequence[Any]) -> list[Any]:
        """The sequences of this rank."""
        return list(sequences[self.rank :: self.size])

    def rounds(self, total: int) -> int:
        """How many sequences the rank with the most of them has."""
        return -(-total // self.size)

    def all(self, records: Sequence[Record], total: int, index: int) -> Iterator[Record]:
        """The records of the ``index``-th sequence of every rank that has one, of ``total``, in the order of ranks."""
        for source in range(min(self.size, total - index * self.size)):
            yield from self._shared(records if source == self.rank else [], source)

    def _shared(self, records: Sequence[Record], source: int) -> list[Record]:
        described = [
            (site, [None if t is None else [str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors])
            for site, tensors in records
        ]
        text = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)
        length = self._sent(torch.tensor([len(text)]), source)
        text = self._sent(text if source == self.rank else torch.empty(int(length), dtype=torch.uint8), source)
        found: list[Record] = []
        for place, (site, tensors) in enumerate(json.loads(bytes(text.tolist()))):
            own = records[place][1] if source == self.rank else [None] * len(tensors)
            found.append(
                (site, [None if d is None else self._tensor(d, t, source) for d, t in zip(tensors, own, strict=True)])
            )
        return found

    def _tensor(self, described: list[Any], own: Tensor | None, source: int) -> Tensor:
        dtype, shape = described
        return self._sent(torch.empty(shape, dtype=getattr(torch, dtype)) if own is None else own.contiguous(), source)

    def _sent(self, tensor: Tensor, source: int) -> Tensor:
        dist.broadcast(tensor, dist.get_global_rank(self.group, source), group=self.group)
        return tensor
