"""Whole models, lowered for the NPU: the calls of each scheme, and their numbers against the definition.

The CPU plays the NPU: its backend has the NPU's kernels, operations and runner, and the goldens compute. Nothing else
differs from what happens on the device, so that the very graph that torch_npu would run is run here.
"""

from collections import Counter

import pytest
import torch
from helpers import logits, tiny_model
from npu_library import define

import qcompile
from qcompile import ops
from qcompile.backends.cpu import BACKEND as CPU
from qcompile.backends.npu import BACKEND as NPU
from qcompile.backends.npu import graphs
from qcompile.kernels import Kernel

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

MODELS = {
    "qwen3": {},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
        "v_head_dim": 32, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "moe_intermediate_size": 64, "first_k_dense_replace": 0, "head_dim": 32,
    },
}  # fmt: skip
SCHEMES = ("w4a16_g64", "w4a16_g32_asym", "w8a16", "w8a8", "w8a8_static", "w4a8", "w4a8_clip", "w4a4")
LIMIT = {"w4a4": 0.5, "w4a8": 0.05, "w4a8_clip": 0.05}  # relative error of the logits: codes differ at ties


@pytest.fixture(autouse=True)
def npu_here(monkeypatch):
    """Let the CPU play the NPU."""
    define()
    for name in ("kernels", "operations", "finish", "kernel", "target"):
        monkeypatch.setattr(CPU, name, getattr(NPU, name), raising=False)
    ops.find_kernel.cache_clear()
    yield
    ops.find_kernel.cache_clear()


@pytest.fixture
def lowered(monkeypatch):
    """The graphs that are handed to the NPU."""
    seen, finish = [], graphs.finish
    monkeypatch.setattr(CPU, "finish", lambda module, *rest: seen.append(module) or finish(module, *rest))
    return seen


def calls(modules, namespace="npu::") -> Counter:
    """How often each of Ascend's operations is called."""
    names = [getattr(node.target, "_name", "") for module in modules for node in module.graph.nodes]
    return Counter(name.removeprefix(namespace) for name in names if name.startswith(namespace))


def quantized(family, scheme, dtype=torch.bfloat16):
    data = torch.randint(3, 150, (4, 32)) if "static" in scheme or "clip" in scheme else None
    model = tiny_model(family, dtype, num_hidden_layers=1, **MODELS[family])
    return qcompile.quantize(model, scheme, data=data, rare_experts="all_tokens", progress=False)


def defined(model, monkeypatch):
    """Logits by the definition of every op: canonical weights, plain torch."""
    from qcompile.modules import quantized_modules

    packed = {name: module.packed() for name, module in quantized_modules(model).items()}
    reference = Kernel()
    with monkeypatch.context() as patch:
        patch.setattr(CPU, "operations", {})
        patch.setattr(CPU, "kernel", lambda name: reference)
        ops.find_kernel.cache_clear()
        for name, module in quantized_modules(model).items():
            tensors = reference.prepare(packed[name])
            patch.setattr(module, "tensors", lambda tensors=tensors: tensors)
        result = logits(model)
    ops.find_kernel.cache_clear()
    return result


