"""Rounding to floats of 4 and 8 bits, and the scales that go with them, in plain traceable torch.

e4m3   1 sign, 4 exponent, 3 mantissa bits, largest number 448, no infinities (``torch.float8_e4m3fn``)
e2m1   1, 2, 1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, with the sign in bit 3; no infinities and no NaN
e8m0   scales of the MX formats: code e is 2 ** (e - 127), code 255 is NaN (``torch.float8_e8m0fnu``)

Sources: OCP 8-bit Floating Point Specification 1.0 (e4m3); OCP Microscaling Formats (MX) Specification 1.0, sections
5.3 (e2m1), 5.4 (e8m0) and 6.3 (how a group is converted); ``compressed_tensors`` 0.20 (the two scales of nvfp4).
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
E4M3_SMALLEST = 2.0**-9
E2M1_MAX = 6.0

SCALE_DTYPES = {"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.float8_e8m0fnu, "mxfp8": torch.float8_e8m0fnu}
"""What the scales of a format are stored in, where it says so itself."""

_MX_EXPONENTS = {"mxfp4": 2, "mxfp8": 8}  # of the largest normal number: 6 = 1.5 * 2 ** 2, 448 = 1.75 * 2 ** 8


def round_e4m3(values: Tensor) -> Tensor:
    """float32 -> float8_e4m3fn: to the nearest, half to even, saturating at -448 and 448; NaN stays NaN."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def round_e2m1(values: Tensor) -> Tensor:
    """float32 -> the nearest e2m1 number as float32: half to even, saturating at -6 and 6; NaN stays NaN."""
    magnitude = values.abs().clamp(max=E2M1_MAX)
    half, one, two = (torch.full_like(magnitude, step) for step in (0.5, 1.0, 2.0))
    step = torch.where(magnitude < 2, half, torch.where(magnitude < 4, one, two))
    return torch.copysign(torch.round(magnitude / step) * step, values)


def e2m1_codes(values: Tensor) -> Tensor:
    """Codes uint8 (0 .. 15) of numbers that ``round_e2m1`` returned."""
    magnitude = values.abs()
    codes = torch.where(magnitude < 2, magnitude * 2, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4))
    return codes.to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)


def e2m1_values(codes: Tensor) -> Tensor:
    """The float32 numbers of codes uint8 (0 .. 15); inverse of ``e2m1_codes``."""
    code = (codes & 7).float()
    magnitude = torch.where(code < 4, code / 2, torch.where(code < 6, code - 2, code * 2 - 8))
    return torch.where(codes >= 8, -magnitude, magnitude)


def mx_scales(largest: Tensor, number: str) -> Tensor:
    """Scales of groups whose largest magnitudes are ``largest``, for "mxfp4" or "mxfp8": float32, exact in e8m0.

    2 ** (floor(log2(largest)) - exponent of the format's largest number), at least 2 ** -127; NaN for a group that is
    not finite (MX 1.0, section 6.3). The largest element then lies between 4 and 8 (mxfp4), or 256 and 512 (mxfp8), and
    saturates where that is above the largest number.
    """
    exponents = largest.view(torch.int32) >> 23  # biased by 127 as in e8m0; 0 for subnormals, 255 if not finite
    codes = (exponents - _MX_EXPONENTS[number]).clamp(min=0)
    return e8m0_values(torch.where(exponents == 255, exponents, codes))


def e8m0_values(codes: Tensor) -> Tensor:
    """The float32 numbers of codes (0 .. 255, integers). By their bits, because Inductor does not know e8m0."""
    codes = codes.to(torch.int32)
    bits = torch.where(codes == 0, 1 << 22, codes << 23)  # 2 ** -127 is subnormal
    return torch.where(codes == 255, 0x7FC00000, bits).to(torch.int32).view(torch.float32)


def nvfp4_outer(largest: Tensor) -> Tensor:
    """The number by which an nvfp4 tensor divides its scales, so that they use the range of e4m3: 448 * 6 / largest."""
    outer = (E4M3_MAX * E2M1_MAX / largest).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(largest == 0, torch.ones_like(outer), outer)


def nvfp4_scales(largest: Tensor, outer: Tensor) -> Tensor:
    """Scales of nvfp4 groups, before ``outer`` divides them: round_e4m3(largest / 6 * outer), at least 2 ** -9.

    Without that limit a group a million times smaller than the tensor's largest number would become zero.
    """
    return round_e4m3((largest / E2M1_MAX * outer).clamp(min=E4M3_SMALLEST))
