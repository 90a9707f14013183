"""Rounding, scales and packing: all bit twiddling of qcompile, in plain torch.

Conventions, used everywhere: integer weights are ``W = (q - z) * s`` with unsigned codes ``q``, integer activations
``x = (q - z) * s`` with signed ones, small floats ``q * s``; rounding is half to even; the product of code and scale
that makes a float weight is computed in the scale's dtype with one rounding. Activations are defined in
``activations``, the floats of 4 and 8 bits in ``small_floats``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from . import small_floats
from .activations import dequantize_activation, quantize_activation
from .errors import UnsupportedError
from .groups import join_groups, split_groups
from .types import PackedWeight, Scheme, WeightType

__all__ = [
    "CHUNK", "code_values", "dequantize", "dequantize_activation", "dequantize_packed", "is_finite", "minmax_scales",
    "pack_codes", "quantize_activation", "quantize_weight", "representable", "signal_to_noise", "signed_codes",
    "unpack_codes",
]  # fmt: skip

CHUNK = 1 << 20  # elements of a weight that are worked on at once: bounds the float32 temporaries to some 25 MB
_PERCENT = range(100, 69, -1)  # of a scale, tried by observer "mse"


# ---------------------------------------------------------------------------------------------------- bit streams


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes into a little-endian bit stream along the last dimension.

    codes: uint8 [..., n] with values below ``2 ** bits``. Returns uint8 [..., ceil(n * bits / 8)]; code i occupies the
    bits [bits * i, bits * (i + 1)) of the stream. Read as int32 words this is the layout of compressed-tensors
    ``pack-quantized`` and of GPTQ (there along another axis).
    """
    if bits == 8:
        return codes.clone()
    n = codes.shape[-1]
    per_byte = 8 // bits if 8 % bits == 0 else 0
    if per_byte:
        codes = F.pad(codes, (0, -n % per_byte))
        parts = codes.unflatten(-1, (-1, per_byte))
        packed = parts[..., 0].clone()
        for i in range(1, per_byte):
            packed |= parts[..., i] << (bits * i)
        return packed
    shifts = torch.arange(bits, device=codes.device, dtype=torch.uint8)
    stream = ((_repeated(codes, bits) >> shifts) & 1).flatten(-2)
    stream = F.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of ``pack_codes``: uint8 [..., ceil(n * bits / 8)] to uint8 [..., n]."""
    if bits == 8:
        return packed[..., :n]
    if 8 % bits == 0:
        mask = (1 << bits) - 1
        parts = [(packed >> (bits * i)) & mask for i in range(8 // bits)]
        return torch.stack(parts, -1).flatten(-2)[..., :n]
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    stream = ((_repeated(packed, 8) >> shifts) & 1).flatten(-2)[..., : n * bits].unflatten(-1, (n, bits))
    weights = (1 << torch.arange(bits, device=packed.device)).to(torch.uint8)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def _repeated(values: Tensor, times: int) -> Tensor:
    """Each value so many times: [..., times], without a copy. Shifts of torch_npu do not broadcast their left side."""
    return values[..., None].expand(*values.shape, times)


# --------------------------------------------------------------------------------------------------------- weights


def quantize_weight(
    weight: Tensor,
    scheme: Scheme,
    *,
    scale_dtype: torch.dtype | None = None,
    observer: str = "minmax",
    codes: str = "full",
) -> PackedWeight:
    """Round a float weight [out, in], or [experts, out, in], to the nearest codes of ``scheme``.

    Of each group of weights that share a scale, with ``top`` = 2 ** (bits - 1) - 1:

    integers, symmetric   the element of largest magnitude becomes -top - 1, so the sign of the scale is its opposite
                          (AutoRound's rule; a quarter less squared error on Gaussian groups than max / (top + 0.5)).
                          codes="narrow": scale = max|w| / top, and -top - 1 does not occur
    integers, asymmetric  scale = (max - min) / (2 ** bits - 1) of the range extended to include 0; zero point =
                          round(-min / scale), under the scale as it is stored
    fp8                   scale = max|w| / 448
    nvfp4                 outer = 448 * 6 / max|whole weight|; scale = round_e4m3(max|w| / 6 * outer)
    mxfp4, mxfp8          scale = 2 ** (floor(log2(max|w|)) - 2, or - 8)

    Codes are w / scale, rounded half to even under the scale as it is stored; e4m3 and e2m1 saturate. No scale is zero,
    also where all weights are.

    scale_dtype: dtype in which scales are stored (default: the weight's; nvfp4 and the mx formats have their own).
    observer: "minmax" takes the range of each group, "mse" searches scales from 100 % down to 70 % of that (mx formats:
    twice and half of it) for the least squared error. The weight must be finite; asymmetric codes can stand for up to
    half a step more than its largest element, which float16 scales cannot express above some 30 000. Rows are worked
    on in chunks, so temporaries stay small. UnsupportedError for an observer or for codes that ``scheme`` cannot have.
    """
    weight_type = scheme.weight
    if observer not in ("minmax", "mse") or codes not in ("full", "narrow"):
        raise UnsupportedError(f"there is no observer {observer!r} with codes {codes!r}")
    if codes == "narrow" and not (weight_type.number == "int" and weight_type.symmetric):
        raise UnsupportedError(f"narrow codes are those of symmetric integers; {scheme} has none")
    if observer == "mse" and weight_type.per_tensor:
        raise UnsupportedError("observer 'mse' searches the scales of groups, not one for a whole tensor")
    dtype, searched = small_floats.SCALE_DTYPES.get(weight_type.number, scale_dtype or weight.dtype), observer == "mse"
    tensors: dict[str, Tensor] = {}
    for expert, matrix in enumerate(weight if weight.dim() == 3 else weight[None]):
        own = _quantize_matrix(matrix, weight_type, dtype, searched, codes == "narrow")
        if weight.dim() == 2:
            tensors = own
            break
        for name, tensor in own.items():
            tensors.setdefault(name, tensor.new_empty((weight.shape[0], *tensor.shape)))[expert] = tensor
    return PackedWeight(scheme, tuple(weight.shape), **tensors)


def _quantize_matrix(
    weight: Tensor, weight_type: WeightType, dtype: torch.dtype, searched: bool, narrow: bool
) -> dict[str, Tensor]:
    """The tensors of a PackedWeight [out, in]."""
    tensors: dict[str, Tensor] = {}
    whole = torch.zeros(1, device=weight.device)
    if weight_type.per_tensor or weight_type.number == "nvfp4":
        whole = torch.stack(torch.aminmax(weight)).float().abs().amax().reshape(1)
    if weight_type.number == "nvfp4":
        tensors["outer"] = small_floats.nvfp4_outer(whole)
    codes, scales, zeros = [], [], []
    for rows in _row_chunks(weight, weight_type):
        groups = _groups(rows, weight_type)
        if weight_type.number == "int":
            q, s, z = _round_integers(groups, weight_type, dtype, searched, narrow)
            zeros.append(z.to(torch.uint8))
        else:
            q, s = _round_floats(groups, weight_type, dtype, searched, whole)
        codes.append(pack_codes(_ungroup(q, weight_type, *rows.shape), weight_type.bits))
        scales.append(s.to(dtype))
    tensors["codes"] = torch.cat(codes)
    tensors["scales"] = scales[0][:1] if weight_type.per_tensor else torch.cat(scales)
    if not weight_type.symmetric:
        tensors["zeros"] = torch.cat(zeros)
    return tensors


def _row_chunks(weight: Tensor, weight_type: WeightType) -> Iterator[Tensor]:
    """Some rows of a weight [out, in] at a time; never a part of a block."""
    height = weight_type.block[0] if weight_type.block else 1
    rows = max(1, CHUNK // max(1, weight.shape[1]) // height) * height
    yield from weight.split(rows) if weight.shape[0] else [weight]


def _groups(weight: Tensor, weight_type: WeightType) -> Tensor:
    """Float weights [out, in] as float32 [scale rows, groups, weights of one]; short groups are padded with zeros."""
    height, width = _group_shape(weight_type, weight.shape[1])
    columns = split_groups(weight.float(), width)
    if len(weight) % height:
        columns = F.pad(columns, (0, 0, 0, 0, 0, -len(weight) % height))
    return columns.unflatten(0, (-(-len(weight) // height), height)).transpose(1, 2).flatten(2)


def _ungroup(codes: Tensor, weight_type: WeightType, out: int, inn: int) -> Tensor:
    """Inverse of ``_groups``: [out, in]."""
    return codes.unflatten(2, _group_shape(weight_type, inn)).transpose(1, 2).flatten(2).flatten(0, 1)[:out, :inn]


def _group_shape(weight_type: WeightType, in_features: int) -> tuple[int, int]:
    return weight_type.block or (1, weight_type.group_size or in_features)


def _round_integers(
    groups: Tensor, weight_type: WeightType, dtype: torch.dtype, searched: bool, narrow: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [R, G, n] of ``groups``; scales, as ``dtype`` has them, and zero points, float32 [R, G]."""
    scales, zeros = minmax_scales(groups, weight_type, dtype, narrow)
    lowest, highest = int(narrow), 2**weight_type.bits - 1

    def encode(scales: Tensor) -> Tensor:
        return torch.round(groups / scales[..., None]).add_(zeros[..., None]).clamp_(lowest, highest)

    def restore(scales: Tensor) -> Tensor:
        return (encode(scales) - zeros[..., None]) * scales[..., None]

    if searched:
        signs = (1.0, -1.0) if weight_type.symmetric and not narrow else (1.0,)
        shares = [sign * percent / 100 for sign in signs for percent in _PERCENT]
        scales = _least_error(groups, (representable(scales * share, dtype) for share in shares), restore)
    return encode(scales).to(torch.uint8), scales, zeros


def minmax_scales(
    groups: Tensor, weight_type: WeightType, dtype: torch.dtype, narrow: bool = False
) -> tuple[Tensor, Tensor]:
    """Scales, representable in ``dtype``, and zero points of each group of integers, float32 [R, G]: the range of
    ``groups`` float32 [R, G, n], by the rules of ``quantize_weight``.
    """
    bits, half = weight_type.bits, 2 ** (weight_type.bits - 1)
    low, high = groups.amin(-1), groups.amax(-1)
    if weight_type.symmetric:
        extreme = torch.where(high > -low, high, low)
        scales = extreme.abs() / (half - 1) if narrow else extreme / -half
        return representable(torch.where(extreme == 0, 1.0, scales), dtype), torch.full_like(scales, half)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = (high - low) / (2**bits - 1)
    scales = representable(torch.where(scales == 0, 1.0, scales), dtype)
    return scales, torch.round(-low / scales).clamp_(0, 2**bits - 1)


def _round_floats(
    groups: Tensor, weight_type: WeightType, dtype: torch.dtype, searched: bool, whole: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [R, G, n] of ``groups`` and their scales, float32 [R, G], as ``dtype`` has them.

    whole: [1], the largest magnitude of the weight where it matters (nvfp4, and one scale per tensor).
    """
    number = weight_type.number
    outer = small_floats.nvfp4_outer(whole) if number == "nvfp4" else torch.ones(1, device=groups.device)
    extreme = whole.expand(len(groups), 1) if weight_type.per_tensor else groups.abs().amax(-1)

    def scales_for(extreme: Tensor) -> Tensor:
        if number == "nvfp4":
            return small_floats.nvfp4_scales(extreme, outer).float()
        if number != "fp8":
            return small_floats.mx_scales(extreme, number)
        # half a step of subnormal float16 more: a scale that is rounded down much would saturate the extreme
        scales = extreme / small_floats.E4M3_MAX + (2.0**-25 if dtype == torch.float16 else 0)
        return representable(torch.where(extreme == 0, 1.0, scales), dtype)

    def encode(scales: Tensor) -> Tensor:
        shares = groups / (scales / outer)[..., None]
        return small_floats.round_e2m1(shares) if weight_type.bits == 4 else small_floats.round_e4m3(shares)

    def restore(scales: Tensor) -> Tensor:
        return encode(scales).float() * (scales / outer)[..., None]

    scales = scales_for(extreme)
    if searched:
        shares = (1.0, 2.0, 0.5) if number.startswith("mx") else [percent / 100 for percent in _PERCENT]
        scales = _least_error(groups, (scales_for(extreme * share) for share in shares), restore)
    codes = encode(scales)
    return small_floats.e2m1_codes(codes) if weight_type.bits == 4 else codes.view(torch.uint8), scales


def _least_error(groups: Tensor, candidates: Iterable[Tensor], restore: Callable[[Tensor], Tensor]) -> Tensor:
    """For each group the first of its candidate scales [R, G] under which it loses least."""

    def lost(scales: Tensor) -> Tensor:
        return (restore(scales) - groups).square_().sum(-1)

    tried = iter(candidates)
    chosen = next(tried)
    least = lost(chosen)
    for scales in tried:
        error = lost(scales)
        chosen = torch.where(error < least, scales, chosen)
        least = torch.fmin(error, least)
    return chosen


def representable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 scales to what ``dtype`` stores, without underflow to zero or overflow to infinity.

    Subnormal numbers count in float16, where int8 weights below 0.008 need them; in the other types they are out of
    reach of any weight, and hardware may flush them to zero.
    """
    info = torch.finfo(dtype)
    smallest = 2.0**-24 if dtype == torch.float16 else info.smallest_normal
    magnitude = scales.abs().clamp(min=smallest, max=info.max).to(dtype).float()
    return torch.copysign(magnitude, scales)


def code_values(codes: Tensor, weight_type: WeightType, in_features: int) -> Tensor:
    """The numbers that canonical codes [..., bytes] stand for before zero points and scales: [..., in].

    Integers as int16 (0 .. 2 ** bits - 1), small floats (OCP: e4m3, e2m1 with the sign in bit 3) as float32.
    """
    unpacked = unpack_codes(codes, weight_type.bits, in_features)
    if weight_type.number == "int":
        return unpacked.to(torch.int16)
    return (
        unpacked.contiguous().view(torch.float8_e4m3fn).float()
        if weight_type.bits == 8
        else small_floats.e2m1_values(unpacked)
    )


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    permutation: Tensor | None,
    scheme: Scheme,
    in_features: int,
    outer: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight [..., out, in] that canonical tensors stand for, in ``dtype`` (default: that of the scales).

    ``q - z`` is an exact small number; it is multiplied by the scale with one rounding. Scales in 8 bits (nvfp4, mx
    formats; e8m0 also as uint8) are widened to float32, the default dtype then, and divided by ``outer`` if there is
    one, in float32.
    """
    weight_type, out = scheme.weight, codes.shape[-2]
    scales = _widened(scales)
    if outer is not None:
        scales = scales / outer[..., None]
    if dtype is not None:
        scales = scales.to(dtype)
    scales = scales[..., None]  # [..., rows, groups, 1]
    if weight_type.block:
        scales = scales.repeat_interleave(weight_type.block[0], dim=-3)[..., :out, :, :]
    q = split_groups(code_values(codes, weight_type, in_features), _group_shape(weight_type, in_features)[1])
    if weight_type.number == "int":
        q = q - (2 ** (weight_type.bits - 1) if zeros is None else zeros[..., None].to(torch.int16))
    weight = join_groups(q.to(scales.dtype) * scales, in_features)
    if permutation is None:
        return weight
    columns = permutation.long()[..., None, :].expand_as(weight)
    return torch.empty_like(weight).scatter_(-1, columns, weight)


def _widened(scales: Tensor) -> Tensor:
    """Scales in 8 bits as float32, others as they are."""
    if scales.dtype in (torch.float8_e8m0fnu, torch.uint8):
        return small_floats.e8m0_values(scales.view(torch.uint8))
    return scales.float() if scales.dtype.itemsize == 1 else scales


def dequantize_packed(packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The float weight [..., out, in] of a PackedWeight, in ``dtype`` (default: that of its scales)."""
    tensors = packed.codes, packed.scales, packed.zeros, packed.permutation
    weight = dequantize(*tensors, packed.scheme, packed.shape[-1], packed.outer)
    return weight if dtype is None else weight.to(dtype)


def is_finite(weight: Tensor) -> bool:
    """Whether no element is NaN or infinite; needs no temporary of the weight's size."""
    return not weight.numel() or all(torch.isfinite(extreme) for extreme in torch.aminmax(weight.detach()))


def signal_to_noise(weight: Tensor, packed: PackedWeight) -> float:
    """``10 log10(|W|² / |W - W'|²)`` in dB: how much of the weight survived; ``inf`` when nothing was lost."""
    signal = noise = 0.0
    experts = packed.shape[0] if len(packed.shape) == 3 else 0
    for index in range(max(1, experts)):
        exact, part = (weight[index], packed.expert(index)) if experts else (weight, packed)
        for rows, restored in _restored_rows(part):
            wanted = exact[rows].float()
            signal += wanted.square().sum().item()
            noise += (wanted - restored.float()).square_().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _restored_rows(packed: PackedWeight) -> Iterator[tuple[slice, Tensor]]:
    """The dequantized weight, some rows at a time."""
    weight_type = packed.scheme.weight
    out, inn = packed.shape
    height = weight_type.block[0] if weight_type.block else 1
    step = max(height, CHUNK // max(1, inn) // height * height)
    for start in range(0, out, step):
        rows = slice(start, start + step)
        above = slice(None) if weight_type.per_tensor else slice(start // height, -(-(start + step) // height))
        zeros = None if packed.zeros is None else packed.zeros[above]
        scales, codes = packed.scales[above], packed.codes[rows]
        yield rows, dequantize(codes, scales, zeros, packed.permutation, packed.scheme, inn, packed.outer)


def signed_codes(codes: Tensor) -> Tensor:
    """Canonical 8-bit codes (unsigned, zero point 128) as the signed int8 numbers that integer kernels multiply."""
    return (codes ^ 0x80).view(torch.int8)


def pack_int4(values: Tensor) -> Tensor:
    """int8 [..., 8 n], numbers of -8 to 7, as int32 [..., n]: number i of each eight in the bits 4 i to 4 i + 3."""
    low, high = values[..., 0::2] & 15, values[..., 1::2] << 4
    return (low | high).contiguous().view(torch.int32)


def unpack_int4(words: Tensor) -> Tensor:
    """Inverse of ``pack_int4``: int32 [..., n] to int8 [..., 8 n]."""
    pairs = words.contiguous().view(torch.int8)
    return torch.stack([(pairs << 4) >> 4, pairs >> 4], -1).flatten(-2)
