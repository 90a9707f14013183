"""Weights in the order in which tensor cores read them, so that a kernel loads 16 bytes a thread and moves nothing.

A tile is 16 output channels; a lane ``4 g + c`` of a warp owns 16 contiguous bytes of it, which hold channels g and
g + 8. Its input features are those that the instruction's left operand has in this lane:

    wgmma   m64nNk16 (sm_90): 16 s + 8 b + 2 c + e         for b, e in 0, 1 (PTX ISA, "register fragments for wgmma")
    mma     as Triton orders m16n8k16: 32 s + 8 c + j      for j in 0 .. 7; of 8-bit codes 16 s + 4 c + j, 0 .. 3
    int8    m64nNk32 and m16n8k32: 32 s + 16 b + 4 c + j   for b in 0, 1 and j in 0 .. 3

Four-bit codes are ordered so that three shifts and four masks make pairs of 16-bit numbers of a word.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Fragments = Literal["wgmma", "mma", "int8"]

ROWS = 64  # output channels are padded to a multiple of this
COLUMNS = 64  # input features are padded to a multiple of this

# names of axes: R tile of rows, h which half of it, g row of the half; T tile of columns, then as above.
# in: how [rows, columns] is split; out: how it is stored. Of a word of four-bit codes, the last three axes are bits.
_ORDERS: dict[tuple[int, str], tuple[dict[str, int], str]] = {
    (4, "wgmma"): ({"h": 2, "g": 8, "T": 0, "s": 4, "b": 2, "c": 4, "e": 2}, "RTgcsebh"),
    (4, "mma"): ({"h": 2, "g": 8, "T": 0, "s": 2, "c": 4, "p": 2, "q": 2, "e": 2}, "RTgcshepq"),
    (4, "int8"): ({"h": 2, "g": 8, "T": 0, "s": 2, "b": 2, "c": 4, "j": 4}, "RTgcsbjh"),
    (8, "wgmma"): ({"h": 2, "g": 8, "T": 0, "s": 2, "b": 2, "c": 4, "e": 2}, "RTgcsbhe"),
    (8, "mma"): ({"h": 2, "g": 8, "T": 0, "s": 2, "c": 4, "j": 4}, "RTgcshj"),
}


def to_fragments(codes: Tensor, bits: int, order: Fragments) -> Tensor:
    """uint8 codes [experts * rows, columns] -> uint8 [experts * rows / 16, columns * bits / 8 * 16]."""
    sizes, stored = _ORDERS[bits, order]
    rows, columns = codes.shape
    split = codes.view(rows // 16, *_split(sizes, columns))
    axes = "R" + "".join(sizes)
    ordered = split.permute([axes.index(name) for name in stored]).reshape(rows // 16, -1)
    return ordered if bits == 8 else ordered[:, 0::2] | ordered[:, 1::2] << 4


def from_fragments(stored: Tensor, bits: int, order: Fragments) -> Tensor:
    """Inverse of ``to_fragments``."""
    sizes, names = _ORDERS[bits, order]
    tiles, width = stored.shape
    columns = width * 8 // bits // 16
    values = stored if bits == 8 else torch.stack([stored & 15, stored >> 4], -1).flatten(1)
    axes = "R" + "".join(sizes)
    extents = dict(zip(axes, (tiles, *_split(sizes, columns)), strict=True))
    ordered = values.view([extents[name] for name in names])
    return ordered.permute([names.index(name) for name in axes]).reshape(tiles * 16, columns)


def _split(sizes: dict[str, int], columns: int) -> list[int]:
    """Extents of the axes, with as many tiles of columns as there are."""
    known = 1
    for name, extent in sizes.items():
        known *= extent if name not in "hgT" else 1
    return [extent or columns // known for extent in sizes.values()]


def scale_pairs(scales: Tensor, zeros: Tensor, offset: int) -> Tensor:
    """16-bit scales and zero points [..., rows, groups] -> [..., groups, rows, 2]: scale, -(offset + zero).

    Both are of the dtype of the scales. A kernel reads a pair as 32 bits and adds the second number to codes that it
    has turned into ``offset + q`` by setting exponent bits, which is exact.
    """
    shift = -(zeros.to(torch.int32) + offset)
    return torch.stack([scales, shift.to(scales.dtype)], -1).transpose(-2, -3).contiguous()


def from_scale_pairs(pairs: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Inverse of ``scale_pairs``: scales, and zero points uint8."""
    scales, shift = pairs.transpose(-2, -3).unbind(-1)
    return scales.contiguous(), (-shift.float() - offset).to(torch.uint8)


def offset_of(bits: int, dtype: torch.dtype) -> int:
    """What a kernel adds to codes of so many stored bits when it turns them into floats."""
    return -128 if bits == 8 else 128 if dtype == torch.bfloat16 else 1024


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def pad_rows(values: Tensor, rows: int, columns: int) -> Tensor:
    """[..., out, n] -> [..., rows, columns], filled up with zeros."""
    missing = (0, columns - values.shape[-1], 0, rows - values.shape[-2])
    return F.pad(values, missing) if any(missing) else values
