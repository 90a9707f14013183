"""Stored weights back to floats, for products of so many rows that dequantizing once is cheaper than in every tile."""

import triton
import triton.language as tl

from .unpack import float_operand, multiply_or_add, scales_of, shifts_of, spread


@triton.jit
def dequantize(
    codes, words, y, first, stored_out, columns, stored_columns,
    BITS: tl.constexpr, WGMMA: tl.constexpr, GROUP: tl.constexpr, CENTERED: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """y [channels, columns] = the weight's channels from ``first`` on, in the dtype of y."""
    DTYPE: tl.constexpr = y.dtype.element_ty
    pn, pk = tl.program_id(0), tl.program_id(1)
    row = first + pn * BN
    tiles = (row // 16 + tl.arange(0, BN // 16)).to(tl.int64)
    width: tl.constexpr = BK * BITS * 2
    stored = tl.load(codes + tiles[:, None] * (stored_columns * (BITS * 2)) + pk * width + tl.arange(0, width)[None, :])
    on = tl.arange(0, BN)
    if GROUP == 0:
        word = tl.load(words + row + on)
    elif GROUP < BK:
        index = pk * (BK // GROUP) + tl.arange(0, BK // GROUP)
        word = tl.trans(tl.load(words + index[:, None] * stored_out + row + on[None, :]))
    else:
        word = tl.load(words + (pk * BK // GROUP) * stored_out + row + on)
    w = float_operand(stored, BN, BK, BITS, WGMMA, CENTERED, DTYPE, PTX)
    if not CENTERED:
        w = multiply_or_add(w, spread(shifts_of(word, DTYPE), BN, BK), True, DTYPE, PTX)
    w = multiply_or_add(w, spread(scales_of(word, DTYPE).to(DTYPE), BN, BK), False, DTYPE, PTX)
    ok = pk * BK + tl.arange(0, BK)
    place = (pn * BN + on)[:, None].to(tl.int64) * columns + ok[None, :]
    tl.store(y + place, w, mask=ok[None, :] < columns)
