"""The two products of experts, with what follows each: the gated activation, and the sum over a token's experts.

A row is a (token, slot) pair, in the order of the router's choice: no row is moved to be sorted, its number is.
"""

import triton
import triton.language as tl

from .activations import gated
from .float_product import float_sums
from .overlap import wait
from .places import gate_and_up, pairs_of
from .scaled_product import scaled_sums


@triton.jit
def gate_up(
    x, x_scale, codes, scales, y, ids, order, ends,
    pairs, experts, intermediate, stored_out, columns, stored_columns, stride_x, x_scale_row,
    scale_expert, scale_row, scale_group,
    K: tl.constexpr, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, WGMMA: tl.constexpr, CENTERED: tl.constexpr,
    POST: tl.constexpr, WORDS: tl.constexpr, SCALE_ROWS: tl.constexpr, X_GROUPED: tl.constexpr,
    MODE: tl.constexpr, EXPERTS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[pairs, intermediate] = ``f(x @ gate.T) * (x @ up.T)`` of each pair's expert, x [tokens, columns].

    The weight has the rows of gate, then those of up; a program computes as many of each. K: pairs of a token. The
    rest is as in ``float_product`` (KIND "float") and ``scaled_product``.
    """
    pn = tl.program_id(0)
    wait(PDL)
    expert, pair, live, some = pairs_of(ids, order, ends, pairs, experts, MODE, EXPERTS, BM)
    if not some:
        return
    tiles, on = gate_and_up(pn, intermediate, BN)
    acc = _sums(
        x, x_scale, pair // K, live, codes, scales, expert, tiles, on, 2 * intermediate, stored_out, columns,
        stored_columns, stride_x, x_scale_row, scale_expert, scale_row, scale_group, KIND, GROUP, BITS, WGMMA, CENTERED,
        POST, WORDS, SCALE_ROWS, X_GROUPED, EVEN, BM, BN, BK, STAGES, PTX, WIDE,
    )  # fmt: skip
    gate, up = tl.split(tl.trans(tl.reshape(acc, (2, BN // 2, BM)), 1, 2, 0))
    result = gated(gate, up, FUNCTION, ALPHA, LIMIT, SHIFT)
    channel = pn * (BN // 2) + tl.arange(0, BN // 2)
    y += pair[None, :].to(tl.int64) * intermediate + channel[:, None]
    tl.store(y, result.to(y.dtype.element_ty), mask=live[None, :])


@triton.jit
def down(
    x, x_scale, codes, scales, y, ids, order, ends, routing,
    pairs, experts, out, stored_out, columns, stored_columns, stride_x, x_scale_row,
    scale_expert, scale_row, scale_group,
    K: tl.constexpr, SLOTS: tl.constexpr, PARTIAL: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, WGMMA: tl.constexpr, CENTERED: tl.constexpr,
    POST: tl.constexpr, WORDS: tl.constexpr, SCALE_ROWS: tl.constexpr, X_GROUPED: tl.constexpr,
    MODE: tl.constexpr, EXPERTS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """MODE 2: y[pairs, out] = ``x @ W.T`` of each pair's expert, x [pairs, columns].

    MODE 1: y[tokens, out] is the sum over the pairs of a token, weighted by ``routing``; or (PARTIAL) y[splits, tokens,
    out] over SLOTS pairs each, which are added up later. Always in the same order.
    """
    pn = tl.program_id(0)
    wait(PDL)
    on = pn * BN + tl.arange(0, BN)
    tiles = pn * (BN // 16) + tl.arange(0, BN // 16)
    if MODE == 1:
        token, split = tl.program_id(1), tl.program_id(2)
        one = tl.arange(0, BM) == 0
        total = tl.zeros((BN, BM), tl.float32)
        for slot in range(SLOTS):
            pair = token * K + split * SLOTS + slot
            expert = tl.load(ids + pair).to(tl.int32)
            if (expert >= 0) & (expert < experts):
                row = pair + tl.zeros((BM,), tl.int32)
                acc = _sums(
                    x, x_scale, row, one, codes, scales, expert, tiles, on, out, stored_out, columns, stored_columns,
                    stride_x, x_scale_row, scale_expert, scale_row, scale_group, KIND, GROUP, BITS, WGMMA, CENTERED,
                    POST, WORDS, SCALE_ROWS, X_GROUPED, EVEN, BM, BN, BK, STAGES, PTX, WIDE,
                )  # fmt: skip
                total += acc * tl.load(routing + pair).to(tl.float32)
        y += (split * (pairs // K) + token if PARTIAL else token).to(tl.int64) * out
        mask = one[None, :] & (on[:, None] < out)
        tl.store(y + on[:, None] + tl.zeros((1, BM), tl.int32), total.to(y.dtype.element_ty), mask=mask)
    else:
        expert, pair, live, some = pairs_of(ids, order, ends, pairs, experts, MODE, EXPERTS, BM)
        if not some:
            return
        acc = _sums(
            x, x_scale, pair, live, codes, scales, expert, tiles, on, out, stored_out, columns, stored_columns,
            stride_x, x_scale_row, scale_expert, scale_row, scale_group, KIND, GROUP, BITS, WGMMA, CENTERED,
            POST, WORDS, SCALE_ROWS, X_GROUPED, EVEN, BM, BN, BK, STAGES, PTX, WIDE,
        )  # fmt: skip
        y += pair[None, :].to(tl.int64) * out + on[:, None]
        tl.store(y, acc.to(y.dtype.element_ty), mask=live[None, :] & (on[:, None] < out))


@triton.jit
def _sums(
    x, x_scale, row, live, codes, scales, expert, tiles, on, out, stored_out, columns, stored_columns, stride_x,
    x_scale_row, scale_expert, scale_row, scale_group,
    KIND: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, WGMMA: tl.constexpr, CENTERED: tl.constexpr,
    POST: tl.constexpr, WORDS: tl.constexpr, SCALE_ROWS: tl.constexpr, X_GROUPED: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BM]: rows of x times channels ``on``, over all columns and with all scales."""
    begun = x + row.to(tl.int64) * stride_x
    if KIND == "float":
        acc = float_sums(
            begun, live, codes, scales, expert, tiles, on, 0, stored_columns, columns, stored_out, stored_columns,
            BITS, WGMMA, GROUP, CENTERED, EVEN, POST, BM, BN, BK, STAGES, PTX, WIDE,
        )  # fmt: skip
    else:
        acc = scaled_sums(
            begun, live, x_scale, row * x_scale_row, codes, scales, expert, tiles, on, 0, stored_columns, out, columns,
            stored_out, stored_columns, scale_expert, scale_row, scale_group, KIND, GROUP, WORDS, SCALE_ROWS, X_GROUPED,
            EVEN, BM, BN, BK, STAGES, PTX,
        )  # fmt: skip
        if not X_GROUPED:
            acc *= tl.load(x_scale + row * x_scale_row, mask=live, other=0.0)[None, :]
    return acc


@triton.jit
def sum_pairs(rows, routing, ids, y, experts, out, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y[tokens, out] = the weighted sum of each token's rows [tokens * K, out]; those of no expert are not read."""
    wait(PDL)
    token, channel = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(K):
        pair = token * K + slot
        expert = tl.load(ids + pair)
        written = tl.where((expert >= 0) & (expert < experts), out, 0)
        row = tl.load(rows + pair.to(tl.int64) * out + channel, mask=channel < written, other=0.0)
        total += row.to(tl.float32) * tl.load(routing + pair).to(tl.float32)
    tl.store(y + token.to(tl.int64) * out + channel, total.to(y.dtype.element_ty), mask=channel < out)
