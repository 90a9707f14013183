"""Calibrated experts: each by what it sees itself, and a choice for those that see next to nothing."""

import math

import pytest
import torch
from helpers import tiny_model
from moe_models import Looping, tiny_moe
from torch import nn

import qcompile
from qcompile.errors import CalibrationError, ConfigError
from qcompile.experts import find_experts
from qcompile.float_experts import read
from qcompile.gates import gated
from qcompile.methods.gptq import GPTQ
from qcompile.methods.rtn import METHOD as RTN
from qcompile.modules import quantized_modules
from qcompile.observers import Statistics, static_parameters
from qcompile.types import ActivationType, PackedWeight, Scheme

STATIC = ActivationType.parse("8_static")


def config(scheme: str, method: str = "rtn", **more) -> dict:
    """Quantizes experts alone."""
    rules = [{"match": "experts", "scheme": scheme, "method": method}]
    return {"scheme": "float", "rules": rules, **more}


def ids(rows: int = 6, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 150, (rows, length))


def quantize(model: nn.Module, asked: dict, data, **more) -> nn.Module:
    more = {"expert_tokens": 1} | more
    length = {} if "example_inputs" in more else {"sequence": data.shape[1]}
    return qcompile.quantize(model, asked, data=data, progress=False, **length, **more)


def seen_by_experts(model: nn.Module, run, everything: bool = False) -> dict[str, list[torch.Tensor]]:
    """What both projections of each expert of a float model read: {site: [rows of expert 0, of expert 1 ...]}."""
    found = {}
    layouts = {layout.name: layout for layout in find_experts(model)}

    def look(module: nn.Module, args: tuple, name: str) -> None:
        layout, (x, chosen, _) = layouts[name], args
        up, down = (f"{name}.{projection}" for projection in layout.projections)
        weight, bias = (read(module, layout, 0, kind) for kind in ("weight", "bias"))
        found[up], found[down] = [], []
        for expert in range(layout.experts):
            rows = x if everything else x[(chosen == expert).any(-1)]
            hidden = nn.functional.linear(rows, weight[expert], None if bias is None else bias[expert])
            found[up].append(rows)
            found[down].append(gated(hidden, layout.arithmetic.activation))

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: look(module, args, name))
        for name in layouts
    ]
    with torch.no_grad():
        run(model)
    for hook in hooks:
        hook.remove()
    return found


def scales(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    each = [static_parameters(own.min(), own.max(), STATIC) for own in rows]
    return torch.cat([e["input_scale"] for e in each]), torch.cat([e["input_zero"] for e in each])


class TestStatic:
    @pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
    def test_each_expert_has_the_range_of_what_it_sees(self, family):
        model, data = tiny_moe(family), ids()
        expected = seen_by_experts(model, lambda model: model(data, use_cache=False))
        with torch.no_grad():
            before = model(data, use_cache=False).logits
        quantize(model, config("w8a8_static"), data)
        modules = quantized_modules(model)
        assert modules.keys() == expected.keys()
        assert len(modules) == 4
        for name, module in modules.items():
            scale, zero = scales(expected[name])
            assert torch.allclose(module.input_scale, scale, rtol=1e-5)  # sums in another order
            assert (module.input_zero - zero).abs().max() <= 1
        with torch.no_grad():
            after = model(data, use_cache=False).logits
        assert (after - before).norm() < 0.1 * before.norm()

    def test_a_walk_sees_the_same(self):
        data, found = ids(), []
        for tracing in ("export", "module_walk"):
            torch.manual_seed(1)
            model = quantize(tiny_moe("qwen3_moe"), config("w8a8_static", tracing=tracing), data)
            found.append([m.input_scale for m in quantized_modules(model).values()])
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*found, strict=True))

    def test_experts_in_a_list(self):
        block, data = Looping(logits=False), torch.randn(40, 64)
        model = nn.Sequential(nn.Linear(64, 64), block)
        asked = config("w8a8_static")
        quantize(model, asked, [(data,)], example_inputs=(data,))
        experts = model[1].feed
        x = model[0](data)
        chosen = block.router(x).topk(2).indices
        for expert in range(6):
            rows = x[(chosen == expert).any(-1)]
            scale = static_parameters(rows.min(), rows.max(), STATIC)["input_scale"]
            assert torch.allclose(experts.up.input_scale[expert : expert + 1], scale, rtol=1e-5)

    def test_the_report_tells_what_experts_saw(self):
        model = quantize(tiny_moe("qwen3_moe"), config("w8a8_static"), ids())
        notes = qcompile.report(model).notes
        assert notes[0] == "calibrated on 6 sequences of 24 tokens"
        assert "experts saw" in notes[1]
        assert "tokens each" in str(qcompile.report(model))


