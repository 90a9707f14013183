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
