"""Rounding, scales and packing: all bit twiddling of qcompile, in plain torch.

Conventions, used everywhere: weights are ``W = (q - z) * s`` with unsigned codes ``q``; rounding is half to even
(torch.round); a product of code and scale is computed in the scale's dtype with one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .types import PackedWeight, Scheme, WeightType

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
    """Round a float weight [out, in] to the nearest codes of ``scheme``.

    scale_dtype: dtype in which scales are stored (default: the weight's). observer: "minmax" takes the range of each
    group, "mse" searches the shrunk range of least squared error. The weight must be finite; asymmetric codes can stand
    for up to half a step more than its largest element, which float16 scales cannot express above some 30 000. Rows are
    worked on in chunks, so temporaries stay small.
    """
    weight_type, scale_dtype = scheme.weight, scale_dtype or weight.dtype
    out, inn = weight.shape
    codes, scales, zeros = [], [], []
    for rows in _row_chunks(weight):
        groups = _groups(rows, weight_type.group_size)
        s, z = _minmax_scales(groups, weight_type, scale_dtype)
        if observer == "mse":
            s, z = _search_scales(groups, s, z, weight_type, scale_dtype)
        q = _encode(groups, s, z, weight_type.bits).to(torch.uint8).flatten(1)[:, :inn]
        codes.append(pack_codes(q, weight_type.bits))
        scales.append(s.to(scale_dtype))
        zeros.append(z.to(torch.uint8))
    return PackedWeight(
        scheme,
        (out, inn),
        torch.cat(codes),
        torch.cat(scales),
        None if weight_type.symmetric else torch.cat(zeros),
    )


def _row_chunks(weight: Tensor) -> Iterator[Tensor]:
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    yield from weight.split(rows) if weight.shape[0] else [weight]


def expand_groups(values: Tensor, weight_type: WeightType, in_features: int) -> Tensor:
    """Repeat values [out, G] of each group for its columns: [out, in]; a per-channel [out, 1] is left to broadcast."""
    if weight_type.group_size is None:
        return values
    return values.repeat_interleave(weight_type.group_size, dim=1)[:, :in_features]


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    permutation: Tensor | None,
    scheme: Scheme,
    in_features: int,
) -> Tensor:
    """The weight [out, in] that canonical tensors stand for, in the dtype of the scales.

    ``q - z`` is an exact small integer; it is multiplied by the scale with one rounding.
    """
    weight_type = scheme.weight
    q = unpack_codes(codes, weight_type.bits, in_features).to(torch.int16)
    if zeros is None:
        q = q - 2 ** (weight_type.bits - 1)
    else:
        q = q - expand_groups(zeros.to(torch.int16), weight_type, in_features)
    weight = q.to(scales.dtype) * expand_groups(scales, weight_type, in_features)
    if permutation is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, permutation.long(), weight)


def dequantize_packed(packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The float weight [out, in] of a PackedWeight, in ``dtype`` (default: that of its scales)."""
    weight = dequantize(packed.codes, packed.scales, packed.zeros, packed.permutation, packed.scheme, packed.shape[1])
    return weight if dtype is None else weight.to(dtype)


def is_finite(weight: Tensor) -> bool:
    """Whether no element is NaN or infinite; needs no temporary of the weight's size."""
    return not weight.numel() or all(torch.isfinite(extreme) for extreme in torch.aminmax(weight.detach()))


def signal_to_noise(weight: Tensor, packed: PackedWeight) -> float:
    """``10 log10(|W|² / |W - W'|²)`` in dB: how much of the weight survived; ``inf`` when nothing was lost."""
    signal = noise = 0.0
    step = max(1, CHUNK // max(1, packed.shape[1]))
    for start in range(0, packed.shape[0], step):
        rows = slice(start, start + step)
        zeros = None if packed.zeros is None else packed.zeros[rows]
        restored = dequantize(
            packed.codes[rows], packed.scales[rows], zeros, packed.permutation, packed.scheme, packed.shape[1]
        )
        exact = weight[rows].float()
        signal += exact.square().sum().item()
        noise += (exact - restored.float()).square_().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


# ---------------------------------------------------------------------------------------------------- activations


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row of ``x`` to int8: ``scale = max|x| / 127``, ``code = round(x / scale)`` in -127..127.

    x: float [..., n], computed in float32. Returns codes int8 [..., n] and scale float32 [..., 1]. A row of zeros has
    scale 0 and codes 0. This is the range and rounding of Ascend's npu_dynamic_quant.
    """
    values = x.float()
    scale = values.abs().amax(-1, keepdim=True) / 127
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(values / safe).clamp(-127, 127).to(torch.int8), scale


def signed_codes(codes: Tensor) -> Tensor:
    """Canonical 8-bit codes (unsigned, zero point 128) as the signed int8 numbers that integer kernels multiply."""
    return (codes ^ 0x80).view(torch.int8)
