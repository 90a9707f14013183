"""Other projects' products of quantized activations: int8, fp8, and int4 weights with fp8 activations, for comparison.

Each takes a weight of our scheme and returns a function of bfloat16 x [rows, in], quantization of x included. Raises
whatever is missing. Orders of arguments are those of vLLM 0.26.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from cuda_common import Compiled
from cuda_peers import GROUP, gptq_words
from torch import Tensor

from qcompile import numerics
from qcompile.types import PackedWeight, Scheme

FP8 = torch.float8_e4m3fn


def _int8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    q, scale = numerics.quantize_activation(x, Scheme.parse("w8a8").activation, ())
    return (torch._int_mm(q, codes) * scale * scales).to(x.dtype)


def _fp8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    q, scale = numerics.quantize_activation(x, Scheme.parse("wfp8afp8").activation, ())
    return torch._scaled_mm(q, codes, scale, scales, out_dtype=x.dtype)


_INT8, _FP8 = Compiled(_int8_product), Compiled(_fp8_product)  # for the weights of all sites


def torch_int8(packed: PackedWeight) -> Callable[[Tensor], Tensor]:
    """torch's own int8 product; Inductor quantizes x and applies the scales."""
    codes, scales = numerics.signed_codes(packed.codes).t(), packed.scales.float().t().contiguous()
    return lambda x: _INT8(x, codes, scales)


def torch_fp8(packed: PackedWeight) -> Callable[[Tensor], Tensor]:
    """torch's own fp8 product with scales of rows and channels; Inductor quantizes x."""
    codes, scales = packed.codes.view(FP8).t(), packed.scales.float().t().contiguous()
    return lambda x: _FP8(x, codes, scales)


def vllm_int8(packed: PackedWeight) -> Callable[[Tensor], Tensor]:
    """vLLM's CUTLASS product of int8."""
    codes, scales = numerics.signed_codes(packed.codes).t(), packed.scales.float().contiguous()

    def product(x: Tensor) -> Tensor:
        q, scale = torch.empty_like(x, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)
        torch.ops._C.dynamic_scaled_int8_quant(q, x, scale, None)
        return _cutlass(x, q, scale, codes, scales)

    return product


def vllm_fp8(packed: PackedWeight) -> Callable[[Tensor], Tensor]:
    """vLLM's CUTLASS product of fp8."""
    codes, scales = packed.codes.view(FP8).t(), packed.scales.float().contiguous()
    return lambda x: _cutlass(x, *_fp8_rows(x), codes, scales)


def _cutlass(x: Tensor, q: Tensor, scale: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    result = x.new_empty((x.shape[0], codes.shape[1]))
    torch.ops._C.cutlass_scaled_mm(result, q, codes, scale, scales, None)
    return result


def _fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in e4m3, and a scale for each row."""
    q, scale = torch.empty_like(x, dtype=FP8), x.new_empty((x.shape[0], 1), dtype=torch.float32)
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(q, x, scale, None)
    return q, scale


def vllm_w4a8(packed: PackedWeight) -> Callable[[Tensor], Tensor]:
    """vLLM's CUTLASS product of int4 weights and fp8 activations. It has the scales of groups in e4m3, too."""
    words = gptq_words(numerics.unpack_codes(packed.codes, 4, packed.shape[1]) ^ 8)  # two's complement
    codes = torch.ops._C.cutlass_encode_and_reorder_int4b(words.t().contiguous().t())
    channel = packed.scales.float().amax(-1, keepdim=True) / 448
    groups = ((packed.scales.float() / channel).to(FP8).float() / 8).to(FP8).t().contiguous()
    own, channel = torch.ops._C.cutlass_pack_scale_fp8(groups), channel * 8

    def product(x: Tensor) -> Tensor:
        q, scale = _fp8_rows(x)
        return torch.ops._C.cutlass_w4a8_mm(q, codes, own, GROUP, channel, scale, None, None)

    return product


SCALED = {
    "w8a8": {"torch": torch_int8, "vllm": vllm_int8},
    "wfp8afp8": {"torch": torch_fp8, "vllm": vllm_fp8},
    "w4a8_g128": {"vllm": vllm_w4a8},
}
TOLERANCE = {("w4a8_g128", "vllm"): 0.08}  # of the relative error; of all others 0.02
