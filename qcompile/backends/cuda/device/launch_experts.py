"""Launching the products of experts: a (token, slot) pair with few others has a program, many are sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .... import gates
from ....types import Scheme
from .. import tiles
from ..tiles import Tiles, Weight, grid_blocks
from ..weight_only import WeightOnly
from . import launch
from .expert_products import down as down_kernel
from .expert_products import gate_up as gate_up_kernel
from .expert_products import sum_pairs

SUMMED = 1024  # channels that a program of ``sum_pairs`` writes


class Product:
    """What both kernels take of a product: its weight, its rows, tiles for so many pairs, and what to compile."""

    def __init__(
        self, x: Sequence[Tensor], weight: Sequence[Tensor], scheme: Scheme, kernel: Any, ids: Tensor, out: int,
        part: str,
    ) -> None:  # fmt: skip
        rows, *scale = x
        codes, scales = weight
        self.x = rows if rows.stride(-1) == 1 else rows.contiguous()
        self.scale = scale[0].contiguous() if scale else None
        self.codes, self.pairs, self.experts = codes, ids.numel(), codes.shape[0]
        if isinstance(kernel, WeightOnly):
            self.scales, self.places = scales.view(torch.int32), (0, 0, 0)
        else:
            self.scales, self.places = launch._scale_places(scales, kernel.kind)
        stored = Weight.of(codes, kernel.kind, scheme.weight.scale_columns or 0, self.experts, part)
        self.stored_out, self.columns = stored.out, stored.columns
        self.tiles = tiles.choose(stored, self.pairs, launch._target(rows.device))
        grouped = scheme.weight.block is not None and self.scale is not None and self.scale.shape[-1] > 1
        words = "" if isinstance(kernel, WeightOnly) else launch.words_of(scales, kernel.kind)
        self.constants = {
            **weight_constants(self.tiles, self.experts, scheme, kernel, words, grouped, out),
            "K": ids.shape[1], "EVEN": rows.shape[1] == self.columns, **launch._path(rows.device.type),
            **launch.overlap(rows.device), "num_warps": self.tiles.warps, "num_stages": self.tiles.stages,
        }  # fmt: skip

    def sizes(self, out: int) -> tuple[int, ...]:
        """The integers that both kernels take."""
        x_scale_row = 0 if self.scale is None else self.scale.shape[-1]
        return (
            self.pairs, self.experts, out, self.stored_out, self.x.shape[1], self.columns, self.x.stride(0),
            x_scale_row, *self.places,
        )  # fmt: skip


def gate_up(
    x: Sequence[Tensor], ids: Tensor, order: Tensor, ends: Tensor, weight: Sequence[Tensor], scheme: Scheme,
    kernel: Any, out: int, activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``qcompile_cuda::gate_up``: x [tokens, hidden] -> [tokens * k, out]."""
    y = x[0].new_empty((ids.numel(), out), dtype=dtype)
    if not ids.numel():
        return y
    made = Product(x, weight, scheme, kernel, ids, 2 * out, "gate_up")
    grid = (made.stored_out // made.tiles.bn, grid_blocks(made.tiles, made.pairs, made.experts))
    gate_up_kernel[grid](
        made.x, made.scale, made.codes, made.scales, y, ids.contiguous(), order, ends, *made.sizes(out),
        **gate_constants(activation), **made.constants,
    )  # fmt: skip
    return y


def down(
    x: Sequence[Tensor], ids: Tensor, routing: Tensor, order: Tensor, ends: Tensor, weight: Sequence[Tensor],
    scheme: Scheme, kernel: Any, out: int, splits: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``qcompile_cuda::down``: x [tokens * k, intermediate] -> [tokens, out], or float32 [splits, tokens, out]."""
    tokens, k = ids.shape
    if not ids.numel():
        return x[0].new_zeros((tokens, out), dtype=dtype)
    made = Product(x, weight, scheme, kernel, ids, out, "down")
    ids, routing = ids.contiguous(), routing.contiguous()
    few = made.tiles.mode == tiles.EACH_ROW
    count = splits or (tiles.expert_splits(tokens, k, made.stored_out, launch._target(x[0].device)) if few else 1)
    if count > 1:
        y = x[0].new_empty((count, tokens, out), dtype=torch.float32)
    else:
        y = x[0].new_empty((tokens if few else made.pairs, out), dtype=dtype)
    blocks = tokens if few else grid_blocks(made.tiles, made.pairs, made.experts)
    down_kernel[made.stored_out // made.tiles.bn, blocks, count](
        made.x, made.scale, made.codes, made.scales, y, ids, order, ends, routing, *made.sizes(out),
        SLOTS=k // count, PARTIAL=count > 1, **made.constants,
    )  # fmt: skip
    if few:
        return y if splits or count == 1 else y.sum(0).to(dtype)
    result = y.new_empty((tokens, out))
    grid = (tokens, triton.cdiv(out, SUMMED))
    sum_pairs[grid](y, routing, ids, result, made.experts, out, K=k, BLOCK=SUMMED, **launch.overlap(y.device))
    return result


def weight_constants(
    chosen: Tiles, experts: int, scheme: Scheme, kernel: Any, words: str, grouped: bool, out: int
) -> dict[str, Any]:
    """What both kernels are compiled for."""
    shape, group = launch.tile_constants(chosen, experts), scheme.weight.scale_columns or 0
    if scheme.activation is None:
        centered = kernel.is_centered(scheme)
        own = launch.float_constants(chosen, kernel.bits, kernel.order == "wgmma", group, centered)
        return {**shape, **own, "KIND": "float", "WORDS": "", "SCALE_ROWS": 1, "X_GROUPED": False}
    return {
        **shape, "KIND": kernel.kind, "GROUP": group, "WORDS": words, "SCALE_ROWS": kernel.scale_rows(scheme, out),
        "X_GROUPED": grouped, "BITS": 8, "WGMMA": False, "CENTERED": False, "POST": False,
    }  # fmt: skip


def gate_constants(activation: str) -> dict[str, Any]:
    """A gated activation, as ``gate_up`` is compiled for it."""
    gate = gates.parse(activation)
    return {"FUNCTION": gate.function, "ALPHA": gate.alpha, "LIMIT": gate.limit, "SHIFT": gate.shift}
