"""Which rows, and which expert's weight, a program of a grid computes with."""

import triton
import triton.language as tl


@triton.jit
def place(ends, rows, experts, MODE: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr):
    """(expert, its first row, the row after its last) of this program; an empty range for one too many.

    ends: int32 [experts], where the sorted rows of each expert end. EXPERTS: at least ``experts``, a power of two.
    MODE, as in ``tiles.py``: 0, programs count blocks of BM rows; 1, of few rows each has one, so that nothing need be
    aligned; 2, programs count the blocks of one expert after those of another.
    """
    block = tl.program_id(1)
    if MODE == 0:
        expert, first, end = block * 0, block * BM, rows
    else:
        each = tl.arange(0, EXPERTS)
        known = each < experts
        ended = tl.load(ends + each, mask=known, other=rows)
        if MODE == 1:
            expert, first, end = tl.sum((known & (ended <= block)).to(tl.int32)), block, block + 1
        else:
            begun = tl.load(ends + each - 1, mask=known & (each > 0), other=0)
            blocks = tl.where(known, (ended - begun + BM - 1) // BM, 0)
            last = tl.cumsum(blocks)
            expert = tl.sum((known & (last <= block)).to(tl.int32))
            own = known & (each == expert)
            before = tl.sum(tl.where(own, last - blocks, 0))
            first = tl.sum(tl.where(own, begun, 0)) + (block - before) * BM
            end = tl.sum(tl.where(own, ended, 0))
    return expert, first, end


@triton.jit
def pairs_of(ids, order, ends, pairs, experts, MODE: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr):
    """(expert, its (token, slot) pairs [BM], which of them there are, whether any is to be computed) of this program.

    ids: the expert of each pair; others than 0 .. experts - 1 are computed elsewhere. MODE 1: a program has one pair,
    and order and ends are not read; 2: order has the pairs sorted by expert, ends as for ``place``.
    """
    if MODE == 1:
        expert = tl.load(ids + tl.program_id(1)).to(tl.int32)
        live = tl.arange(0, BM) == 0
        pair = tl.program_id(1) + tl.zeros((BM,), tl.int32)
        some = (expert >= 0) & (expert < experts)
    else:
        expert, first, end = place(ends, pairs, experts, MODE, EXPERTS, BM)
        row = first + tl.arange(0, BM)
        live = row < end
        pair = tl.load(order + row, mask=live, other=0).to(tl.int32)
        some = first < end
    return expert, pair, live, some


@triton.jit
def gate_and_up(pn, intermediate, BN: tl.constexpr):
    """Half of the rows of tile ``pn`` are gates, the others the ups that belong to them: (16-row tiles, rows [BN])."""
    half: tl.constexpr = BN // 2
    row, tile = tl.arange(0, BN), tl.arange(0, BN // 16)
    rows = pn * half + row + row // half * (intermediate - half)
    tiles = pn * (half // 16) + tile + tile // (half // 16) * ((intermediate - half) // 16)
    return tiles, rows
