"""Quantized experts of every family equal what their numbers stand for, eagerly, as a graph and compiled."""

import copy
import functools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import logits, relative_error
from moe_models import FAMILIES, IDS, Decoder, Looping, Sorting, tiny_moe
from torch import nn
from torch.nn import functional as F

import qcompile
from qcompile import api, gates
from qcompile.errors import CalibrationError, UnsupportedError
from qcompile.modules import FloatWeight, QuantExperts, QuantLinear, quantized_modules, state_of
from qcompile.numerics import dequantize_activation, dequantize_packed, quantize_activation
from qcompile.trace import Traced, bind, trace

SCHEMES = ("w4a16_g32", "w8a16", "w8a8")


@functools.cache
def traced(family: str) -> Traced:
    return trace(tiny_moe(family))


def own_graph(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of a traced graph, over the same fake tensors."""
    names = [node.target for node in graph.graph.nodes if node.op == "get_attr"]
    tensors = {name: functools.reduce(getattr, name.split("."), graph) for name in names}
    copied = torch.fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    copied.set_codegen(graph.graph._codegen)
    return torch.fx.GraphModule(tensors, copied)


def quantized(family: str, config, monkeypatch) -> nn.Module:
    """A quantized model; its float twin is traced once for all schemes."""

    def again(model, example_inputs=None):
        once = traced(family)
        return Traced(own_graph(once.graph), once.sites, once.experts)

    torch.manual_seed(1)
    model = tiny_moe(family)
    monkeypatch.setattr(api, "trace", again)
    return qcompile.quantize(model, config, progress=False)


def rounded(x: torch.Tensor, scheme) -> torch.Tensor:
    """What a quantized product reads, as floats."""
    if scheme.activation is None:
        return x
    return dequantize_activation(quantize_activation(x, scheme.activation, []), scheme.activation).to(x.dtype)


class Plain(nn.Module):
    """A quantized module by its definition: dequantized weights, rounded inputs, a loop over tokens."""

    def __init__(self, module: QuantLinear | QuantExperts) -> None:
        super().__init__()
        self.parts = [module] if isinstance(module, QuantLinear) else [module.up, module.down]
        self.activation = getattr(module, "activation", "")
        self.weights = [dequantize_packed(part.packed(), torch.float32) for part in self.parts]

    def product(self, x: torch.Tensor, i: int, expert=...) -> torch.Tensor:
        part, bias = self.parts[i], self.parts[i].bias
        return F.linear(rounded(x, part.scheme), self.weights[i][expert], None if bias is None else bias[expert])

    def forward(self, x, ids=None, routing=None):
        if ids is None:
            return self.product(x, 0)
        result = torch.zeros_like(x)
        for token in range(x.shape[0]):
            for expert, weight in zip(ids[token].tolist(), routing[token], strict=True):
                hidden = gates.gated(self.product(x[token : token + 1], 0, expert), self.activation)
                result[token] += weight * self.product(hidden, 1, expert)[0]
        return result


def plain(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which every quantized module is replaced by its definition."""
    copied = copy.deepcopy(model)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantLinear | QuantExperts):
                parent._modules[name] = Plain(child)
    return copied


