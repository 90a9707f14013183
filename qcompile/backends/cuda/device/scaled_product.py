"""Quantized activations times quantized weights: int8 x int8, int8 x int4 and e4m3 x e4m3, for a Linear and experts.

Scales are applied to sums: in the end (GROUP 0), or once for each group of columns. Sums of e4m3 products are added up
in float32 after each step of BK columns, because those inside a tensor core have 14 bits (Hopper).
"""

import triton
import triton.language as tl

from .overlap import prefetch_codes, prefetch_scales, wait
from .places import place
from .unpack import int8_halves, int8_operand, scales_of


@triton.jit
def scaled_product(
    x, x_scale, codes, scales, bias, y, ends,
    rows, experts, out, stored_out, columns, stored_columns, split_columns, stride_x, x_scale_row,
    scale_expert, scale_row, scale_group,
    KIND: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, SCALE_ROWS: tl.constexpr, X_GROUPED: tl.constexpr,
    MODE: tl.constexpr, EXPERTS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, PARTIAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[rows, out] = x_scale * (x @ W.T) + bias, or (PARTIAL) float32 y[splits, rows, out] without x_scale and bias.

    KIND: "int8", "int4" or "fp8". The scale of channel n and group g is at ``n // SCALE_ROWS * scale_row + g *
    scale_group``; that of row m at ``m * x_scale_row``, and (X_GROUPED) one for each group after it. WORDS: the scales
    of the weight are the lower halves of words, in "bf16" or "fp16".
    """
    pn, split = tl.program_id(0), tl.program_id(2)
    if PDL and MODE == 0:  # of experts, earlier kernels say which
        start = split * split_columns
        if KIND == "int4":
            strip = (pn * (BN // 16) + tl.arange(0, BN // 16)).to(tl.int64)
            prefetch_codes(codes + strip * (stored_columns * 8) + start * 8, split_columns * 8, BK * 8)
        else:
            channel = (pn * BN + tl.arange(0, BN)).to(tl.int64)
            prefetch_codes(codes + channel * stored_columns + start, split_columns, BK)
        known = out if KIND == "fp8" else stored_out  # only scales of integers are padded
        prefetch_scales(scales, pn * BN, known, start, split_columns, scale_row, scale_group, SCALE_ROWS, GROUP, BN, BK)
    wait(PDL)
    expert, first, end = place(ends, rows, experts, MODE, EXPERTS, BM)
    if first >= end:
        return
    om = first + tl.arange(0, BM)
    on = pn * BN + tl.arange(0, BN)
    tiles = pn * (BN // 16) + tl.arange(0, BN // 16)
    live = om < end
    acc = scaled_sums(
        x + om.to(tl.int64) * stride_x, live, x_scale, om * x_scale_row, codes, scales, expert, tiles, on,
        split * split_columns, split_columns, out, columns, stored_out, stored_columns, scale_expert, scale_row,
        scale_group, KIND, GROUP, WORDS, SCALE_ROWS, X_GROUPED, EVEN, BM, BN, BK, STAGES, PTX,
    )  # fmt: skip
    written = live[None, :] & (on[:, None] < out)
    y += om[None, :].to(tl.int64) * out + on[:, None]
    if PARTIAL:
        tl.store(y + split.to(tl.int64) * rows * out, acc, mask=written)
    else:
        if not X_GROUPED:
            acc *= tl.load(x_scale + om * x_scale_row, mask=live, other=0.0)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias + on, mask=on < out, other=0.0).to(tl.float32)[:, None]
        tl.store(y, acc.to(y.dtype.element_ty), mask=written)


@triton.jit
def scaled_sums(
    x, live, x_scale, x_scales, codes, scales, expert, tiles, on, start, length, out, columns, stored_out,
    stored_columns, scale_expert, scale_row, scale_group,
    KIND: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, SCALE_ROWS: tl.constexpr, X_GROUPED: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BM]: the channels ``on`` of an expert's weight times rows of x, over ``length`` columns.

    x: where each row begins, [BM]; live: which of them are read; x_scales: where in x_scale theirs begin, which is
    applied if X_GROUPED. tiles: those of 16 channels that ``on`` is made of.
    """
    HALVES: tl.constexpr = GROUP != 0 and GROUP < BK  # a step has two groups
    WIDTH: tl.constexpr = BK // 2 if HALVES else BK  # columns that are multiplied at once
    tl.static_assert(GROUP == 0 or GROUP >= WIDTH)
    if KIND == "int4":
        tiles = (expert * (stored_out // 16) + tiles).to(tl.int64)
        codes += tiles[:, None] * (stored_columns * 8) + start * 8 + tl.arange(0, BK * 8)[None, :]
    else:
        codes += (expert * stored_out + on).to(tl.int64)[:, None] * stored_columns
        codes += start + tl.arange(0, WIDTH)[None, :]
    x = x[None, :] + (start + tl.arange(0, WIDTH))[:, None]
    scales += expert.to(tl.int64) * scale_expert + (on // SCALE_ROWS) * scale_row
    known = on < out
    if KIND == "fp8" or GROUP:
        acc = tl.zeros((BN, BM), tl.float32)
    else:
        acc = tl.zeros((BN, BM), tl.int32)
    for k in tl.range(0, length, BK, num_stages=STAGES):
        if KIND == "int4":
            w = int8_operand(tl.load(codes), BN, BK, PTX)
            if HALVES:
                w, other = int8_halves(w, BN, BK)
            codes += BK * 8
        else:
            w = tl.load(codes)
            if HALVES:
                other = tl.load(codes + WIDTH)
            codes += BK
        acc = _add(
            acc, w, x, live, x_scale, x_scales, scales, known, start + k, columns, scale_group, KIND, GROUP, WORDS,
            X_GROUPED, EVEN, BM, BN, WIDTH,
        )  # fmt: skip
        if HALVES:
            acc = _add(
                acc, other, x + WIDTH, live, x_scale, x_scales, scales, known, start + k + WIDTH, columns, scale_group,
                KIND, GROUP, WORDS, X_GROUPED, EVEN, BM, BN, WIDTH,
            )  # fmt: skip
        x += BK
    acc = acc.to(tl.float32)
    if not GROUP:
        acc *= _scale(scales, known, WORDS)[:, None]
    if KIND == "int4":
        acc *= 0.0625  # codes were multiplied in the upper half of a byte
    return acc


@triton.jit
def _add(
    acc, w, x, live, x_scale, x_scales, scales, known, first, columns, scale_group,
    KIND: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, X_GROUPED: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """acc and what the columns from ``first`` on add to it, w [BN, WIDTH] being the weight's, of one group."""
    mask = live[None, :] if EVEN else live[None, :] & (first + tl.arange(0, WIDTH)[:, None] < columns)
    inputs = tl.load(x, mask=mask, other=0.0)
    if GROUP:
        group = first // GROUP
        scale = _scale(scales + group * scale_group, known, WORDS)
    if KIND == "fp8":
        part = tl.dot(w, inputs, tl.zeros((BN, BM), tl.float32))
    else:
        part = tl.dot(w, inputs, tl.zeros((BN, BM), tl.int32), out_dtype=tl.int32)
    if GROUP:
        part = part.to(tl.float32) * scale[:, None]
        if X_GROUPED:
            part *= tl.load(x_scale + x_scales + group, mask=live, other=0.0)[None, :]
    return acc + part


@triton.jit
def _scale(place, known, WORDS: tl.constexpr):
    """Scales of the weight, as float32."""
    if WORDS == "":
        scale = tl.load(place, mask=known, other=0.0).to(tl.float32)
    else:
        scale = scales_of(tl.load(place), tl.bfloat16 if WORDS == "bf16" else tl.float16)  # rows are padded
    return scale
