"""Rounding, scales and packing: all bit twiddling of qcompile, in plain torch.

Conventions, used everywhere: weights are ``W = (q - z) * s`` with unsigned codes ``q``, activations are ``x = (q - z) *
s`` with signed ones; rounding is half to even (torch.round); the product of code and scale that makes a float weight is
computed in the scale's dtype with one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .errors import UnsupportedError
from .types import ActivationType, PackedWeight, Scheme, WeightType

CHUNK = 1 << 20  # elements of a weight that are worked on at once: bounds the float32 temporaries to some 25 MB


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
        codes = torch.nn.functional.pad(codes, (0, -n % per_byte))
        parts = codes.unflatten(-1, (-1, per_byte))
        packed = parts[..., 0].clone()
        for i in range(1, per_byte):
            packed |= parts[..., i] << (bits * i)
        return packed
    shifts = torch.arange(bits, device=codes.device, dtype=torch.uint8)
    stream = ((codes[..., None] >> shifts) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
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
    stream = ((packed[..., None] >> shifts) & 1).flatten(-2)[..., : n * bits].unflatten(-1, (n, bits))
    weights = (1 << torch.arange(bits, device=packed.device)).to(torch.uint8)
    return (stream * weights).sum(-1, dtype=torch.uint8)


# --------------------------------------------------------------------------------------------------- weight scales


def _groups(weight: Tensor, group_size: int | None) -> Tensor:
    """View float weights [out, in] as float32 [out, groups, group]; a short last group is padded with zeros."""
    size = group_size or weight.shape[1]
    padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % size))
    return padded.unflatten(1, (-1, size))


def _encode(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Codes, as float32, of ``groups`` [out, G, g] under float32 scales and zeros [out, G]."""
    safe = torch.where(scales == 0, torch.ones_like(scales), scales)
    return torch.round(groups / safe[..., None]).add_(zeros[..., None]).clamp_(0, 2**bits - 1)


