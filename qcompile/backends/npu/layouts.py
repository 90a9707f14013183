"""Bit layouts of Ascend's operations, and how canonical weights get there and back.

int4 words      int32 [..., in, out / 8]: bits 4 i to 4 i + 3 of word m hold column 8 m + i in two's complement; what
                npu_convert_weight_to_int4pack writes, made here by byte operations on the weight's own device
int8            [..., in, out]
scale container int64: the bits of a float32 in the low half, zeros above
quant parameter int64 of npu_trans_quant_param: the upper 19 bits of a float32, and bit 46
FRACTAL_NZ      what npu_format_cast makes of either: another order in memory under the same logical shape

Weights are converted some rows at a time: beside a weight and its new layout memory holds a few MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ... import numerics
from ...numerics import pack_int4, unpack_int4

ND, FRACTAL_NZ = 2, 29
TORCH_NUMBERS = {
    torch.int8: 1, torch.int32: 3, torch.float16: 5, torch.float32: 6, torch.qint8: 12, torch.bfloat16: 15,
    torch.quint4x2: 16,
}  # fmt: skip
"""How torch_npu's schemas number dtypes (those of c10::ScalarType)."""


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


# ------------------------------------------------------------------------------------------------------------- codes


def signed(codes: Tensor, bits: int, columns: int) -> Tensor:
    """Canonical codes uint8 [..., bytes] as numbers around zero, int8 [..., columns]: q - 2 ** (bits - 1)."""
    if bits == 8:
        return numerics.signed_codes(codes)
    return numerics.unpack_codes(codes, bits, columns).view(torch.int8) - 2 ** (bits - 1)


def unsigned(values: Tensor, bits: int) -> Tensor:
    """Inverse of ``signed``: canonical codes uint8 [..., bytes] of int8 [..., columns]."""
    codes = values.contiguous().view(torch.uint8)
    return codes ^ 0x80 if bits == 8 else numerics.pack_codes((codes + 2 ** (bits - 1)), bits)


Place = tuple[Any, ...]  # (rows,) or (expert, rows)
Change = Callable[[Place, Tensor], Tensor]  # what is done to the numbers of a place on the way


def unchanged(place: Place, values: Tensor) -> Tensor:
    """Nothing."""
    return values


