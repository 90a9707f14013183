"""The tensors of compressed-tensors: what a scheme has on disk in each layout, and how they become canonical ones.

Codes of a Linear [out, in], by what ``site.layout["codes"]`` calls them:

    words    weight_packed int32 [out, ceil(in * bits / 32)], codes plus 2 ** (bits - 1), a little-endian bit stream
             along ``in``; weight_shape int64 [2]; zero points as another such stream along ``out``
    bytes    weight int8 [out, in], the codes as they are
    pairs    weight int8 [out / 2, in]: row 2 r in the low, row 2 r + 1 in the high 4 bits of row r
    floats   weight float8_e4m3 [out, in]
    nibbles  weight_packed uint8 [out, in / 2], e2m1, column 2 i in the low 4 bits of byte i
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..errors import FormatError
from ..types import PackedWeight, Scheme
from . import Get, Shape, StoredSite
from ._headers import FLOATS, Stored, Wanted, finite
from ._order import in_groups
from ._words import from_words, is_padded, to_words, unpack_words, width

_CODES = {
    "float-quantized": "floats",
    "mxfp8-quantized": "floats",
    "nvfp4-pack-quantized": "nibbles",
    "mxfp4-pack-quantized": "nibbles",
    "pack-quantized": "words",
}
ZERO_POINTS = {"weight_zero_point": "weights", "input_zero_point": "activations"}
_POWERS = ("mxfp4", "mxfp8")  # scales are powers of two, in 8 bits
_ONE = ((1,), (), (1, 1))  # shapes of a single number


def codes_of(layout: str, scheme: Scheme, stored: Stored, shape: Shape) -> str:
    """How codes are stored in a layout; pairs and bytes are told apart by their rows."""
    if layout in _CODES:
        return _CODES[layout]
    if scheme.weight.number == "fp8":
        return "floats"
    header, (out, inn) = stored.get("weight"), shape
    halved = header is not None and header.shape == (out // 2, inn) and out % 2 == 0
    return "pairs" if scheme.weight.bits == 4 and halved else "bytes"


def has_padding(stored: Stored, shape: Shape, bits: int, section: Mapping[str, Any]) -> bool:
    """Whether words have unused bits: by the width of codes or zeros; where neither tells, by the writer's version."""
    for suffix, n, axis in (("weight_packed", shape[1], 1), ("weight_zero_point", shape[0], 0)):
        header = stored.get(suffix)
        if header and len(header.shape) == 2 and (known := is_padded(header.shape[axis], n, bits)) is not None:
            return known
    numbers = re.match(r"(\d+)\.(\d+)", str(section.get("version")))
    return 32 % bits != 0 and numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, 18)


# -------------------------------------------------------------------------------------------------------- expected


