"""What the benchmarks of CUDA kernels call vLLM's kernels with, by stand-ins of the same schemas that compute on a CPU.

Layouts that only the real kernels know (Marlin's codes, CUTLASS' codes) are left as they are given.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from cuda_cases import error

from qcompile import numerics
from qcompile.moe import run_float_experts

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
SCHEMAS = {  # of vLLM 0.26, as its libraries state them
    "_C": """
        gptq_marlin_repack(Tensor b_q_weight, Tensor perm, SymInt size_k, SymInt size_n, int num_bits, bool is_a_8bit)
            -> Tensor;
        silu_and_mul(Tensor! result, Tensor input) -> ();
        dynamic_scaled_int8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor!? azp) -> ();
        dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ();
        cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ();
        cutlass_encode_and_reorder_int4b(Tensor B) -> Tensor;
        cutlass_pack_scale_fp8(Tensor scales) -> Tensor;
        cutlass_w4a8_mm(Tensor A, Tensor B, Tensor group_scales, int group_size, Tensor channel_scales,
            Tensor token_scales, ScalarType? out_type, str? maybe_schedule) -> Tensor
    """,
    "_moe_C": """
        moe_align_block_size(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_token_ids,
            Tensor! experts_ids, Tensor! num_tokens_post_pad, Tensor? maybe_expert_map) -> ();
        moe_sum(Tensor input, Tensor! output, Tensor? topk_ids=None, Tensor? expert_map=None) -> ();
        moe_wna16_marlin_gemm(Tensor! a, Tensor? c_or_none, Tensor! b_q_weight, Tensor? b_bias_or_none,
            Tensor! b_scales, Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, Tensor? g_idx_or_none,
            Tensor? perm_or_none, Tensor! workspace, Tensor sorted_token_ids, Tensor! expert_ids,
            Tensor! num_tokens_past_padded, Tensor! topk_weights, int moe_block_size, int top_k,
            bool mul_topk_weights, int b_type_id, int size_m, int size_n, int size_k, bool is_full_k,
            bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float, int thread_k, int thread_n,
            int blocks_per_sm) -> Tensor
    """,
}
PLACES = [i + 8 * j for i in range(8) for j in range(8)]  # of Marlin's scales


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """GPTQ's int32 [in / 8, out] -> [out, in]."""
    parts = torch.stack([words >> (4 * i) & 15 for i in range(8)], 1)
    return parts.flatten(0, 1).t()