def _pieces(rows: tuple[int, ...], columns: int) -> Iterator[Place]:
    """Places of [..., rows, columns] with at most some MB each, in multiples of 8 rows."""
    step = max(8, numerics.CHUNK // max(1, columns) // 8 * 8)
    for expert in [()] if len(rows) == 1 else [(e,) for e in range(rows[0])]:
        for start in range(0, rows[-1], step):
            yield (*expert, slice(start, start + step))


def rows_in_pieces(codes: Tensor, bits: int, columns: int) -> Iterator[tuple[Place, Tensor]]:
    """Places of canonical codes [..., rows, bytes], and the int8 numbers [rows, columns] there."""
    for place in _pieces(tuple(codes.shape[:-1]), columns):
        yield place, signed(codes[place], bits, columns)


def to_int8(codes: Tensor, bits: int, columns: int, change: Change = unchanged) -> Tensor:
    """Canonical codes [..., out, bytes] as int8 [..., in, out]."""
    result = codes.new_empty((*codes.shape[:-2], columns, codes.shape[-2]), dtype=torch.int8)
    for (*expert, rows), values in rows_in_pieces(codes, bits, columns):
        result[(*expert, slice(None), rows)] = change((*expert, rows), values).t()
    return result


def to_int4(codes: Tensor, bits: int, columns: int, change: Change = unchanged) -> Tensor:
    """Canonical codes [..., out, bytes] of at most 4 bits as pairs of int4, int8 [..., in, out / 2].

    Viewed as int32 these are int4 words; FRACTAL_NZ is made before that.
    """
    result = codes.new_empty((*codes.shape[:-2], columns, codes.shape[-2] // 2), dtype=torch.int8)
    for (*expert, rows), values in rows_in_pieces(codes, bits, columns):
        pairs = slice(rows.start // 2, rows.stop // 2)
        words = pack_int4(change((*expert, rows), values).t())
        result[(*expert, slice(None), pairs)] = words.view(torch.int8)
    return result


def from_int8(weight: Tensor, bits: int, change: Change = unchanged) -> Tensor:
    """Inverse of ``to_int8``."""
    *experts, columns, out = weight.shape
    result = _codes_of(weight, (*experts, out), columns, bits)
    for *expert, rows in _pieces(result.shape[:-1], columns):
        values = weight[(*expert, slice(None), rows)].t()
        result[(*expert, rows)] = unsigned(change((*expert, rows), values), bits)
    return result


def from_int4(words: Tensor, bits: int, change: Change = unchanged) -> Tensor:
    """Canonical codes of int4 words [..., in, out / 8]."""
    *experts, columns, out = words.shape
    result = _codes_of(words, (*experts, 8 * out), columns, bits)
    for *expert, rows in _pieces(result.shape[:-1], columns):
        part = words[(*expert, slice(None), slice(rows.start // 8, rows.stop // 8))]
        result[(*expert, rows)] = unsigned(change((*expert, rows), unpack_int4(part).t()), bits)
    return result


def _codes_of(stored: Tensor, rows: tuple[int, ...], columns: int, bits: int) -> Tensor:
    """Empty canonical codes of that many rows and columns."""
    return stored.new_empty((*rows, -(-columns * bits // 8)), dtype=torch.uint8)


# ------------------------------------------------------------------------------------------------------------ scales


def to_container(scales: Tensor) -> Tensor:
    """Scales as scale containers, int64; exact for every type up to float32."""
    return scales.float().contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def from_container(containers: Tensor) -> Tensor:
    """The float32 in scale containers."""
    return containers.to(torch.int32).view(torch.float32)


def to_quant_parameter(scales: Tensor) -> Tensor:
    """float32 scales as quant parameters, int64: rounded to 10 bits of mantissa, half to even.

    ``npu_trans_quant_param(scale, round_mode=1)``; its default truncates, which makes every result too small.
    """
    bits = scales.float().contiguous().view(torch.int32)
    rounded = bits + 0xFFF + ((bits >> 13) & 1)
    return (rounded.to(torch.int64) & 0xFFFFE000) | 1 << 46


def from_quant_parameter(parameters: Tensor) -> Tensor:
    """The float32 that an operation reads in quant parameters."""
    return from_container(parameters & 0xFFFFE000)


def compensation(codes: Tensor, bits: int, columns: int, scales: Tensor, group_size: int) -> Tensor:
    """``8 * sum_k w[n, k] * s[n, g(k)]`` of canonical codes, float32 [..., out]: the bias of int8 times int4.

    The operation splits each int8 activation into 16 hi + lo + 8 with hi and lo in -8 to 7, and multiplies hi and lo;
    this is the share of the 8. It is made from these codes, one shard's, and the very scales (float32 [..., out,
    groups]) that the operation reads: anything stored with a checkpoint was made from others.
    """
    result = torch.empty(codes.shape[:-1], dtype=torch.float32, device=codes.device)
    for place, values in rows_in_pieces(codes, bits, columns):
        padded = torch.nn.functional.pad(values.to(torch.int32), (0, -columns % group_size))
        sums = padded.unflatten(-1, (-1, group_size)).sum(-1)
        result[place] = (8 * sums * scales[place]).sum(-1)
    return result


def column_sums(codes: Tensor, bits: int, columns: int) -> Tensor:
    """``sum_k w[n, k]`` of canonical codes, int32 [..., out]: what an activation's zero point is multiplied with."""
    result = torch.empty(codes.shape[:-1], dtype=torch.int32, device=codes.device)
    for place, values in rows_in_pieces(codes, bits, columns):
        result[place] = values.sum(-1, dtype=torch.int32)
    return result


# ------------------------------------------------------------------------------------------------------- FRACTAL_NZ


def to_nz(weight: Tensor) -> Tensor:
    """A weight as FRACTAL_NZ; on any other device than an NPU it stays as it is, with the same values."""
    if weight.device.type != "npu":
        return weight
    torch.npu.config.allow_internal_format = True  # type: ignore[attr-defined]  # without it the cast does nothing
    return torch.ops.npu.npu_format_cast(weight, FRACTAL_NZ)


def to_nd(weight: Tensor) -> Tensor:
    """Inverse of ``to_nz``; exact, and nothing for a weight that is not FRACTAL_NZ."""
    if weight.device.type != "npu" or torch.ops.npu.get_npu_format(weight) != FRACTAL_NZ:
        return weight
    return torch.ops.npu.npu_format_cast(weight, ND)
