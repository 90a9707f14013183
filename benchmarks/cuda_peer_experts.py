"""Other projects' layers of experts with bfloat16 activations and int4 weights, symmetric in groups of 128.

Each takes the weights of gate and up [experts, 2 * intermediate, hidden] and of down [experts, hidden, intermediate],
and returns a function of x [tokens, hidden], ids int32 [tokens, k] and routing float32 [tokens, k]. Raises whatever is
missing. Orders of arguments are those of vLLM 0.26 and Humming 0.1.19, whose kernels also sort the pairs, apply the
activation and add up a token's rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from cuda_common import Compiled
from cuda_peers import GROUP, U4B8, gptq_words, humming_layer, marlin_scales
from torch import Tensor

from qcompile import numerics
from qcompile.backends.cuda.targets import attached
from qcompile.types import PackedWeight

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def marlin(up: PackedWeight, down: PackedWeight) -> Experts:
    """vLLM's Marlin for experts."""
    experts, (up, down) = up.shape[0], (_marlin_weight(weight) for weight in (up, down))
    room = torch.zeros(4 * attached().multiprocessors, dtype=torch.int32, device=up[0].device)

    def product(x, weight, pairs, routing, block, k, weighted):
        codes, scales, out = weight
        return torch.ops._moe_C.moe_wna16_marlin_gemm(
            x, None, codes, None, scales, *(None,) * 5, room, *pairs, routing, block, k, weighted, U4B8, x.shape[0],
            out, x.shape[1], True, False, True, False, -1, -1, -1,
        )  # fmt: skip

    def layer(x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        each, (tokens, k) = ids.numel() / experts, ids.shape
        block = next((block for block in (8, 16, 32, 48) if each / block < 0.9), 64)
        pairs = _sorted(ids, experts, block)
        rows = _activated(product(x, up, pairs, routing, block, k, False))
        return _summed(product(rows, down, pairs, routing, block, 1, True).view(tokens, k, -1))

    return layer


def _marlin_weight(packed: PackedWeight) -> tuple[Tensor, Tensor, int]:
    """(codes [experts, in / 16, 2 out], scales [experts, in / 128, out], out)."""
    out, inn = packed.shape[1:]
    order = torch.empty(0, dtype=torch.int32, device=packed.codes.device)
    codes = [
        torch.ops._C.gptq_marlin_repack(gptq_words(numerics.unpack_codes(own, 4, inn)), order, inn, out, 4, False)
        for own in packed.codes
    ]
    return torch.stack(codes), torch.stack([marlin_scales(own) for own in packed.scales]), out


def vllm_triton(up: PackedWeight, down: PackedWeight) -> Experts:
    """vLLM's Triton kernel, with the tiles that it has for GPUs without a table of its own."""
    import triton
    import triton.language as tl
    from vllm_wna16 import fused_moe_kernel_gptq_awq as kernel  # cuda_peers.sh

    def product(x, weight, pairs, routing, block, k, weighted):
        count, (_, out, inn) = x.shape[0] * k, weight.shape
        y = x.new_empty((count, out))
        most = min(len(pairs[0]), count * block) if x.shape[0] < block else len(pairs[0])
        bn, bk = (32, 64) if x.shape[0] == 1 else (64, 32)
        codes, scales = weight.codes, weight.scales
        kernel[(triton.cdiv(most, block) * triton.cdiv(out, bn),)](
            x, codes, y, scales, None, routing, *pairs, out, inn, most, count, *x.stride(), codes.stride(0),
            codes.stride(2), codes.stride(1), *y.stride(), scales.stride(0), scales.stride(2), scales.stride(1),
            0, 0, 0, block_k_diviable=inn % bk == 0, group_size=GROUP, MUL_ROUTED_WEIGHT=weighted, top_k=k,
            compute_type=tl.bfloat16, has_zp=False, use_int4_w4a16=True, use_int8_w8a16=False, BLOCK_SIZE_M=block,
            BLOCK_SIZE_N=bn, BLOCK_SIZE_K=bk, GROUP_SIZE_M=1, SPLIT_K=1,
        )  # fmt: skip
        return y

    def layer(x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        tokens, k = ids.shape
        block = 16 if tokens <= 20 else 32 if tokens <= 40 else 64
        pairs = _sorted(ids, up.shape[0], block)
        rows = _activated(product(x, up, pairs, routing, block, k, False))
        return _summed(product(rows, down, pairs, routing, block, 1, True).view(tokens, k, -1))

    return layer


def humming(up: PackedWeight, down: PackedWeight) -> Experts:
    """Humming, its products of sorted pairs, as vLLM calls them; the weighted sum is Inductor's."""
    from humming.tune import get_heuristics_config

    def prepared(packed: PackedWeight) -> tuple[Callable, list]:
        layer = humming_layer(numerics.unpack_codes(packed.codes, 4, packed.shape[-1]), packed.scales)
        return layer, get_heuristics_config(layer_config=layer.humming_config, gemm_type="indexed")

    experts, (up, up_tiles), (down, down_tiles) = up.shape[0], prepared(up), prepared(down)
    compute, tuned = json.dumps({"gemm_type": "indexed"}), [json.dumps(tiles) for tiles in (up_tiles, down_tiles)]
    weighted_sum = Compiled(lambda rows, routing: (rows.float() * routing[..., None]).sum(1).to(rows.dtype))

    def layer(x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        (tokens, k), count = ids.shape, ids.numel()
        block = next(tiles["block_shape"][0] for low, high, tiles in up_tiles if low < count <= high)
        places, owners, padded = _sorted(ids, experts, block)
        options = {
            "sorted_ids": places, "expert_ids": owners, "num_tokens_padded": padded, "valid_shape_m": count,
            "compute_config": compute,
        }  # fmt: skip
        rows = _activated(up(x, top_k=k, tuning_config=tuned[0], **options))
        return weighted_sum(down(rows, top_k=1, tuning_config=tuned[1], **options).view(tokens, k, -1), routing)

    return layer


def _sorted(ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(pairs by expert, in whole blocks; the expert of each block; how many there are), int32, by vLLM's kernel."""
    count = ids.numel()
    most = count + experts * (block - 1)
    most = min(most, count * block) if count < experts else most
    places, owners, padded = ids.new_empty(most), ids.new_empty(-(-most // block)), ids.new_empty(1)
    torch.ops._moe_C.moe_align_block_size(ids, experts, block, places, owners, padded, None)
    return places, owners, padded


def _activated(rows: Tensor) -> Tensor:
    """silu(gate) * up, by vLLM's kernel."""
    result = rows.new_empty((rows.shape[0], rows.shape[1] // 2))
    torch.ops._C.silu_and_mul(result, rows)
    return result


def _summed(rows: Tensor) -> Tensor:
    """[tokens, k, hidden] -> [tokens, hidden], by vLLM's kernel."""
    result = rows.new_empty((rows.shape[0], rows.shape[2]))
    torch.ops._moe_C.moe_sum(rows, result, None, None)
    return result


EXPERTS = {"vllm_triton": vllm_triton, "humming": humming, "marlin": marlin}
"""By name; the last one is compiled by the driver, from PTX, for most of a minute when it is first called."""
