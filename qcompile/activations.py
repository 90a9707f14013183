"""What quantized activations are: codes, scales and zero points of the input of a matrix product.

``numerics`` offers these functions, too; passes, kernels and ops call them by that name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .groups import join_groups, split_groups
from .small_floats import E4M3_MAX, mx_scales, nvfp4_scales, round_e2m1, round_e4m3
from .types import ActivationType


def quantize_activation(
    x: Tensor,
    activation: ActivationType,
    params: Sequence[Tensor] = (),
    across: Callable[[Tensor], Tensor] = lambda largest: largest,
) -> list[Tensor]:
    """Quantize float activations x [..., n]: ``[codes, scale]``, ``[codes, scale, zero]``, or (static) ``[codes]``.

    Everything is computed in float32, with ``x ≈ (code - zero) * scale``; round is half to even, after a true division.

    Integers. Codes are int8, also of 4 bits; ``top`` is 2 ** (bits - 1) - 1.

    dynamic, symmetric   scale = max|row| / top, float32 [..., 1]; code = round(x / scale) in -top .. top. (Ascend's
                         npu_dynamic_quant)
    dynamic, asymmetric  of the row's range, extended to include 0: scale = (max - min) / (2 top + 1); zero = round(-top
                         - 1 - min / scale), int32 [..., 1]; code = round(x / scale) + zero in -top - 1 .. top
    clip                 params: [alpha]; m = alpha * max|row|; x is clamped to -m .. m and scale = m / top (Ascend's
                         npu_swiglu_clip_quant, the learned clip of w4a8 experts)
    static               params: [scale] or [scale, zero]; code = round(x / scale) + zero, in -top - 1 .. top (ONNX
                         QuantizeLinear)

    Small floats, rounded by ``small_floats``. A group is ``group_size`` columns of a row; the last one may be short.

    fp8 dynamic          scale = max|row or group| / 448, float32 [..., groups]; code = round(x / scale), float8_e4m3fn
    fp8 static           params: [scale]; code = round(x / scale)
    nvfp4                params: [outer]; scale = round_e4m3(max|group| / 6 * outer) / outer, float32; code = round(x /
                         scale), the e2m1 number itself in float32
    mxfp4, mxfp8         scale = 2 ** (floor(log2(max|group|)) - 2, or - 8), float32; code = round(x / scale), the e2m1
                         number in float32, or float8_e4m3fn

    Zeros: 0 is always exact. A row (fp8: or group) of zeros has scale 0, and codes that are 0 or equal to its zero
    point. Infinity and NaN: a dynamic row or group that holds one gets a scale that is infinite or NaN, so what is
    computed from it is not finite; with nvfp4 and with static scales infinities saturate, and the integer code of a NaN
    is not defined.

    Params broadcast against [..., 1]: one for all rows, or one per row (that of its expert). across: where x holds
    a part of the columns, the largest of a value [..., 1] over all parts; then dynamic scales are those of whole rows.
    """
    values = x.float()
    if activation.number != "int":
        return _small_floats(values, activation, params, across)
    top = 2 ** (activation.bits - 1) - 1
    if not activation.dynamic:
        scale, *zero = params
        codes = torch.round(values / scale) + (zero[0] if zero else 0)
        return [codes.clamp(-top - 1, top).to(torch.int8)]
    if not activation.symmetric:
        low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
        low, high = -across(-low), across(high)
        scale = (high - low) / (2 * top + 1)
        divisor = _nonzero(scale)
        shift = torch.round(-top - 1 - low / divisor).clamp(-top - 1, top)
        codes = (torch.round(values / divisor) + shift).clamp(-top - 1, top)
        return [codes.to(torch.int8), scale, shift.to(torch.int32)]
    largest = across(values.abs().amax(-1, keepdim=True))
    if activation.clip:
        largest = largest * params[0]
    scale = largest / top
    return [torch.round(values / _nonzero(scale)).clamp(-top, top).to(torch.int8), scale]


def _small_floats(
    values: Tensor, activation: ActivationType, params: Sequence[Tensor], across: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    if not activation.dynamic:
        return [round_e4m3(values / params[0])]
    columns, number = values.shape[-1], activation.number
    size = activation.group_size or columns
    groups = split_groups(values, size)
    largest = groups.abs().amax(-1)
    if activation.group_size is None:
        largest = across(largest)
    if number == "fp8":
        scale = largest / E4M3_MAX
    elif number == "nvfp4":
        scale = nvfp4_scales(largest, params[0]).float() / params[0]
    else:
        scale = mx_scales(largest, number)
    shares = groups / _nonzero(scale)[..., None]
    codes = round_e2m1(shares) if activation.bits == 4 else round_e4m3(shares)
    return [join_groups(codes, columns), scale]


def _nonzero(scale: Tensor) -> Tensor:
    """What to divide by: one where the scale is zero, because all that it scales is."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def dequantize_activation(quantized: Sequence[Tensor], activation: ActivationType) -> Tensor:
    """What ``[codes, scale]`` or ``[codes, scale, zero]`` stand for, exactly in float64: [..., n].

    Static parts hold the stored scale and zero point again.
    """
    codes, scale, *zero = quantized
    values = codes.double()
    if zero:
        values = values - zero[0].double()
    scale = scale.double()
    if activation.group_size is None:
        return values * scale
    return join_groups(split_groups(values, activation.group_size) * scale[..., None], codes.shape[-1])