class TestFamilies:
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_model_equals_its_definition(self, family, scheme, monkeypatch):
        model = quantized(family, scheme, monkeypatch)
        expected = logits(plain(model))
        # in eight bits a last digit of an input decides between two codes now and then
        assert relative_error(logits(model), expected) < (1e-5 if "a16" in scheme else 1e-2)
        state = state_of(model)
        ids = torch.arange(3, 27).view(2, 12)
        assert torch.equal(bind(state.graph, model)(ids), logits(model, ids))
        assert state.report.coverage == 1.0
        experts = [p for p in state.plan.quantized if p.site.kind == "experts"]
        assert len(experts) == 2 * len([m for m in model.modules() if isinstance(m, QuantExperts)]) > 0
        assert {str(p.scheme) for p in experts} == {scheme}
        assert all(result.sqnr > 15 for result in state.report.sites if result.planned in experts)
        assert "experts.gate_up_proj" in str(state.report)
        assert "experts.down_proj" in str(state.report)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_dequantizing_gives_the_modules_back(self, family, monkeypatch):
        original = tiny_moe(family)
        model = quantized(family, "w8a16", monkeypatch)
        expected = logits(model)
        qcompile.dequantize(model)
        assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in original.named_modules()}
        assert not any("forward" in vars(module) for module in model.modules())
        before, after = original.state_dict(), model.state_dict()
        assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
        assert relative_error(logits(model), expected) < 1e-5
        assert trace(model).sites == traced(family).sites

    @pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
    def test_a_copy_and_a_pickle_compute_the_same(self, family, monkeypatch):
        model = quantized(family, "w4a16_g32", monkeypatch)
        expected = logits(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for parameter in model.parameters():
                parameter.data.zero_()
            assert torch.equal(logits(other), expected)
            qcompile.dequantize(other)


BLOCKS = {"loop": lambda: Looping(shared="gated", bias=True), "sorting": lambda: Sorting()}


class TestLists:
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("block", BLOCKS)
    def test_the_model_equals_its_definition(self, block, scheme):
        model = Decoder(BLOCKS[block](), BLOCKS[block]()).eval()
        original = copy.deepcopy(model)
        qcompile.quantize(model, scheme, example_inputs=IDS, progress=False)
        ids = torch.randint(0, 50, (3, 9))
        with torch.no_grad():
            actual, expected = model(ids), plain(model)(ids)
            assert relative_error(actual, expected) < 1e-5
            assert torch.equal(bind(state_of(model).graph, model)(ids), actual)
            if "a16" in scheme:
                qcompile.dequantize(model)
                assert relative_error(model(ids), expected) < 1e-5
                assert {n: t.shape for n, t in model.state_dict().items()} == {
                    n: t.shape for n, t in original.state_dict().items()
                }

    def test_a_walk_quantizes_them_too(self):
        model = Decoder(Looping()).eval()
        qcompile.quantize(model, {"scheme": "w8a16", "tracing": "module_walk"}, progress=False)
        assert {name for name, module in quantized_modules(model).items() if len(module.shape) == 3} == {
            "layers.0.mlp.feed.gate_up_proj", "layers.0.mlp.feed.down_proj"
        }  # fmt: skip
        ids = torch.randint(0, 50, (2, 5))
        with torch.no_grad():
            assert relative_error(model(ids), plain(model)(ids)) < 1e-5

    def test_a_block_whose_experts_stay_float_does_not_loop_either(self):
        model = Decoder(Looping()).eval()
        ids = torch.randint(0, 50, (2, 5))
        with torch.no_grad():
            before = model(ids)
            rules = [{"match": "layers.0.mix", "scheme": "w8a16"}, {"match": "*", "scheme": "float"}]
            qcompile.quantize(model, {"rules": rules}, example_inputs=IDS, progress=False)
            assert relative_error(model(ids), before) < 0.01
            assert torch.equal(bind(state_of(model).graph, model)(ids), model(ids))
        experts = model.layers[0]["mlp"].feed
        assert isinstance(experts.up, FloatWeight)
        assert isinstance(experts.down, FloatWeight)


class TestRules:
    def test_routed_shared_router_and_dense_layers_each_have_their_scheme(self, monkeypatch):
        rules = [
            {"match": "experts", "scheme": "w4a16_g32"},
            {"match": "*.shared_experts.*", "scheme": "w8a16"},
            {"match": "*.layers.0.*", "scheme": "w8a8"},
            {"match": "*", "scheme": "float"},
        ]
        model = quantized("deepseek_v3", {"rules": rules}, monkeypatch)
        found = {p.site.name.removeprefix("model."): str(p.scheme) for p in state_of(model).plan if p.scheme}
        assert {s for n, s in found.items() if ".mlp.experts." in n} == {"w4a16_g32"}
        assert {s for n, s in found.items() if "shared_experts" in n} == {"w8a16"}
        assert {s for n, s in found.items() if n.startswith("layers.0.")} == {"w8a8"}
        assert not any(n.endswith("mlp.gate.weight") or "layers.1.self_attn" in n for n in found)
        assert relative_error(logits(model), logits(plain(model))) < 1e-5

    def test_a_projection_may_have_another_scheme_or_stay_float(self, monkeypatch):
        for family in ("qwen3_moe", "gpt_oss"):
            rules = [
                {"match": "*.layers.0.*.experts.down_proj", "scheme": "float"},
                {"match": "*.layers.1.*.experts.down_proj", "scheme": "w8a8"},
            ]
            float_down = tiny_moe(family).model.layers[0].mlp.experts.down_proj
            model = quantized(family, {"scheme": "w4a16_g32", "rules": rules}, monkeypatch)
            first, second = (layer.mlp.experts for layer in model.model.layers)
            assert isinstance(first.down, FloatWeight)
            assert first.down.weight.shape[0] == float_down.shape[0]
            assert [str(second.up.scheme), str(second.down.scheme)] == ["w4a16_g32", "w8a8"]
            ids = torch.arange(3, 27).view(2, 12)
            assert torch.equal(bind(state_of(model).graph, model)(ids), logits(model, ids))
            original = logits(model)
            qcompile.dequantize(model)
            assert relative_error(logits(model), original) < 0.2

    def test_one_layer_alone(self, monkeypatch):
        rules = [{"match": "*.layers.1.mlp.experts.*", "scheme": "w4a16_g32"}, {"match": "*", "scheme": "float"}]
        model = quantized("mixtral", {"rules": rules}, monkeypatch)
        assert not isinstance(model.model.layers[0].mlp.experts, QuantExperts)
        assert isinstance(model.model.layers[1].mlp.experts, QuantExperts)
        ids = torch.arange(3, 27).view(2, 12)
        assert relative_error(bind(state_of(model).graph, model)(ids), logits(model, ids)) < 1e-5

    def test_the_plan_counts_every_byte_once(self):
        model = tiny_moe("deepseek_v3")
        plan = qcompile.plan(model, "w8a16")
        tensors = [*model.parameters(), *model.buffers()]
        assert plan.bytes_before == sum(t.numel() * t.element_size() for t in tensors)
        assert plan.bytes_after < 0.5 * plan.bytes_before


class TestTokens:
    """Which experts get how many tokens is the router's choice; nothing may depend on it."""

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_any_distribution_of_tokens(self, scheme, monkeypatch):
        model = quantized("gpt_oss", scheme, monkeypatch)
        experts = model.model.layers[0].mlp.experts
        x = torch.randn(9, 128)
        choices = {
            "one expert": torch.full((9, 1), 5),
            "two experts": torch.tensor([[7, 0]]).expand(9, 2),
            "every expert": torch.arange(8).expand(9, 8),
            "one token": torch.tensor([[3, 1]]),
        }
        for ids in choices.values():
            rows, routing = x[: len(ids)], torch.rand(ids.shape)
            actual, expected = experts(rows, ids, routing), Plain(experts)(rows, ids, routing)
            assert relative_error(actual, expected) < 1e-5
        assert experts(x[:0], torch.zeros((0, 2), dtype=torch.long), torch.zeros((0, 2))).shape == (0, 128)

    @pytest.mark.parametrize("wrong", [8, -1])
    def test_experts_that_do_not_exist_are_named_in_debug_mode(self, wrong, monkeypatch):
        experts = quantized("gpt_oss", "w8a16", monkeypatch).model.layers[0].mlp.experts
        ids = torch.tensor([[3, wrong]])
        monkeypatch.setenv("QCOMPILE_DEBUG", "1")
        with pytest.raises(UnsupportedError, match=rf"chose experts {min(3, wrong)} to {max(3, wrong)}, .* 0 to 7"):
            experts(torch.randn(1, 128), ids, torch.ones(1, 2))


class TestBadWeights:
    def test_weights_that_are_not_finite_or_not_there(self):
        model = tiny_moe("qwen3_moe")
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[3, 4, 5] = torch.inf
        before = [type(module) for module in model.modules()]
        with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.experts\.down_proj holds NaN or infinite values"):
            qcompile.quantize(model, progress=False)
        assert [type(module) for module in model.modules()] == before
        block = Looping()
        block.feed.to("meta")
        with pytest.raises(CalibrationError, match=r"layers\.0\.mlp\.feed\.gate_up_proj is on the meta device"):
            qcompile.quantize(Decoder(block), example_inputs=IDS, progress=False)


class TestCompiled:
    @pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
    def test_experts_of_a_float_model_are_not_left_float_in_silence(self, family, fresh_dynamo):
        compiled = torch.compile(tiny_moe(family), backend="qcompile", options={"config": "w8a16"})
        with pytest.raises(Exception, match=r"holds weights of 8 experts, .* call qcompile\.quantize"):
            logits(compiled)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("family", "scheme"), [("qwen3_moe", "w8a8"), ("gpt_oss", "w4a16_g32"), ("llama4_text", "w8a16")]
    )
    def test_prefill_decode_and_generate(self, family, scheme, monkeypatch, fresh_dynamo):
        model = quantized(family, scheme, monkeypatch)
        compiled = torch.compile(model, backend="qcompile", fullgraph=True, dynamic=True)
        for shape in ((2, 12), (1, 1), (3, 7)):
            ids = torch.randint(3, 150, shape)
            # an activation halfway between two codes may be rounded either way
            assert relative_error(logits(compiled, ids), logits(model, ids)) < (2e-2 if scheme == "w8a8" else 1e-5)
        ids = torch.randint(3, 150, (1, 5))
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)
        model.compile(backend="qcompile", dynamic=True)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
        assert qcompile.report(model).graphs

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("family", "scheme"),
        [
            ("qwen2_moe", "w4a16_g32"),
            ("mixtral", "w8a16"),
            ("deepseek_v2", "w4a16_g32_asym"),
            ("deepseek_v3", "w4a16_g32"),
            ("glm4_moe", "w8a16"),
        ],
    )
    def test_one_graph_for_prompts_and_decoding(self, family, scheme, monkeypatch, fresh_dynamo):
        model = quantized(family, scheme, monkeypatch)
        compiled = torch.compile(model, backend="qcompile", fullgraph=True, dynamic=True)
        for shape in ((2, 12), (3, 1)):
            ids = torch.randint(3, 150, shape)
            assert relative_error(logits(compiled, ids), logits(model, ids)) < 1e-5
        assert qcompile.report(model).graphs

    @pytest.mark.slow
    @pytest.mark.parametrize("block", BLOCKS)
    def test_blocks_that_looped(self, block, fresh_dynamo):
        model = Decoder(BLOCKS[block]()).eval()
        rules = [{"match": "*.down_proj", "scheme": "float"}]
        qcompile.quantize(model, {"scheme": "w4a16_g32", "rules": rules}, example_inputs=IDS, progress=False)
        compiled = torch.compile(model, backend="qcompile", fullgraph=True, dynamic=True)
        with torch.no_grad():
            for shape in ((2, 6), (1, 1), (5, 3)):
                ids = torch.randint(0, 50, shape)
                assert relative_error(compiled(ids), model(ids)) < 1e-5


