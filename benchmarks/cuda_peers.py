"""Other projects' products of bfloat16 activations and int4 weights, symmetric in groups of 128, for comparison.

Each takes (codes uint8 [out, in] of 0 .. 15, scales bfloat16 [out, in / 128], the dequantized weight) and returns a
function of x [rows, in]. Raises whatever is missing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 128
U4B8 = 1125899907892224  # vLLM's number of its type uint4b8


def cublas(codes: Tensor, scales: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The float product."""
    return lambda x: F.linear(x, weight)


def tinygemm(codes: Tensor, scales: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """torch's own int4 kernel, which torchao's tile-packed layout calls: (q - 8) * scale + zero."""
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    pairs = torch.stack([scales.t(), torch.zeros_like(scales.t())], -1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, pairs)


def gemlite(codes: Tensor, scales: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """gemlite's Triton kernels, autotuned by itself."""
    from gemlite.helper import A16W4_HQQ_INT

    zeros = torch.full_like(scales, 8).reshape(-1, 1)
    maker = A16W4_HQQ_INT(device=codes.device, dtype=torch.bfloat16)
    return maker.from_weights(codes.clone(), scales.reshape(-1, 1), zeros)


def gptq_words(codes: Tensor) -> Tensor:
    """int32 [in / 8, out], as GPTQ stores codes."""
    parts = codes.t().to(torch.int64).view(-1, 8, codes.shape[0])
    words = sum(parts[:, i] << (4 * i) for i in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()


def marlin_scales(scales: Tensor) -> Tensor:
    """[out, in / 128] -> [in / 128, out], in the order in which Marlin reads them."""
    places = [i + 8 * j for i in range(8) for j in range(8)]
    return scales.t().reshape(-1, 64)[:, places].reshape(-1, scales.shape[0]).contiguous()


def marlin(codes: Tensor, scales: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """vLLM's Marlin."""
    out, inn = codes.shape
    order = torch.empty(0, dtype=torch.int32, device=codes.device)
    packed = torch.ops._C.gptq_marlin_repack(gptq_words(codes), order, inn, out, 4, False)
    own = marlin_scales(scales)
    room = torch.zeros(132, dtype=torch.int32, device=codes.device)
    nothing = (None,) * 5
    return lambda x: torch.ops._C.marlin_gemm(
        x, None, packed, None, own, *nothing, room, U4B8, x.shape[0], out, inn, True, False, True, False
    )


def machete(codes: Tensor, scales: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """vLLM's Machete."""
    words = gptq_words(codes).t().contiguous().t()
    packed = torch.ops._C.machete_prepack_B(words, torch.bfloat16, U4B8, torch.bfloat16)
    own = scales.t().contiguous()
    return lambda x: torch.ops._C.machete_mm(x, packed, U4B8, torch.bfloat16, own, None, GROUP, None, None, None)


def humming(codes: Tensor, scales: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Humming."""
    return humming_layer(codes, scales)


def humming_layer(codes: Tensor, scales: Tensor):
    """Humming's layer for one weight, or (3 dimensions) for experts."""
    from humming import ops
    from humming.layer import HummingLayer

    config = {"dtype": "int4", "group_size": GROUP, "scale_dtype": "bfloat16"}
    experts = codes.shape[0] if codes.dim() == 3 else None
    layer = HummingLayer(*codes.shape[-2:], config, num_experts=experts, torch_dtype=torch.bfloat16).cuda()
    layer.load_from_tensors({"weight": ops.pack_weight(codes.int(), 4), "weight_scale": scales})
    layer.transform()
    return layer


INT4 = {f.__name__: f for f in (cublas, tinygemm, gemlite, marlin, machete, humming)}
