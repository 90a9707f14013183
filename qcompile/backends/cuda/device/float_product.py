"""Float activations times integer weights of 4 or 8 bits, for a Linear and for experts: one kernel from 1 row on.

The weight is the left operand of the tensor cores, so that one row of activations fills as much of an instruction as
it can. Its scales are applied to sums (POST: few rows) or to the weight (many rows), or (GROUP 0) once in the end.
"""

import triton
import triton.language as tl

from .overlap import prefetch_codes, prefetch_scales, wait
from .places import place
from .unpack import dot, float_operand, multiply_or_add, scales_of, shifts_of, spread


@triton.jit
def float_product(
    x, codes, words, bias, y, ends,
    rows, experts, out, stored_out, columns, stored_columns, split_columns, stride_x,
    BITS: tl.constexpr, WGMMA: tl.constexpr, GROUP: tl.constexpr, CENTERED: tl.constexpr, MODE: tl.constexpr,
    EXPERTS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, PARTIAL: tl.constexpr, POST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[rows, out] = x[rows, columns] @ W.T + bias, or (PARTIAL) float32 y[splits, rows, out], without bias.

    GROUP: columns that share a scale, 0 for all of them; CENTERED: the zero point is the middle one.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    pn, split = tl.program_id(0), tl.program_id(2)
    if PDL and MODE == 0:  # of experts, earlier kernels say which
        start, step = split * split_columns, BITS * 2  # bytes of a column in 16 rows
        strip = (pn * (BN // 16) + tl.arange(0, BN // 16)).to(tl.int64)
        prefetch_codes(codes + strip * (stored_columns * step) + start * step, split_columns * step, BK * BITS * 2)
        prefetch_scales(words, pn * BN, stored_out, start, split_columns, 1, stored_out, 1, GROUP, BN, BK)
    wait(PDL)
    expert, first, end = place(ends, rows, experts, MODE, EXPERTS, BM)
    if first >= end:
        return
    om = first + tl.arange(0, BM)
    on = pn * BN + tl.arange(0, BN)
    tiles = pn * (BN // 16) + tl.arange(0, BN // 16)
    live = om < end
    acc = float_sums(
        x + om.to(tl.int64) * stride_x, live, codes, words, expert, tiles, on, split * split_columns, split_columns,
        columns, stored_out, stored_columns, BITS, WGMMA, GROUP, CENTERED, EVEN, POST, BM, BN, BK, STAGES, PTX, WIDE,
    )  # fmt: skip
    written = live[None, :] & (on[:, None] < out)
    y += om[None, :].to(tl.int64) * out + on[:, None]
    if PARTIAL:
        tl.store(y + split.to(tl.int64) * rows * out, acc, mask=written)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + on, mask=on < out, other=0.0).to(tl.float32)[:, None]
        tl.store(y, acc.to(DTYPE), mask=written)


@triton.jit
def float_sums(
    x, live, codes, words, expert, tiles, on, start, length, columns, stored_out, stored_columns,
    BITS: tl.constexpr, WGMMA: tl.constexpr, GROUP: tl.constexpr, CENTERED: tl.constexpr, EVEN: tl.constexpr,
    POST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BM]: the channels ``on`` of an expert's weight times rows of x, over ``length`` columns.

    x: where each row begins, [BM]; live: which of them are read. tiles: those of 16 channels that ``on`` is made of.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    width: tl.constexpr = BK * BITS * 2
    stored_row = stored_columns * (BITS * 2)
    tiles = (expert * (stored_out // 16) + tiles).to(tl.int64)
    codes += tiles[:, None] * stored_row + start * (BITS * 2) + tl.arange(0, width)[None, :]
    ok = start + tl.arange(0, BK)
    x = x[None, :] + ok[:, None]
    groups = (stored_columns // GROUP) if GROUP else 1
    words += expert.to(tl.int64) * groups * stored_out
    if GROUP == 0:
        word = tl.load(words + on)
    acc = tl.zeros((BN, BM), tl.float32)
    for k in tl.range(0, length, BK, num_stages=STAGES):  # said here, every load is pipelined
        stored = tl.load(codes)
        mask = live[None, :] if EVEN else live[None, :] & (ok[:, None] + k < columns)
        inputs = tl.load(x, mask=mask, other=0.0)
        if GROUP:
            if GROUP < BK:
                parts: tl.constexpr = BK // GROUP
                index = (start + k) // GROUP + tl.arange(0, parts)
                word = tl.trans(tl.load(words + index[:, None] * stored_out + on[None, :]))
            else:
                word = tl.load(words + (start + k) // GROUP * stored_out + on)
        scale = scales_of(word, DTYPE)
        w = float_operand(stored, BN, BK, BITS, WGMMA, CENTERED, DTYPE, PTX)
        if not CENTERED:
            shift = spread(shifts_of(word, DTYPE), BN, BK)
            w = multiply_or_add(w, shift, True, DTYPE, PTX)
        if GROUP == 0:
            acc = dot(w, inputs, acc, WIDE)
        elif POST:
            tl.static_assert(GROUP >= BK)
            acc += dot(w, inputs, tl.zeros((BN, BM), tl.float32), WIDE) * scale[:, None]
        else:
            w = multiply_or_add(w, spread(scale.to(DTYPE), BN, BK), False, DTYPE, PTX)
            acc = dot(w, inputs, acc, WIDE)
        codes += width
        x += BK
    if GROUP == 0:
        acc *= scales_of(word, DTYPE)[:, None]
    return acc
