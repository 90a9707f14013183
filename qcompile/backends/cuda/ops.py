"""The ops ``qcompile_cuda::``, which launch the Triton kernels: what a lowered graph holds.

They are opaque to Inductor: which tiles are right depends on the number of rows, which a dynamic graph does not know.
On a CPU they compute the same from the same tensors, so that a model that no longer fits a GPU can still be used.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import layouts

LIBRARY = torch.library.Library("qcompile_cuda", "DEF")


def define(schema: str, on_gpu, on_cpu, fake) -> None:
    """Register one op."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, on_gpu, "CUDA")
    LIBRARY.impl(name, lambda *args: (on_gpu if os.environ.get("TRITON_INTERPRET") else on_cpu)(*args), "CPU")
    torch.library.register_fake(f"qcompile_cuda::{name}", fake, lib=LIBRARY)


def _float_linear(x, codes, pairs, bias, ends, bits, wgmma, group, centered, out, splits):
    from .device import launch

    return launch.float_linear(x, codes, pairs, bias, ends, bits, wgmma, group, centered, out, splits)


def _float_linear_cpu(x, codes, pairs, bias, ends, bits, wgmma, group, centered, out, splits):
    weight = dequantized(codes, pairs, bits, wgmma, group).to(x.dtype)[..., :out, : x.shape[1]]
    result = _each_expert(x, ends, weight)
    if splits:  # the whole sum is the first of the partial ones
        return torch.cat([result.float()[None], result.new_zeros((splits - 1, *result.shape), dtype=torch.float32)])
    return result if bias is None else result + bias


def dequantized(codes: Tensor, pairs: Tensor, bits: int, wgmma: bool, group: int) -> Tensor:
    """The float32 weight [..., rows, columns] that prepared tensors stand for, padding included."""
    order: layouts.Fragments = "wgmma" if wgmma else "mma"
    stored = layouts.from_fragments(codes.flatten(0, -2), bits, order)
    q = (stored ^ 0x80 if bits == 8 else stored).view(*codes.shape[:-2], -1, stored.shape[-1]).float()
    scales, zeros = layouts.from_scale_pairs(pairs, layouts.offset_of(bits, pairs.dtype))
    scales, zeros = (t.repeat_interleave(group or q.shape[-1], -1) for t in (scales.float(), zeros.float()))
    return (q - zeros) * scales


def _each_expert(x: Tensor, ends: Tensor | None, weight: Tensor) -> Tensor:
    """Rows times the weight, or rows sorted by expert times the weight of each."""
    if ends is None:
        return x @ weight.mT
    result, start = x.new_empty((x.shape[0], weight.shape[-2])), 0
    for expert, end in enumerate(ends.tolist()):
        torch.mm(x[start:end], weight[expert].mT, out=result[start:end])
        start = end
    return result


def _fake_float_linear(x, codes, pairs, bias, ends, bits, wgmma, group, centered, out, splits):
    if splits:
        return x.new_empty((splits, x.shape[0], out), dtype=torch.float32)
    return x.new_empty((x.shape[0], out))


def _scaled_linear(*arguments):
    from .device import launch

    return launch.scaled_linear(*arguments)


def _scaled_linear_cpu(x, x_scale, codes, scales, bias, ends, kind, group, scale_rows, x_grouped, out, splits, dtype):
    weight = scaled_weight(codes, scales, kind, group, scale_rows, out)[..., : x.shape[1]]
    inputs = x.double()
    if x_grouped and x_scale is not None:
        inputs = inputs * x_scale.double().repeat_interleave(group, -1)[:, : x.shape[1]]
    result = _each_expert(inputs, ends, weight)
    if splits:
        return torch.cat([result.float()[None], result.new_zeros((splits - 1, *result.shape), dtype=torch.float32)])
    if x_scale is not None and not x_grouped:
        result = result * x_scale
    return (result if bias is None else result + bias).to(dtype)


def scaled_weight(codes: Tensor, scales: Tensor, kind: str, group: int, scale_rows: int, out: int) -> Tensor:
    """The float64 weight [..., out, columns] of prepared tensors, without zero points."""
    if kind == "int4":
        stored = layouts.from_fragments(codes.flatten(0, -2), 4, "int8")
        q = ((stored ^ 8).double() - 8).view(*codes.shape[:-2], -1, stored.shape[-1])
    else:
        q = codes.double()
    if kind == "fp8":
        spread = scales.double().repeat_interleave(min(scale_rows, out), -2)
    else:
        spread = scales[..., 0].transpose(-1, -2).double()
    spread = spread.repeat_interleave(group or q.shape[-1], -1)
    return q[..., :out, :] * spread[..., :out, : q.shape[-1]]


def _fake_scaled_linear(x, x_scale, codes, scales, bias, ends, kind, group, scale_rows, x_grouped, out, splits, dtype):
    if splits:
        return x.new_empty((splits, x.shape[0], out), dtype=torch.float32)
    return x.new_empty((x.shape[0], out), dtype=dtype)


define(
    "float_linear(Tensor x, Tensor codes, Tensor pairs, Tensor? bias, Tensor? ends, int bits, bool wgmma, int group, "
    "bool centered, int out, int splits) -> Tensor",
    _float_linear,
    _float_linear_cpu,
    _fake_float_linear,
)
define(
    "scaled_linear(Tensor x, Tensor? x_scale, Tensor codes, Tensor scales, Tensor? bias, Tensor? ends, str kind, "
    "int group, int scale_rows, bool x_grouped, int out, int splits, ScalarType dtype) -> Tensor",
    _scaled_linear,
    _scaled_linear_cpu,
    _fake_scaled_linear,
)
