"""Launching the Triton kernels: tiles for the rows at hand, outputs, and what differs between GPUs."""

from __future__ import annotations

import dataclasses
import functools
import os

import torch
import triton
from torch import Tensor

from .. import tiles
from ..layouts import COLUMNS
from ..targets import Target, attached, current
from ..tiles import Tiles, Weight, grid_blocks
from .dequantize import dequantize
from .float_product import float_product
from .scaled_product import scaled_product

MANY_ROWS = 1024  # of a Linear: from here on, the weight is dequantized slice by slice for the vendor's product
SLICE_BYTES = 16 * 2**20  # of such a slice, so that it stays in the L2 cache
OVERLAP = True  # launches, on GPUs that can
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _path(device: str) -> dict[str, bool]:
    """PTX: inline assembly of NVIDIA's; WIDE: float32, as the interpreter has no bfloat16."""
    return {"PTX": device == "cuda" and not torch.version.hip and not _INTERPRETED, "WIDE": _INTERPRETED}


def overlap(device: torch.device) -> dict[str, bool]:
    """PDL: the kernel starts before the one before it is complete (``overlap.py``), which Triton has to be told."""
    if OVERLAP and device.type == "cuda" and _target(device).has_pdl:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def _target(device: torch.device) -> Target:
    """The GPU that x is on; in the interpreter, the one that is planned for."""
    return _attached(device.index) if device.type == "cuda" else current()


@functools.cache
def _attached(index: int) -> Target:
    with torch.cuda.device(index):
        return attached()


def float_linear(
    x: Tensor, codes: Tensor, pairs: Tensor, bias: Tensor | None, ends: Tensor | None, bits: int, wgmma: bool,
    group: int, centered: bool, out: int, splits: int,
) -> Tensor:  # fmt: skip
    """``qcompile_cuda::float_linear``: x [rows, in] -> [rows, out] in its dtype, or float32 [splits, rows, out].

    ends: int32 [experts] for rows that are sorted by expert, None for one weight. splits 0: as many as are right for
    so many rows, and summed here; others were asked from ``tiles.choose`` for this number of rows.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, experts = x.shape[0], 0 if ends is None else ends.shape[0]
    weight = Weight.of(codes, f"w{bits}a16", group, experts)
    stored_out, columns = weight.out, weight.columns
    if not rows:
        return x.new_empty((splits, 0, out), dtype=torch.float32) if splits else x.new_empty((0, out))
    if ends is None and rows >= MANY_ROWS and not splits:
        return _with_vendor(x, codes, pairs, bias, bits, wgmma, group, centered, out)
    chosen = tiles.choose(weight, rows, _target(x.device))
    count = splits or chosen.splits
    if columns % (count * chosen.bk):  # splits that were chosen for another GPU
        chosen = dataclasses.replace(chosen, bk=COLUMNS)
    partial = count > 1 or splits > 0
    y = x.new_empty((count, rows, out), dtype=torch.float32) if partial else x.new_empty((rows, out))
    grid = (stored_out // chosen.bn, grid_blocks(chosen, rows, experts), count)
    float_product[grid](
        x, codes, pairs.view(torch.int32), bias, y, ends,
        rows, experts, out, stored_out, x.shape[1], columns, columns // count, x.stride(0),
        **float_constants(chosen, bits, wgmma, group, centered), **common_constants(chosen, experts, partial, bias),
        EVEN=x.shape[1] == columns, **_path(x.device.type), **overlap(x.device), num_warps=chosen.warps,
        num_stages=chosen.stages,
    )  # fmt: skip
    return y if splits or not partial else _summed(y, bias, x.dtype)


def scaled_linear(
    x: Tensor, x_scale: Tensor | None, codes: Tensor, scales: Tensor, bias: Tensor | None, ends: Tensor | None,
    kind: str, group: int, scale_rows: int, x_grouped: bool, out: int, splits: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``qcompile_cuda::scaled_linear``: [rows, in] -> [rows, out] in ``dtype``, or float32 [splits, rows, out]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, experts = x.shape[0], 0 if ends is None else ends.shape[0]
    weight = Weight.of(codes, kind, group, experts)
    stored_out, columns = weight.out, weight.columns
    if not rows:
        return x.new_empty((splits, 0, out) if splits else (0, out), dtype=torch.float32 if splits else dtype)
    chosen = tiles.choose(weight, rows, _target(x.device))
    count = splits or 1
    if columns % (count * chosen.bk):
        chosen = dataclasses.replace(chosen, bk=COLUMNS)
    y = x.new_empty((count, rows, out), dtype=torch.float32) if splits else x.new_empty((rows, out), dtype=dtype)
    words = words_of(scales, kind)
    scales, places = _scale_places(scales, kind)
    grid = (stored_out // chosen.bn, grid_blocks(chosen, rows, experts), count)
    scaled_product[grid](
        x, None if x_scale is None else x_scale.contiguous(), codes, scales, bias, y, ends,
        rows, experts, out, stored_out, x.shape[1], columns, columns // count, x.stride(0),
        0 if x_scale is None or x_scale.numel() == 1 else x_scale.shape[-1], *places,
        KIND=kind, GROUP=group, WORDS=words, SCALE_ROWS=scale_rows, X_GROUPED=x_grouped,
        EVEN=x.shape[1] == columns, **common_constants(chosen, experts, splits > 0, bias), **_path(x.device.type),
        **overlap(x.device), num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return y


def _scale_places(scales: Tensor, kind: str) -> tuple[Tensor, tuple[int, int, int]]:
    """The scales as the kernel reads them, and the strides of expert, row and group."""
    if kind == "fp8":  # [(experts,) rows, groups]
        return scales, (scales[0].numel() if scales.dim() == 3 else 0, scales.shape[-1], 1)
    rows = scales.shape[-2]  # [(experts,) groups, rows, 2]
    if scales.element_size() == 2:
        words = scales.view(torch.int32)
        return words, (words[0].numel() if words.dim() == 4 else 0, 1, rows)
    return scales, (scales[0].numel() if scales.dim() == 4 else 0, 2, 2 * rows)


def words_of(scales: Tensor, kind: str) -> str:
    """What WORDS of ``scaled_product`` is for such scales."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(scales.dtype, "") if kind != "fp8" else ""