def error_of_most_tokens(actual, expected) -> float:
    """The median of each token's relative error: where two experts are nearly as good, rounding chooses."""
    errors = (actual.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    return errors.median().item()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", MODELS)
def test_each_scheme_of_each_model_is_lowered_and_computed(family, scheme, lowered, monkeypatch):
    model = quantized(family, scheme)
    assert {p.kernel for p in qcompile.report(model).plan.quantized}.isdisjoint({"cpu.reference"})
    expected = defined(model, monkeypatch)
    assert error_of_most_tokens(logits(model), expected) < LIMIT.get(scheme, 0.03)
    actual = logits(torch.compile(model, backend="qcompile"))
    assert error_of_most_tokens(actual, expected) < LIMIT.get(scheme, 0.03)
    assert calls(lowered, "qcompile::") == calls(lowered, "qcompile_reference::") == {}
    assert calls(lowered)


# --------------------------------------------------------------------------------------------------- what is called

CALLS = {  # one layer: norms of q and k and the last one have no residual addition before them
    ("qwen3", "w8a8"): {
        "npu_rms_norm": 4, "npu_add_rms_norm_dynamic_quant": 1, "npu_dynamic_quant": 3, "npu_quant_matmul": 7,
    },
    ("qwen3", "w4a16_g64"): {"npu_rms_norm": 4, "npu_add_rms_norm": 1, "npu_weight_quant_batchmatmul": 7},
    ("qwen3", "w4a8"): {
        "npu_rms_norm": 4, "npu_add_rms_norm_dynamic_quant": 1, "npu_dynamic_quant": 3, "npu_grouped_matmul": 7,
    },
    ("qwen3", "w4a4"): {"npu_rms_norm": 4, "npu_add_rms_norm": 1, "npu_dynamic_quant": 4, "npu_quant_matmul": 7},
    ("qwen3_moe", "w8a8"): {
        "npu_rms_norm": 4, "npu_add_rms_norm": 1, "npu_dynamic_quant": 3, "npu_quant_matmul": 4,
        "npu_moe_init_routing_v2": 1, "npu_grouped_matmul_swiglu_quant_v2": 1, "npu_grouped_matmul": 1,
        "npu_moe_token_unpermute": 1,
    },
    ("qwen3_moe", "w4a16_g64"): {
        "npu_rms_norm": 4, "npu_add_rms_norm": 1, "npu_weight_quant_batchmatmul": 4, "npu_moe_init_routing_v2": 1,
        "npu_grouped_matmul": 2, "npu_swiglu": 1, "npu_moe_token_unpermute": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize(("family", "scheme"), CALLS)
def test_the_calls_of_one_layer(family, scheme, lowered):
    """Activations are quantized once for all that read them, in the norm where that is possible."""
    model = quantized(family, scheme)
    logits(torch.compile(model, backend="qcompile"))
    assert calls(lowered) == CALLS[family, scheme]


@pytest.mark.parametrize(
    ("dtype", "norm"), [(torch.float16, "npu_add_rms_norm_quant"), (torch.bfloat16, "npu_add_rms_norm")]
)
def test_static_activations_are_joined_with_the_norm_beside_float16_only(dtype, norm, lowered):
    """Beside bfloat16 the operation would round the stored scale."""
    model = quantized("qwen3", "w8a8_static", dtype)
    logits(torch.compile(model, backend="qcompile"))
    assert calls(lowered)[norm] == 1
    assert calls(lowered)["npu_quantize"] == (3 if dtype == torch.float16 else 4)
    (graph,) = qcompile.report(model).graphs
    reasons = [reason for record in graph.passes for _, reason in record.rejected]
    assert any("round the stored scale" in reason for reason in reasons) == (dtype == torch.bfloat16)


def test_four_bit_activations_are_never_unpacked(lowered):
    logits(torch.compile(quantized("qwen3_moe", "w4a4"), backend="qcompile"))
    nodes = [str(node.target) for module in lowered for node in module.graph.nodes]
    assert not [name for name in nodes if "shift" in name]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16_g64"])
def test_one_graph_serves_any_number_of_tokens(scheme, lowered):
    model = quantized("qwen3_moe", scheme)
    compiled = torch.compile(model, backend="qcompile", dynamic=True)
    for tokens in (12, 7, 31):
        ids = torch.randint(3, 150, (1, tokens))
        assert error_of_most_tokens(logits(compiled, ids), logits(model, ids)) < 0.05
    assert len(lowered) == 1


def test_a_float_model_is_quantized_while_it_is_compiled(lowered):
    model = tiny_model("qwen3", num_hidden_layers=1)
    actual = logits(torch.compile(model, backend="qcompile", options={"config": "w8a8"}))
    assert error_of_most_tokens(actual, logits(model)) < 0.2
    assert calls(lowered)["npu_quant_matmul"] == 7
    assert {p.kernel for p in qcompile.report(model).plan.quantized} == {"cpu.int8_nz"}


def test_weights_that_are_packed_while_compiling_may_keep_the_ordinary_layout():
    model = tiny_model("qwen3", num_hidden_layers=1)
    compiled = torch.compile(model, backend="qcompile", options={"config": "w8a8", "nz": False})
    logits(compiled)
    assert {p.kernel for p in qcompile.report(model).plan.quantized} == {"cpu.int8"}
    compiled = torch.compile(quantized("qwen3", "w8a8"), backend="qcompile", options={"nz": False})
    with pytest.raises(Exception, match=r"'nz' is about weights that are packed while compiling.*npu.target\(nz="):
        logits(compiled)


# ------------------------------------------------------------------------------------------------------ what runs it


def test_what_runs_a_graph_must_be_there():
    model = quantized("qwen3", "w8a8")
    release = torch.__version__.partition("+")[0]
    for mode in ("npugraph_ex", "aclgraph", "torchair"):
        compiled = torch.compile(model, backend="qcompile", options={"npu_graph": mode})
        with pytest.raises(
            Exception, match=rf"npu_graph='{mode}' cannot be used: torch_npu is not.*torch-npu=={release}"
        ):
            logits(compiled)
        torch._dynamo.reset()
    compiled = torch.compile(model, backend="qcompile", options={"npu_graph": "aclgraf"})
    with pytest.raises(Exception, match=r"unknown npu_graph 'aclgraf'. Did you mean 'aclgraph'"):
        logits(compiled)


def test_settings_of_inductor_are_none_of_an_npu():
    compiled = torch.compile(quantized("qwen3", "w8a8"), backend="qcompile", options={"max_autotune": True})
    with pytest.raises(Exception, match="max_autotune are settings of Inductor, which does not compile for cpu"):
        logits(compiled)


def test_graphs_of_other_devices_have_no_such_options(monkeypatch):
    model = quantized("qwen3", "w8a8")
    monkeypatch.delattr(CPU, "finish")
    for option in ({"npu_graph": "eager"}, {"nz": False}):
        compiled = torch.compile(model, backend="qcompile", options=option)
        with pytest.raises(Exception, match=rf"option '{next(iter(option))}' is about NPUs, but this model is on cpu"):
            logits(compiled)
        torch._dynamo.reset()


def test_a_saved_model_is_the_same_after_it_was_on_the_npu(tmp_path):
    """Device layouts never reach the disk."""
    model = quantized("qwen3_moe", "w4a16_g64")
    expected = logits(model)
    loaded = qcompile.load(qcompile.save(model, tmp_path / "model"))
    assert torch.equal(logits(loaded), expected)


def test_nothing_is_packaged_ahead_of_time(tmp_path):
    with pytest.raises(qcompile.UnsupportedError, match=r"compiled by Inductor, which has no cpu, where model\.layers"):
        qcompile.export(quantized("qwen3", "w8a8"), tmp_path / "model.pt2")