def lopsided() -> nn.Module:
    """Two layers whose routers never choose experts 2 and 5."""
    model = tiny_moe("qwen3_moe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(1)
            layer.post_attention_layernorm.weight.copy_(torch.eye(128)[0] * 8 + 1)
            for expert in (2, 5):
                layer.mlp.gate.weight[expert] = 0
            others = [expert for expert in range(8) if expert not in (2, 5)]
            layer.mlp.gate.weight[others] = layer.mlp.gate.weight[others].abs() + 0.5
        model.model.embed_tokens.weight.abs_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.mul_(0.01)
    return model


class TestRareExperts:
    @pytest.fixture(scope="class")
    @staticmethod
    def data():
        return ids(8, 24)

    def test_an_error_names_them(self, data):
        rare = r"model.layers.0: expert 2 saw 0, expert 5 saw 0 tokens, fewer than 1\..*rare_experts='all_tokens'"
        with pytest.raises(CalibrationError, match=rf"layers.0.mlp.experts.gate_up_proj in block {rare}"):
            quantize(lopsided(), config("w8a8_static"), data)

    @pytest.mark.parametrize("scheme", ["w8a8_static", "w4a8_clip", "w4a16_g32"])
    def test_rounding_takes_the_range_of_the_others(self, data, scheme):
        model = lopsided()
        expected = seen_by_experts(model, lambda model: model(data, use_cache=False))
        weights = {layout.name: read(model.get_submodule(layout.name), layout, 0) for layout in find_experts(model)}
        quantize(model, config(scheme, "gptq"), data, rare_experts="rtn")
        for name, module in quantized_modules(model).items():
            packed = module.packed()
            for tensor in [*packed.tensors().values(), *packed.activation_tensors().values()]:
                assert torch.isfinite(tensor.float()).all()
            if name.endswith("gate_up_proj"):
                bare = Scheme(Scheme.parse(scheme).weight)
                rounded = RTN.quantize(weights[name.rpartition(".")[0]], bare, {})
                alike = [torch.equal(packed.expert(e).codes, rounded.expert(e).codes) for e in range(8)]
                if name.startswith("model.layers.0"):
                    assert alike == [e in (2, 5) for e in range(8)]
            if scheme == "w4a8_clip":
                assert (module.alpha[[2, 5]] == 1).all()
            if scheme == "w8a8_static" and name.startswith("model.layers.0"):
                together = torch.cat(expected[name])
                scale = static_parameters(together.min(), together.max(), STATIC)["input_scale"]
                assert torch.allclose(module.input_scale[[2, 5]], scale, rtol=0.02)
        (note,) = [n for n in qcompile.report(model).notes if n.startswith("model.layers.0.mlp.experts.down_proj")]
        assert note.endswith("expert 2 saw 0, expert 5 saw 0 tokens, too few: rounded to nearest")

    def test_all_tokens_reach_every_expert(self, data):
        model = lopsided()
        expected = seen_by_experts(model, lambda model: model(data, use_cache=False), everything=True)
        quantize(model, config("w8a8_static"), data, rare_experts="all_tokens", expert_tokens=data.numel())
        for name, module in quantized_modules(model).items():
            assert torch.allclose(module.input_scale, scales(expected[name])[0], rtol=1e-5)
        assert f"experts saw {data.numel()} to {data.numel()} tokens" in qcompile.report(model).notes[1]

    def test_nobody_sees_enough(self, data):
        for choice in ("all_tokens", "rtn"):
            with pytest.raises(CalibrationError, match="fewer than 9999"):
                quantize(lopsided(), config("w8a8_static"), data, rare_experts=choice, expert_tokens=9999)

    @pytest.mark.parametrize("option", [{"rare_experts": "skip"}, {"expert_tokens": 0}])
    def test_wrong_options(self, option, data):
        with pytest.raises(ConfigError, match=next(iter(option))):
            quantize(tiny_model(), {"scheme": "w8a8"}, data, **option)


class TestMethods:
    def test_a_clip_for_each_expert(self):
        model = quantize(tiny_moe("qwen3_moe"), config("w4a8_clip"), ids())
        for module in quantized_modules(model).values():
            assert module.alpha.shape == (8,)
            assert ((module.alpha > 0) & (module.alpha <= 1)).all()
        with torch.no_grad():
            assert torch.isfinite(model(ids(), use_cache=False).logits).all()

    def test_the_down_projection_is_shown_what_the_quantized_up_gives(self, monkeypatch):
        original, seen = GPTQ.quantize, []

        def quantize_one(self, weight, scheme, options, statistics=None, dtype=None):
            packed = original(self, weight, scheme, options, statistics)
            seen.append((weight, statistics, packed))
            return packed

        monkeypatch.setattr(GPTQ, "quantize", quantize_one)
        data = ids()
        model = quantize(tiny_moe("qwen3_moe"), config("w3a16_g32", "gptq"), data)
        assert len(seen) == 2 * 2 * 8
        for layer in (0, 1):
            ups, downs = seen[16 * layer : 16 * layer + 8], seen[16 * layer + 8 : 16 * layer + 16]
            rows = {}
            experts = model.model.layers[layer].mlp.experts

            def look(module, args, rows=rows):
                def note(i, given, ends):
                    rows[i] = given.tensor_split(ends[:-1].long())

                module.observed(*(a.reshape(-1, a.shape[-1]) for a in args), note)

            experts.register_forward_pre_hook(look)
            with torch.no_grad():
                model(data, use_cache=False)
            for projection, found in enumerate((ups, downs)):
                for expert, (weight, statistics, packed) in enumerate(found):
                    x = rows[projection][expert]
                    assert statistics.count == len(x)
                    assert torch.allclose(statistics.hessian, x.T @ x, rtol=1e-3, atol=1e-3)
                    module = (experts.up, experts.down)[projection]
                    assert torch.equal(module.packed().expert(expert).codes, packed.codes)
                    assert weight.shape == module.shape[1:]

    @pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
    def test_what_an_expert_sees_must_be_finite(self, projection):
        model = tiny_moe("qwen3_moe")
        with torch.no_grad():
            if projection == "down_proj":
                model.model.layers[1].mlp.experts.gate_up_proj.mul_(1e30)
            else:
                model.model.layers[1].post_attention_layernorm.weight.fill_(math.inf)
        with pytest.raises(
            CalibrationError, match=rf"layers.1.mlp.experts.{projection} in block model.layers.1 is NaN"
        ):
            quantize(model, config("w8a8_static"), ids())


def test_experts_are_packed_one_by_one():
    weights = [RTN.quantize(torch.randn(6, 16), Scheme.parse("w4a16_g8_asym"), {}) for _ in range(3)]
    together = PackedWeight.of_experts(weights)
    assert together.shape == (3, 6, 16)
    for index, weight in enumerate(weights):
        for name, tensor in together.expert(index).tensors().items():
            assert torch.equal(tensor, weight.tensors()[name])


def test_up_projections_know_how_far_their_inputs_have_drifted(monkeypatch):
    seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    original = Statistics.update

    def update(self, x, exact=None):
        if self.needs.drift and len(x):
            seen.append((x.clone(), exact))
        original(self, x, exact)

    monkeypatch.setattr(Statistics, "update", update)
    data = torch.arange(3, 131).reshape(8, 16)
    quantize = {"data": data, "sequence": 16, "expert_tokens": 1, "progress": False, "rare_experts": "rtn"}
    qcompile.quantize(tiny_moe("qwen3_moe"), config("w4a16_g32", "gptq"), **quantize)
    layers = [(x, exact) for x, exact in seen if exact is not None]
    assert 0 < len(layers) < len(seen)  # those of down projections are not known
    drifts = [(exact - x).abs().max().item() for x, exact in layers]
    first = drifts[: len(drifts) // 2]
    assert first == [0.0] * len(first)  # nothing was quantized before the first layer
    assert 0 < max(drifts) < 1
    assert all(exact.shape == x.shape for x, exact in layers)