def wanted(shape: Shape, scheme: Scheme, codes: str, padded: bool) -> Wanted:
    """(dtypes, shapes ...) of every tensor that a scheme has, by the last part of its name."""
    (out, inn), weight = shape, scheme.weight
    rows, groups = weight.scale_rows(out), weight.groups(inn)
    words = width(inn, weight.bits, padded)
    table: dict[str, dict[str, tuple]] = {
        "words": {"weight_packed": (("I32",), (out, words)), "weight_shape": (("I64",), (2,))},
        "bytes": {"weight": (("I8",), (out, inn))},
        "pairs": {"weight": (("I8",), (out // 2, inn))},
        "floats": {"weight": (("F8_E4M3",), (out, inn))},
        "nibbles": {"weight_packed": (("U8",), (out, -(-inn // 2)))},
    }
    shapes: list[tuple[int, ...]] = [(rows, groups)]
    if weight.group_size is None and not weight.block:
        shapes += [(rows,), *_ONE]  # one scale for a whole integer weight is repeated for each channel
    dtypes = ("U8", "F8_E8M0") if weight.number in _POWERS else ("F8_E4M3",) if weight.number == "nvfp4" else FLOATS
    if codes == "pairs":
        dtypes = (*dtypes, "I64", "U64")
    result: dict[str, tuple] = {"weight_scale": (dtypes, *shapes), **table[codes]}
    if not weight.symmetric and codes == "words":
        result["weight_zero_point"] = (("I32",), (width(out, weight.bits, padded), groups))
    elif not weight.symmetric:
        result["weight_zero_point"] = (("I8",), (out, groups))
    if weight.number == "nvfp4":
        result["weight_global_scale"] = (("F32",), *_ONE)
    for name in scheme.activation.params if scheme.activation else ():
        if name == "input_scale" and weight.number == "nvfp4":
            result["input_global_scale"] = (("F32",), *_ONE)
        elif name == "input_scale":
            result["input_scale"] = (FLOATS, *_ONE)
        elif name == "input_zero":
            result["input_zero_point"] = (("I8",), *_ONE)
    return result


# --------------------------------------------------------------------------------------------------------- reading


def read(site: StoredSite, get: Get) -> PackedWeight:
    """The canonical weight; bit for bit what compressed-tensors' own decompression multiplies."""
    weight, out, layout = site.scheme.weight, site.shape[0], site.layout
    _refuse_zero_points(site, get)
    scales = _scales(site, get)
    zeros = get(f"{site.name}.weight_zero_point") if not weight.symmetric else None
    codes = _codes(site, get)
    if zeros is not None and layout["codes"] == "words":
        zeros = unpack_words(zeros.t(), weight.bits, out, layout["padded"]).t().contiguous()
    elif zeros is not None:
        zeros = _unsigned(zeros, weight.bits, f"{site.name}.weight_zero_point")

    def number(name: str | None, dtype: torch.dtype) -> Tensor | None:
        if name is None or (name := f"{site.name}.{name}") not in site.tensors:
            return None
        return finite(get(name).reshape(1), name).to(dtype)

    named = site.scheme.activation.params if site.scheme.activation else ()
    step = "input_global_scale" if weight.number == "nvfp4" else "input_scale"
    params = {
        "outer": number("weight_global_scale", torch.float32),
        "input_scale": number(step, torch.float32),
        "input_zero": number("input_zero_point" if "input_zero" in named else None, torch.int32),
        "alpha": number(layout["alpha"], torch.float32),
    }
    g_idx = _group_of_each_input(get(f"{site.name}.weight_g_idx"), site) if layout["g_idx"] else None
    if g_idx is not None:
        return in_groups(site.scheme, site.shape, codes, scales, zeros, g_idx, **params)
    return PackedWeight(site.scheme, site.shape, codes, scales, zeros, None, **params)


def _refuse_zero_points(site: StoredSite, get: Get) -> None:
    """FormatError for zero points of symmetric numbers that are not zero; early versions stored them."""
    activation = site.scheme.activation
    symmetric = {"weights": site.scheme.weight.symmetric, "activations": activation is None or activation.symmetric}
    for suffix, what in ZERO_POINTS.items():
        name = f"{site.name}.{suffix}"
        if symmetric[what] and name in site.tensors and bool(get(name).float().any()):
            raise FormatError(f"{name} is not zero, but config.json says that {what} are symmetric")


def _scales(site: StoredSite, get: Get) -> Tensor:
    weight, (out, inn), name = site.scheme.weight, site.shape, f"{site.name}.weight_scale"
    scales = get(name)
    if weight.number in _POWERS:
        scales = scales.view(torch.float8_e8m0fnu)
    elif not scales.is_floating_point():  # 64 bits, of which the lower half is a float32
        scales = scales.view(torch.int64).to(torch.int32).view(torch.float32)
    rows = out if weight.number == "int" else weight.scale_rows(out)
    return finite(scales, name).reshape(-1, weight.groups(inn)).expand(rows, -1).contiguous()


def _codes(site: StoredSite, get: Get) -> Tensor:
    weight, (out, inn), kind = site.scheme.weight, site.shape, site.layout["codes"]
    if kind == "words":
        shape = get(f"{site.name}.weight_shape").tolist()
        if shape != [out, inn]:
            raise FormatError(f"{site.name}.weight_shape says {shape}, but the model's Linear is {[out, inn]}")
        return from_words(get(f"{site.name}.weight_packed"), weight.bits, inn, site.layout["padded"])
    if kind == "nibbles":
        return get(f"{site.name}.weight_packed")
    stored = get(f"{site.name}.weight")
    if kind == "floats":
        return stored.view(torch.uint8)
    rows = unpair(stored) if kind == "pairs" else stored
    return numerics.pack_codes(_unsigned(rows, weight.bits, f"{site.name}.weight"), weight.bits)


def unpair(pairs: Tensor) -> Tensor:
    """Signed codes int8 [2 n, in] of pairs of rows int8 [n, in]."""
    return torch.stack([pairs << 4 >> 4, pairs >> 4], 1).flatten(0, 1)


def paired(rows: Tensor) -> Tensor:
    """Rows int8 [2 n, in] of 4 bits as pairs int8 [n, in]; the inverse of ``unpair``."""
    return (rows[0::2] & 15) | (rows[1::2] << 4)


def _unsigned(values: Tensor, bits: int, name: str) -> Tensor:
    """Signed int8 numbers as unsigned codes; FormatError where they need more bits than the config says."""
    codes = (values ^ -128).view(torch.uint8) if bits == 8 else (values + 2 ** (bits - 1)).view(torch.uint8)
    if bits < 8 and values.numel() and int(codes.max()) >= 2**bits:
        raise FormatError(
            f"{name} holds numbers outside of {-(2 ** (bits - 1))}..{2 ** (bits - 1) - 1}, not {bits}-bit"
        )
    return codes


def _group_of_each_input(g_idx: Tensor, site: StoredSite) -> Tensor | None:
    """A stored order of columns, or None when it is the plain one; -1 everywhere means that none was kept."""
    weight, inn = site.scheme.weight, site.shape[1]
    if weight.group_size is None or bool((g_idx == -1).all()):
        return None
    if inn and (int(g_idx.min()) < 0 or int(g_idx.max()) >= weight.groups(inn)):
        raise FormatError(
            f"{site.name}.weight_g_idx names groups {int(g_idx.min())} to {int(g_idx.max())}, but there are "
            f"{weight.groups(inn)}"
        )
    is_plain = torch.equal(g_idx.long(), torch.arange(inn) // weight.group_size)
    return None if is_plain else g_idx


# --------------------------------------------------------------------------------------------------------- writing


def write(packed: PackedWeight) -> dict[str, Tensor]:
    """The tensors of one weight, by the last part of their names; the inverse of ``read``."""
    weight, (out, inn) = packed.scheme.weight, packed.shape
    codes, tensors = packed.codes, {}
    if packed.permutation is not None:
        columns = numerics.unpack_codes(codes, weight.bits, inn)
        order = packed.permutation.long()
        codes = numerics.pack_codes(torch.empty_like(columns).index_copy_(1, order, columns), weight.bits)
        if weight.groups(inn) > 1 and weight.group_size:
            groups = torch.arange(inn, dtype=torch.int32, device=codes.device) // weight.group_size
            tensors["weight_g_idx"] = torch.empty_like(groups).index_copy_(0, order, groups)
    if weight.number in ("fp8", "mxfp8"):
        tensors["weight"] = codes.view(torch.float8_e4m3fn)
    elif weight.number != "int":
        tensors["weight_packed"] = codes
    elif packed.scheme.activation:
        tensors["weight"] = signed(numerics.unpack_codes(codes, weight.bits, inn), weight.bits)
        if packed.zeros is not None:
            tensors["weight_zero_point"] = signed(packed.zeros, weight.bits)
    else:
        tensors["weight_packed"] = to_words(codes)
        tensors["weight_shape"] = torch.tensor([out, inn], dtype=torch.int64)
        if packed.zeros is not None:
            zeros = numerics.pack_codes(packed.zeros.t().contiguous(), weight.bits)
            tensors["weight_zero_point"] = to_words(zeros).t().contiguous()
    scales = packed.scales.view(torch.uint8) if weight.number in _POWERS else packed.scales
    tensors["weight_scale"] = scales.reshape(1) if weight.per_tensor else scales
    if packed.outer is not None:
        tensors["weight_global_scale"] = packed.outer
    if packed.input_scale is not None:
        wide = weight.number == "nvfp4" or not _holds(packed.scales.dtype, packed.input_scale)
        tensors["input_global_scale" if weight.number == "nvfp4" else "input_scale"] = (
            packed.input_scale if wide else packed.input_scale.to(packed.scales.dtype)
        )
    if packed.input_zero is not None:
        tensors["input_zero_point"] = packed.input_zero.to(torch.int8)
    if packed.alpha is not None:
        tensors["alpha"] = packed.alpha
    return tensors


def signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes, one per byte, as signed int8 numbers."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    return torch.equal(values.to(dtype).to(values.dtype), values)