@pytest.mark.slow
def test_thirty_billion_parameters_are_traced_planned_and_rewritten_in_a_gibibyte_and_a_half():
    script = Path(__file__).parent / "big_moe.py"
    done = subprocess.run([sys.executable, script, "qwen3-30b-a3b"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["parameters"] > 30e9
    assert facts["sites"] == 48 * 6
    assert facts["matches"] == [48 * 4, 48]
    assert facts["nodes"][1] < 6000
    assert facts["peak"] < 1.5 * 2**30
    assert facts["cpu"] < 40


PEAK = """
import gc, json, pathlib, re, sys, threading, torch
sys.path.insert(0, sys.argv[1])
from helpers import tiny_config
from moe_models import FAMILIES, IDS, Decoder, Looping, tiny_moe
from transformers import AutoModelForCausalLM
import qcompile

def now(field="VmRSS"):
    return int(re.search(field + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

family, scheme = sys.argv[2:]
listed = family == "list"
if listed:  # what loads code and starts threads does so here
    qcompile.quantize(Decoder(Looping()), scheme, example_inputs=IDS, progress=False)
else:
    qcompile.quantize(tiny_moe(family), scheme, progress=False)
with torch.device("meta"):
    if listed:
        from moe_models import MLP
        model = Decoder(*(Looping(1024, 48) for _ in range(3)), hidden=1024)
        for layer in model.layers:
            layer["mlp"].feed = torch.nn.ModuleList([MLP(1024, 768) for _ in range(48)])
        model = model.bfloat16()
    else:
        sizes = {"num_experts": 48, "num_local_experts": 48, "moe_intermediate_size": 768, "intermediate_size": 768}
        config = tiny_config(family, **(FAMILIES[family] | sizes | {"hidden_size": 1024, "num_hidden_layers": 3}))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model = model.to_empty(device="cpu").eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.fill_(0.02)
        parameter.view(-1)[::7] = -0.01
size = sum(p.numel() for p in model.parameters()) * 2
layer = 48 * 3 * 768 * 1024 * 2
gc.collect()
before, samples, done = now(), [], threading.Event()

def sample():
    while not done.wait(0.001):
        samples.append(now())

thread = threading.Thread(target=sample)
thread.start()
qcompile.quantize(model, scheme, progress=False, example_inputs=IDS if listed else None)
done.set()
thread.join()
after = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
print(json.dumps({"size": size, "layer": layer, "peak": max(samples) - before, "freed": before - now(),
                  "saved": size - after, "samples": len(samples)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident memory of Linux's /proc")
@pytest.mark.parametrize(("family", "scheme"), [("qwen3_moe", "w4a16_g32"), ("gpt_oss", "w8a8"), ("list", "w4a16_g32")])
def test_the_peak_is_the_float_model_and_the_experts_of_one_layer(family, scheme):
    """Also where weights must be copied: interleaved and transposed, or one by one in a list."""
    command = [sys.executable, "-c", PEAK, str(Path(__file__).parent), family, scheme]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["size"] > 650e6
    assert facts["samples"] > 100
    assert facts["peak"] < facts["layer"]
    assert facts["freed"] > 0.9 * facts["saved"]
