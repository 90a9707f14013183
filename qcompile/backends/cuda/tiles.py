"""How a product is cut: tile sizes, splits along the input features, pipeline depth. By shape and GPU.

What is here was read off compiled code (registers, shared memory, instructions per weight) and bandwidth arithmetic; no
GPU has timed it yet.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from .targets import Target

DENSE, EACH_ROW, BLOCKS = 0, 1, 2  # what ``device/places.py`` does for each
MOST_SPLITS = 8  # a sum of so few numbers is unrolled by Inductor, and so becomes part of whatever reads it
FEW_ROWS = 32  # up to so many, scales are applied to sums instead of weights


@dataclass(frozen=True)
class Tiles:
    """One program computes [bm rows, bn channels], ``bk`` features at a time, of one ``splits``-th of them."""

    mode: int
    bm: int
    bn: int
    bk: int
    splits: int
    stages: int
    warps: int


@functools.lru_cache(maxsize=4096)
def choose(
    rows: int, experts: int, out: int, columns: int, bits: int, target: Target, x_bits: int = 16, group: int = 0
) -> Tiles:
    """Tiles for ``rows`` of activations and a stored weight [experts, out, columns]; experts 0: a Linear.

    out and columns are those that are stored, multiples of 64. group: a step must not be longer than that.
    """
    mode = DENSE if not experts else EACH_ROW if each_row(rows, experts) else BLOCKS
    each = rows if mode == DENSE else 1 if mode == EACH_ROW else -(-rows // experts)
    whole = min(group or 128, 128) if columns % 128 == 0 else 64
    if each > 64:
        return _many_rows(mode, each, out, min(whole, 1024 // x_bits if target.has_wgmma else 64), target)
    bm = max(16, 1 << (max(1, each) - 1).bit_length())
    bk = whole if target.has_wgmma or bm <= FEW_ROWS else min(whole, 1024 // x_bits)
    bn = 128 if out % 128 == 0 and out * columns >= 2**25 else 64
    blocks = -(-each // bm) if mode == DENSE else rows
    splits = _splits(blocks * (out // bn), columns, bk, target)
    return Tiles(mode, bm, bn, bk, splits, 4 if target.has_wgmma or bits == 4 else 3, 4)


def each_row(rows: int, experts: int) -> bool:
    """Whether rows of experts are so few that hardly any two of them share one."""
    return 2 * rows <= experts


def expert_splits(tokens: int, chosen: int, out: int, target: Target) -> int:
    """How many programs share the ``chosen`` experts of a token and 64 of its ``out`` channels."""
    splits = 1
    while (
        tokens * (out // 64) * splits < 2 * target.multiprocessors
        and splits < MOST_SPLITS
        and not chosen % (2 * splits)
    ):
        splits *= 2
    return splits


def _many_rows(mode: int, each: int, out: int, bk: int, target: Target) -> Tiles:
    bn = 128 if out % 128 == 0 else 64
    if target.has_wgmma and each >= 512 and mode == DENSE:
        return Tiles(mode, 256, bn, bk, 1, 4, 8)
    return Tiles(mode, 128, bn, bk, 1, 4 if target.has_wgmma else 3, 8)


def _splits(programs: int, columns: int, bk: int, target: Target) -> int:
    """How many programs share the input features of a tile, so that there are two for each multiprocessor."""
    splits = 1
    while programs * splits < 2 * target.multiprocessors and splits < MOST_SPLITS:
        if columns % (2 * splits * bk) or columns // (2 * splits) < 2 * bk:
            break
        splits *= 2
    return splits


def grid_blocks(tiles: Tiles, rows: int, experts: int) -> int:
    """Programs along the rows: enough for every expert to have a last block that is not full."""
    if tiles.mode == EACH_ROW:
        return rows
    return math.ceil(rows / tiles.bm) if tiles.mode == DENSE else rows // tiles.bm + min(rows, experts)