def float_constants(chosen: Tiles, bits: int, wgmma: bool, group: int, centered: bool) -> dict[str, int]:
    """What ``float_product`` is compiled for, of the weight."""
    post = group >= chosen.bk and chosen.bm <= tiles.FEW_ROWS
    return {"BITS": bits, "WGMMA": wgmma, "GROUP": group, "CENTERED": centered, "POST": post}


def common_constants(chosen: Tiles, experts: int, partial: bool, bias: Tensor | None) -> dict[str, int]:
    """What every product of a graph is compiled for, of the call."""
    return {**tile_constants(chosen, experts), "PARTIAL": partial, "HAS_BIAS": bias is not None and not partial}


def tile_constants(chosen: Tiles, experts: int) -> dict[str, int]:
    """What every kernel is compiled for, of its tiles and the number of experts."""
    shape = {"MODE": chosen.mode, "BM": chosen.bm, "BN": chosen.bn, "BK": chosen.bk, "STAGES": chosen.stages}
    return {**shape, "EXPERTS": triton.next_power_of_2(max(1, experts))}


def _summed(partial: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    total = partial.sum(0)
    return (total if bias is None else total + bias).to(dtype)


def _with_vendor(
    x: Tensor, codes: Tensor, pairs: Tensor, bias: Tensor | None, bits: int, wgmma: bool, group: int, centered: bool,
    out: int,
) -> Tensor:  # fmt: skip
    stored_out, columns, bn = pairs.shape[-2], x.shape[1], 64
    result = x.new_empty((x.shape[0], out))
    step = max(bn, SLICE_BYTES // (columns * x.element_size()) // bn * bn)
    scratch = x.new_empty((min(step, stored_out), columns))
    for first in range(0, out, step):
        some = min(step, stored_out - first)
        grid = (some // bn, triton.cdiv(codes.shape[-1] // (2 * bits), 64))
        dequantize[grid](
            codes, pairs.view(torch.int32), scratch, first, stored_out, columns, codes.shape[-1] // (2 * bits),
            BITS=bits, WGMMA=wgmma, GROUP=group, CENTERED=centered, BN=bn, BK=64, PTX=_path(x.device.type)["PTX"],
        )  # fmt: skip
        last = min(out, first + some)
        torch.mm(x, scratch[: last - first].t(), out=result[:, first:last])
    return result if bias is None else result.add_(bias)