def align(ids, experts, block, places, owners, padded, _map):
    flat, at = ids.reshape(-1), 0
    places.fill_(flat.numel())
    for expert in range(experts):
        mine = (flat == expert).nonzero()[:, 0].int()
        places[at : at + len(mine)] = mine
        blocks = -(-len(mine) // block)
        owners[at // block : at // block + blocks] = expert
        at += blocks * block
    padded.fill_(at)


def marlin(a, _c, codes, _bias, scales, *rest):
    nothing, (places, owners, padded, routing, block, k, weighted, kind, m, n, inn, *_) = rest[:5], rest[6:]
    assert nothing == (None,) * 5
    assert (kind, m, inn) == (1125899907892224, *a.shape)
    result = a.new_zeros((m * k, n))
    for at in range(0, int(padded), block):
        pairs = places[at : at + block]
        pairs = pairs[pairs < m * k].long()
        expert = int(owners[at // block])
        own = scales[expert].reshape(-1, 64)[:, torch.tensor(PLACES).argsort()].reshape(-1, n)
        weight = (unpacked(codes[expert].view(-1, n)) - 8) * own.t().repeat_interleave(128, 1).float()
        rows = a[pairs // k].float() @ weight.t()
        result[pairs] = (rows * routing.reshape(-1, 1)[pairs] if weighted else rows).bfloat16()
    return result


def quantize(most):
    def stand_in(result, x, scale, _):
        scale.copy_(x.float().abs().amax(-1, keepdim=True) / most)
        numbers = x.float() / scale
        result.copy_(numbers.round() if result.dtype == torch.int8 else numbers)

    return stand_in


def w4a8(a, codes, groups, size, channel, token, _type, _schedule):
    signed = (unpacked(codes) ^ 8) - 8
    weight = signed * groups.float().t().repeat_interleave(size, 1) * channel
    return (a.float() @ weight.t() * token).bfloat16()


STAND_INS = {
    "gptq_marlin_repack": lambda words, _order, inn, out, _bits, _a8: words.view(inn // 16, 2 * out),
    "silu_and_mul": lambda y, x: y.copy_(torch.nn.functional.silu(x[:, : y.shape[1]]) * x[:, y.shape[1] :]),
    "dynamic_scaled_int8_quant": quantize(127),
    "dynamic_per_token_scaled_fp8_quant": quantize(448),
    "cutlass_scaled_mm": lambda y, a, b, a_s, b_s, _: y.copy_((a.float() @ b.float()) * a_s * b_s.t()),
    "cutlass_encode_and_reorder_int4b": lambda codes: codes,
    "cutlass_pack_scale_fp8": lambda scales: scales,
    "cutlass_w4a8_mm": w4a8,
    "moe_align_block_size": align,
    "moe_sum": lambda rows, y: y.copy_(rows.float().sum(1)),
    "moe_wna16_marlin_gemm": marlin,
}


def of(stand_in, returns_nothing):
    def called(*arguments):
        result = stand_in(*arguments)
        return None if returns_nothing else result

    return called


@pytest.fixture(scope="module")
def vllm():
    """vLLM's ops, for as long as the tests of this file run."""
    if hasattr(torch.ops._C, "silu_and_mul"):
        pytest.skip("vLLM itself is loaded")
    libraries = []
    for name, schemas in SCHEMAS.items():
        library = torch.library.Library(name, "FRAGMENT")
        for schema in (" ".join(one.split()) for one in schemas.split(";")):
            op = schema.partition("(")[0]
            library.define(schema)
            library.impl(op, of(STAND_INS[op], schema.endswith("-> ()")), "CPU")
        libraries.append(library)
    yield
    for library in libraries:
        library._destroy()


@pytest.fixture
def benchmark(monkeypatch):
    """A module of benchmarks/."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.startswith("cuda_") and name != "cuda_cases":
            del sys.modules[name]


@pytest.mark.parametrize("scheme", ["w8a8", "wfp8afp8", "w4a8_g128"])
def test_products_of_quantized_activations(scheme, vllm, benchmark):
    packed = benchmark("cuda_linear").random_weight(scheme, 128, 256, "cpu")
    peers, x = benchmark("cuda_peer_scaled"), torch.randn(20, 256).bfloat16()
    parts = numerics.quantize_activation(x, packed.scheme.activation, ())
    expected = numerics.dequantize_activation(parts, packed.scheme.activation).double()
    expected = expected @ numerics.dequantize_packed(packed).double().t()
    result = peers.SCALED[scheme]["vllm"](packed)(x)
    assert result.dtype == torch.bfloat16
    assert error(result, expected) < peers.TOLERANCE.get((scheme, "vllm"), 0.02)


@pytest.mark.parametrize("tokens", [1, 30])
def test_marlin_for_experts(tokens, vllm, benchmark):
    random = benchmark("cuda_experts").random_experts
    up, down = (random("w4a16_g128", 4, *shape, "cpu") for shape in ((512, 256), (256, 256)))
    x, ids = torch.randn(tokens, 256).bfloat16(), torch.rand(tokens, 4).topk(2).indices
    routing = torch.rand(tokens, 2).softmax(-1)
    result = benchmark("cuda_peer_experts").marlin(up, down)(x, ids.int(), routing)
    floats = [numerics.dequantize_packed(weight).float() for weight in (up, down)]
    expected = run_float_experts(x.float(), ids, routing, floats[0], None, floats[1], None, "silu", False, False)
    assert error(result, expected.double()) < 0.02
