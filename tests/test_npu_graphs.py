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
SCHEMES = ("w4a16_g64", "w4a16_g32_asym", "w8a16", "w8a8", "w8a8_static", "w4a8", "w4a4")
LIMIT = {"w4a4": 0.5, "w4a8": 0.05}  # relative error of the logits: two layers of codes that differ at ties


@pytest.fixture(autouse=True)
def npu_here(monkeypatch):
    """Let the CPU play the NPU."""
    define()
    for name in ("kernels", "operations", "finish", "kernel"):
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
    data = torch.randint(3, 150, (4, 32)) if "static" in scheme else None
    model = tiny_model(family, dtype, num_hidden_layers=1, **MODELS[family])
    return qcompile.quantize(model, scheme, data=data, progress=False)


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