def _minmax_scales(groups: Tensor, weight_type: WeightType, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales, representable in ``dtype``, and zero points of each group, float32 [out, G].

    Symmetric: the element of largest magnitude maps to code 0, so the sign of the scale is its opposite (the rule of
    AutoRound; a quarter less squared error on Gaussian groups than max / 7.5, at the same cost). Asymmetric: the range
    includes zero, and the zero point is rounded to an integer under the scale as it is stored.
    """
    bits, half = weight_type.bits, 2 ** (weight_type.bits - 1)
    if weight_type.symmetric:
        high, low = groups.amax(-1), groups.amin(-1)
        extreme = torch.where(high > -low, high, low)
        scales = torch.where(extreme == 0, torch.ones_like(extreme), extreme / -half)
        return _representable(scales, dtype), torch.full_like(scales, half)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = (high - low) / (2**bits - 1)
    scales = _representable(torch.where(scales == 0, torch.ones_like(scales), scales), dtype)
    return scales, torch.round(-low / scales).clamp_(0, 2**bits - 1)


def _search_scales(
    groups: Tensor, scales: Tensor, zeros: Tensor, weight_type: WeightType, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Shrink each group's range in steps of 1 % down to 70 % and keep the least squared error (observer "mse")."""
    best = torch.full_like(scales, torch.inf)
    best_scales, best_zeros = scales.clone(), zeros.clone()
    signs = (1.0, -1.0) if weight_type.symmetric else (1.0,)
    for sign in signs:
        for percent in range(100, 69, -1):
            tried = _representable(scales * (sign * percent / 100), dtype)
            codes = _encode(groups, tried, zeros, weight_type.bits)
            error = ((codes - zeros[..., None]) * tried[..., None] - groups).square_().sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            best_scales = torch.where(better, tried, best_scales)
    return best_scales, best_zeros


def _representable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 scales to what ``dtype`` stores, without underflow to zero or overflow to infinity.

    Subnormal numbers count in float16, where int8 weights below 0.008 need them; in the other types they are out of
    reach of any weight, and hardware may flush them to zero.
    """
    info = torch.finfo(dtype)
    smallest = 2.0**-24 if dtype == torch.float16 else info.smallest_normal
    magnitude = scales.abs().clamp(min=smallest, max=info.max).to(dtype).float()
    return torch.copysign(magnitude, scales)


def quantize_weight(
    weight: Tensor, scheme: Scheme, *, scale_dtype: torch.dtype | None = None, observer: str = "minmax"
) -> PackedWeight:
    """Round a float weight [out, in], or [experts, out, in], to the nearest codes of ``scheme``.

    scale_dtype: dtype in which scales are stored (default: the weight's). observer: "minmax" takes the range of each
    group, "mse" searches the shrunk range of least squared error. The weight must be finite; asymmetric codes can stand
    for up to half a step more than its largest element, which float16 scales cannot express above some 30 000. Rows are
    worked on in chunks, so temporaries stay small.
    """
    weight_type, scale_dtype = scheme.weight, scale_dtype or weight.dtype
    if weight_type.number != "int":
        raise UnsupportedError(f"rounding to {weight_type.number} weights is not supported")
    *experts, out, inn = weight.shape
    codes, scales, zeros = [], [], []
    for rows in _row_chunks(weight.reshape(-1, inn)):
        groups = _groups(rows, weight_type.group_size)
        s, z = _minmax_scales(groups, weight_type, scale_dtype)
        if observer == "mse":
            s, z = _search_scales(groups, s, z, weight_type, scale_dtype)
        q = _encode(groups, s, z, weight_type.bits).to(torch.uint8).flatten(1)[:, :inn]
        codes.append(pack_codes(q, weight_type.bits))
        scales.append(s.to(scale_dtype))
        zeros.append(z.to(torch.uint8))

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).unflatten(0, (*experts, out)) if experts else torch.cat(parts)

    return PackedWeight(
        scheme,
        (*experts, out, inn),
        joined(codes),
        joined(scales),
        None if weight_type.symmetric else joined(zeros),
    )


def _row_chunks(weight: Tensor) -> Iterator[Tensor]:
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    yield from weight.split(rows) if weight.shape[0] else [weight]


def expand_groups(values: Tensor, weight_type: WeightType, out_features: int, in_features: int) -> Tensor:
    """Repeat values [..., rows, G] of each group for its weights: [..., out, in], or a shape that broadcasts to it."""
    if weight_type.block:
        rows, columns = weight_type.block
        values = values.repeat_interleave(rows, dim=-2)[..., :out_features, :]
        return values.repeat_interleave(columns, dim=-1)[..., :in_features]
    if weight_type.group_size is None:
        return values
    return values.repeat_interleave(weight_type.group_size, dim=-1)[..., :in_features]


def code_values(codes: Tensor, weight_type: WeightType, in_features: int) -> Tensor:
    """The numbers that canonical codes [..., bytes] stand for before zero points and scales: [..., in].

    Integers as int16 (0 .. 2 ** bits - 1), small floats (OCP: e4m3, e2m1 with the sign in bit 3) as float32.
    """
    unpacked = unpack_codes(codes, weight_type.bits, in_features)
    if weight_type.number == "int":
        return unpacked.to(torch.int16)
    if weight_type.bits == 8:
        return unpacked.contiguous().view(torch.float8_e4m3fn).float()
    magnitude = (unpacked & 7).float()
    # e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6
    exponent = torch.exp2((magnitude / 2).floor().clamp(min=1) - 1)
    value = torch.where(magnitude < 2, magnitude / 2, (1 + (magnitude % 2) / 2) * exponent)
    return torch.where(unpacked >= 8, -value, value)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    permutation: Tensor | None,
    scheme: Scheme,
    in_features: int,
    outer: Tensor | None = None,
) -> Tensor:
    """The weight [..., out, in] that canonical tensors stand for, in the dtype of the scales.

    ``q - z`` is an exact small integer; it is multiplied by the scale with one rounding. Scales in 8 bits (nvfp4, mx
    formats) are widened to float32, the result's dtype, and divided by ``outer`` first if there is one.
    """
    weight_type, out = scheme.weight, codes.shape[-2]
    if scales.dtype.itemsize == 1:
        scales = scales.float()
    if outer is not None:
        scales = scales / outer[..., None].to(scales.dtype)
    q = code_values(codes, weight_type, in_features)
    if weight_type.number == "int":
        half = 2 ** (weight_type.bits - 1)
        q = q - (half if zeros is None else expand_groups(zeros.to(torch.int16), weight_type, out, in_features))
    weight = q.to(scales.dtype) * expand_groups(scales, weight_type, out, in_features)
    if permutation is None:
        return weight
    columns = permutation.long()[..., None, :].expand_as(weight)
    return torch.empty_like(weight).scatter_(-1, columns, weight)


def dequantize_packed(packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The float weight [..., out, in] of a PackedWeight, in ``dtype`` (default: that of its scales)."""
    stored, inn = packed.tensors(), packed.shape[-1]
    weight = dequantize(
        packed.codes, packed.scales, packed.zeros, packed.permutation, packed.scheme, inn, stored.get("outer")
    )
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


# ---------------------------------------------------------------------------------------------------- activations


def quantize_activation(x: Tensor, activation: ActivationType, params: Sequence[Tensor] = ()) -> list[Tensor]:
    """Quantize float activations x [..., n]: ``[codes, scale]`` or ``[codes, scale, zero]``; static: ``[codes]``.

    Everything is computed in float32, with ``x ≈ (code - zero) * scale``. Codes are int8 (also of 4 bits), one per
    element; ``top`` is 2 ** (bits - 1) - 1.

    dynamic, symmetric   scale = max|row| / top, float32 [..., 1]; code = round(x / scale) in -top .. top. A row of
                         zeros has scale 0 and codes 0. (Range and rounding of Ascend's npu_dynamic_quant.)
    dynamic, asymmetric  of the row's range, extended to include 0: scale = (max - min) / (2 top + 1); zero = round(-top
                         - 1 - min / scale), int32 [..., 1]; code = round(x / scale) + zero in -top - 1 .. top
    clip                 params: [alpha]; m = alpha * max|row|; x is clamped to -m .. m and scale = m / top (the
                         learned clip of w4a8 experts)
    static               params: [scale] or [scale, zero]; code = round(x / scale) + zero, in -top - 1 .. top

    Params broadcast against [..., 1]: one for all rows, or one per row (that of its expert).
    """
    if activation.number != "int":
        raise UnsupportedError(f"quantizing activations to {activation.number} is not supported")
    values, top = x.float(), 2 ** (activation.bits - 1) - 1
    if not activation.dynamic:
        scale, *zero = params
        codes = torch.round(values / scale) + (zero[0] if zero else 0)
        return [codes.clamp(-top - 1, top).to(torch.int8)]
    if not activation.symmetric:
        low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / (2 * top + 1)
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        shift = torch.round(-top - 1 - low / safe).clamp(-top - 1, top)
        codes = (torch.round(values / safe) + shift).clamp(-top - 1, top)
        return [codes.to(torch.int8), scale, shift.to(torch.int32)]
    largest = values.abs().amax(-1, keepdim=True)
    if activation.clip:
        largest = largest * params[0]
    scale = largest / top
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return [torch.round(values / safe).clamp(-top, top).to(torch.int8), scale]


def dequantize_activation(quantized: Sequence[Tensor], activation: ActivationType) -> Tensor:
    """What ``[codes, scale]`` or ``[codes, scale, zero]`` stand for, exactly in float64: [..., n]."""
    codes, scale, *zero = quantized
    values = codes.double()
    if zero:
        values = values - zero[0].double()
    if activation.group_size:
        size = activation.group_size
        return values * scale.double().repeat_interleave(size, dim=-1)[..., : codes.shape[-1]]
    return values * scale.double()


def signed_codes(codes: Tensor) -> Tensor:
    """Canonical 8-bit codes (unsigned, zero point 128) as the signed int8 numbers that integer kernels multiply."""
    return (codes ^ 0x80).view(torch.int8)
