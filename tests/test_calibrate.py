"""Calibration: what is seen of every site's inputs, in which order, and what follows from it."""

import math

import pytest
import torch
from helpers import TinyMLP, logits, relative_error, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from qcompile.passes.share_activation_quant import ShareActivationQuant
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import qcompile
from qcompile.errors import CalibrationError
from qcompile.methods.rtn import RoundToNearest
from qcompile.modules import quantized_modules, state_of
from qcompile.numerics import dequantize_activation, quantize_activation
from qcompile.observers import Needs, Statistics, search_clip, static_parameters
from qcompile.segments import Segments
from qcompile.trace import trace
from qcompile.types import ActivationType, Scheme

STATIC = ActivationType.parse("8_static")


def ids(rows: int = 6, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 150, (rows, length))


def quantize(model: nn.Module, config="w8a8_static", **more) -> nn.Module:
    return qcompile.quantize(model, config, progress=False, **more)


def inputs_of(model: nn.Module, *inputs: torch.Tensor, **named: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every Linear of a float model reads, by hooks."""
    seen: dict[str, list] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].clone()))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(*inputs, **named)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


class TestStatistics:
    @given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 12))
    def test_it_does_not_matter_how_tokens_come(self, lengths, rows):
        x = torch.randn(sum(lengths), 5, generator=torch.Generator().manual_seed(0))
        found = Statistics(Needs(hessian=True, rows=rows), 5)
        for part in x.split(lengths):
            found.update(part[None])
        assert found.count == len(x)
        if not len(x):
            assert not found.is_finite
            assert found.rows.shape == (0, 5)
            return
        assert torch.equal(found.low, x.amin(0))
        assert torch.equal(found.high, x.amax(0))
        assert torch.allclose(found.hessian, x.T @ x, atol=1e-4)
        kept = [x[:: 2**power] for power in range(10)]
        assert any(torch.equal(found.rows, every) for every in kept)
        assert min(rows, len(x)) <= len(found.rows) < max(2 * rows, 2)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_stays_visible(self, value):
        found = Statistics(Needs(ranges=True), 2)
        for x in ([[1.0, 2.0]], [[1.0, value]], [[3.0, 1.0]]):
            found.update(torch.tensor(x))
        assert not found.is_finite

    def test_needs_are_united(self):
        assert not Needs()
        assert Needs(rows=3) | Needs(ranges=True, rows=2) == Needs(ranges=True, rows=3)
        assert Needs(hessian=True) | Needs(sequential=True) == Needs(hessian=True, sequential=True)


class TestStaticParameters:
    @given(st.floats(-1e4, 1e4), st.floats(0, 1e4), st.sampled_from(["8_static", "8_static_sym"]))
    def test_everything_seen_is_within_half_a_step(self, low, width, name):
        kind = ActivationType.parse(name)
        x = torch.tensor([low, low + width / 3, low + width])
        found = static_parameters(x.min(), x.max(), kind)
        scale = found["input_scale"]
        assert scale.shape == (1,)
        assert scale.dtype == torch.float32
        parameters = [scale]
        if not kind.symmetric:
            parameters.append(found["input_zero"])
            assert found["input_zero"].dtype == torch.int32
            assert -128 <= found["input_zero"].item() <= 127
        codes = quantize_activation(x, kind, parameters)
        restored = dequantize_activation([*codes, *parameters], kind)
        # half a step, and the rounding of the zero point at either end
        assert ((restored - x).abs() <= (1 - 0.499 * kind.symmetric) * scale.double() * 1.0001).all()
        assert (
            dequantize_activation([*quantize_activation(torch.zeros(1), kind, parameters), *parameters], kind).item()
            == 0
        )

    def test_the_formula_of_the_range(self):
        found = static_parameters(torch.tensor(-1.0), torch.tensor(4.1), STATIC)
        assert found["input_scale"].item() == pytest.approx(5.1 / 255)
        assert found["input_zero"].item() == -128 + 50
        assert static_parameters(torch.tensor(2.0), torch.tensor(5.1), STATIC)["input_zero"].item() == -128
        symmetric = static_parameters(torch.tensor(-6.35), torch.tensor(4.1), ActivationType.parse("8_static_sym"))
        assert symmetric["input_scale"].item() == pytest.approx(0.05)
        small_floats = static_parameters(torch.tensor(-6.72), torch.tensor(4.1), ActivationType.parse("fp8_static"))
        assert small_floats["input_scale"].item() == pytest.approx(6.72 / 448)
        assert symmetric.keys() == small_floats.keys() == {"input_scale"}

    @pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38])
    def test_next_to_nothing_has_a_scale(self, value):
        for kind in (STATIC, ActivationType.parse("8_static_sym")):
            scale = static_parameters(torch.tensor(-value), torch.tensor(value), kind)["input_scale"]
            assert scale.item() > 0
            assert torch.isfinite(1 / scale).all()


class TestClip:
    KIND = ActivationType.parse("8_clip")

    def packed(self, weight: torch.Tensor):
        return RoundToNearest().quantize(weight, Scheme.parse("w4a16"), {})

    def test_outliers_that_do_not_count_are_clipped(self):
        rows, weight = torch.randn(64, 32), torch.randn(16, 32)
        packed = self.packed(weight)
        assert search_clip(rows, weight, packed, self.KIND) > 0.8
        rows[:, 3] = 300.0  # quantizes the rest to nearly nothing
        weight[:, 3] = 0.0
        alpha = search_clip(rows, weight, self.packed(weight), self.KIND)
        assert 0 < alpha < 0.5

    def test_it_is_written_into_the_model(self):
        model = quantize(tiny_model(), "w4a8_clip", data=ids(), sequence=24)
        for module in quantized_modules(model).values():
            assert module.alpha.shape == (1,)
            assert 0 < module.alpha.item() <= 1
        assert relative_error(logits(model), logits(tiny_model())) > 0  # it runs


class TestSegments:
    @pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "phi3", "glm4"])
    def test_sites_read_what_the_model_gives_them(self, family):
        model = tiny_model(family, torch.float32)
        traced, batch = trace(model), ids(3, 20)
        expected = inputs_of(model, input_ids=batch, use_cache=False)
        for finely in (False, True):
            segments = Segments(traced.graph, model, [site.name for site in traced.sites], finely=finely)
            seen, looked = {}, {}
            values = segments.start((batch,))
            for part in segments.parts:
                segments.look(part, values, lambda name, x, *_, looked=looked: looked.setdefault(name, x))
                values = segments.run(part, values, lambda name, x, *_, seen=seen: seen.setdefault(name, x))
            assert not values
            assert seen.keys() == looked.keys() == expected.keys()
            assert all(torch.equal(x, expected[name]) and torch.equal(x, looked[name]) for name, x in seen.items())

    def test_a_part_is_a_block(self):
        model = tiny_model(tie_word_embeddings=True)
        traced = trace(model)
        parts = Segments(traced.graph, model, [site.name for site in traced.sites]).parts
        assert [(part.name, len(part.sites)) for part in parts] == [
            ("model.layers.0", 7), ("model.layers.1", 7), ("", 1)
        ]  # fmt: skip

    def test_a_fine_part_reads_one_thing(self):
        model = tiny_model()
        traced = trace(model)
        parts = Segments(traced.graph, model, [site.name for site in traced.sites], finely=True).parts
        sites = [(part.name, [site.rpartition(".")[2][:-5] for site in part.sites]) for part in parts]
        block = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
        assert sites == [*((f"model.layers.{i}", names) for i in (0, 1) for names in block), ("", ["lm"])]

    def test_a_site_that_is_called_twice_is_in_one_part(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        model.append(model[0])
        x = torch.randn(3, 8)
        traced = trace(model, (x,))
        segments = Segments(traced.graph, model, ["0", "2"])
        (part,) = segments.parts
        seen = []
        segments.run(part, segments.start((x,)), lambda name, *_: seen.append(name))
        assert seen == ["0", "2", "0"]

    def test_what_is_written_in_place_can_be_run_again(self):
        class InPlace(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

            def forward(self, x):
                x = x * 1
                for layer in self.layers:
                    view = x[:, :4]
                    view.add_(1)
                    x.mul_(2)
                    x.add_(layer(x))
                return x

        model, x = InPlace(), torch.randn(3, 8)
        expected = {name: value.clone() for name, value in inputs_of(model, x).items()}
        traced = trace(model, (x,))
        segments = Segments(traced.graph, model, [site.name for site in traced.sites])
        values = segments.start((x,))
        for part in segments.parts:
            segments.run(part, values)
            seen = {}
            values = segments.run(part, values, lambda name, x, *_, seen=seen: seen.update({name: x.clone()}))
            assert all(torch.equal(value, expected[name]) for name, value in seen.items())


class TestStatic:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_scales_are_those_of_what_was_seen(self, dtype):
        model, data = tiny_model("qwen3", dtype), ids()
        seen = inputs_of(model, input_ids=data, use_cache=False)
        quantize(model, data=data, sequence=24)
        modules = quantized_modules(model)
        assert len(modules) == 14
        for name, module in modules.items():
            expected = static_parameters(seen[name].min(), seen[name].max(), STATIC)
            assert torch.equal(module.input_scale, expected["input_scale"])
            assert torch.equal(module.input_zero, expected["input_zero"])

    def test_sites_that_read_the_same_share_the_very_tensors(self):
        modules = quantized_modules(quantize(tiny_model(), data=ids(), sequence=24))
        for part in ("self_attn", "mlp"):
            for layer in (0, 1):
                names = [n for n in modules if f".{layer}.{part}." in n and n[-6] not in "on"]
                (first, *others) = [modules[n] for n in names]
                assert len(others) in (1, 2)
                assert all(m.input_scale is first.input_scale and m.input_zero is first.input_zero for m in others)
        assert len({id(module.input_scale) for module in modules.values()}) == 8

    def test_the_graph_quantizes_what_is_shared_once(self):
        model = quantize(tiny_model(), data=ids(), sequence=24)
        graph = state_of(model).graph
        assert ShareActivationQuant()(graph).matches == 2 * 3

    def test_it_is_near_the_dynamic_one(self):
        data = ids()
        expected = logits(tiny_model(dtype=torch.float32), data)
        torch.manual_seed(0)
        errors = {}
        for scheme in ("w8a8", "w8a8_static", "w8a8_static_sym"):
            torch.manual_seed(0)
            ids()
            model = quantize(tiny_model(dtype=torch.float32), scheme, data=data, sequence=24)
            errors[scheme] = relative_error(logits(model, data), expected)
        assert errors["w8a8"] < errors["w8a8_static"] < 0.1
        assert errors["w8a8_static_sym"] < 0.1

    def test_some_sites_only(self):
        rules = [{"match": "*.layers.0.mlp.*", "scheme": "w8a8_static"}]
        model = tiny_model()
        seen = inputs_of(model, input_ids=(data := ids()), use_cache=False)
        quantize(model, {"scheme": "w4a16_g32", "rules": rules}, data=data, sequence=24)
        modules = quantized_modules(model)
        assert {name for name, module in modules.items() if hasattr(module, "input_scale")} == {
            f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
        }
        low, high = seen["model.layers.0.mlp.down_proj"].float().aminmax()  # of the float model
        scale = modules["model.layers.0.mlp.down_proj"].input_scale
        assert scale.item() == pytest.approx(((high - low) / 255).item())

    def test_results_are_in_the_plans_order_and_the_data_is_told(self):
        model = quantize(tiny_model(), data=ids(5), sequence=24)
        report = qcompile.report(model)
        assert [r.planned for r in report.sites] == list(report.plan)
        assert report.notes == ("calibrated on 5 sequences of 24 tokens",)
        assert report.coverage == 1.0
        assert "calibrated on 5 sequences" in str(report)

    @pytest.mark.parametrize("tracing", ["export", "module_walk"])
    def test_other_models(self, tracing):
        model, data = TinyMLP(), [torch.randn(n, 64) for n in (3, 5)]
        seen = [inputs_of(model, x) for x in data]
        config = {"scheme": "w8a8_static", "tracing": tracing}
        quantize(model, config, example_inputs=(data[0],), data=data)
        for name, module in quantized_modules(model).items():
            x = torch.cat([inputs[name] for inputs in seen])
            assert torch.equal(module.input_scale, static_parameters(x.min(), x.max(), STATIC)["input_scale"])
        assert qcompile.report(model).notes[0] == "calibrated on 2 sets of inputs"

    def test_a_walk_leaves_the_model_in_its_mode(self):
        model = tiny_model("llama").train()
        model.model.norm.eval()
        quantize(model, {"scheme": "w8a8_static", "tracing": "module_walk"}, data=ids(), sequence=24)
        assert model.training
        assert not model.model.norm.training
        assert len(quantized_modules(model)) == 14


class TestOrder:
    """What a method is given, and when float weights go."""

    @pytest.fixture
    def seen(self, monkeypatch):
        """Statistics that the method was called with, in order; it asks for inputs of the quantized model."""
        seen = []
        original = RoundToNearest.quantize

        def quantize(self, weight, scheme, options, statistics=None, dtype=None):
            seen.append(statistics)
            return original(self, weight, scheme, options)

        monkeypatch.setattr(RoundToNearest, "quantize", quantize)
        return seen

    def test_sequential_inputs_come_from_quantized_blocks(self, seen, monkeypatch):
        data = ids()
        monkeypatch.setattr(RoundToNearest, "needs", lambda *_: Needs(hessian=True, rows=1000, sequential=True))
        model = quantize(tiny_model(dtype=torch.float32), "w4a16", data=data, sequence=24)
        floats = inputs_of(tiny := tiny_model(dtype=torch.float32), input_ids=data, use_cache=False)
        del tiny
        names = list(quantized_modules(model))
        by_name = dict(
            zip([r.planned.site.name for r in qcompile.report(model).sites if r.quantized], seen, strict=True)
        )
        assert set(by_name) == set(names)
        first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
        assert by_name[first] is by_name[first.replace("q_", "v_")]
        assert by_name[first].count == data.numel()
        assert by_name[first].rows.shape == (data.numel(), 128)
        captured = []
        hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
            lambda _, args: captured.append(args[0])
        )
        logits(model, data)
        hook.remove()
        assert torch.equal(by_name[second].rows, captured[0].flatten(0, 1))
        assert floats.keys() >= by_name.keys()

    def test_otherwise_they_come_from_the_float_model(self, seen, monkeypatch):
        data = ids()
        monkeypatch.setattr(RoundToNearest, "needs", lambda *_: Needs(rows=1000))
        model = tiny_model(dtype=torch.float32)
        floats = inputs_of(model, input_ids=data, use_cache=False)
        quantize(model, "w4a16", data=data, sequence=24)
        for planned, statistics in zip(qcompile.report(model).plan.quantized, seen, strict=True):
            assert torch.equal(statistics.rows, floats[planned.site.name].flatten(0, 1))

    @pytest.mark.parametrize("method", ["rtn", "gptq"])
    def test_float_weights_of_finished_parts_are_gone(self, method, monkeypatch):
        model = tiny_model()
        references = {
            f"model.{name}".removesuffix(".weight"): StorageWeakRef(parameter.untyped_storage())
            for name, parameter in model.model.named_parameters()
            if name.endswith("proj.weight")
        }
        seen, original = [], Segments._run

        def run(self, part, nodes, computed, values, observe, **more):
            done = [site for earlier in self.parts[: self.parts.index(part)] for site in earlier.sites]
            seen.append((len(done), [site for site in done if not references[site].expired()]))
            return original(self, part, nodes, computed, values, observe, **more)

        monkeypatch.setattr(Segments, "_run", run)
        quantize(model, {"scheme": "w8a8_static", "method": method}, data=ids(), sequence=24)
        assert {alive == [] for _, alive in seen} == {True}
        assert max(count for count, _ in seen) == (13 if method == "gptq" else 7)

    def test_codes_are_the_same_with_any_number_of_threads(self):
        threads, results = torch.get_num_threads(), []
        data = ids(8, 32)
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                torch.manual_seed(0)
                model = quantize(tiny_model("llama"), "w4a8_static", data=data, sequence=32)
                results.append([m.packed() for m in quantized_modules(model).values()])
        finally:
            torch.set_num_threads(threads)
        for a, b in zip(*results, strict=True):
            tensors = a.tensors() | a.activation_tensors()
            others = b.tensors() | b.activation_tensors()
            assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


class TestBadInput:
    def test_no_data(self):
        model = tiny_model()
        with pytest.raises(CalibrationError, match=r"q_proj and 13 more .* scheme w8a8_static .* Pass data="):
            quantize(model)
        assert not quantized_modules(model)
        with pytest.raises(CalibrationError, match=r"^first cannot be quantized"):
            quantize(TinyMLP(), {"scheme": "w8a16", "rules": [{"match": "first", "scheme": "w8a8_static"}]},
                     example_inputs=(torch.randn(3, 64),))  # fmt: skip

    def test_no_data_while_compiling(self, fresh_dynamo):
        model = torch.compile(tiny_model(), backend="qcompile", options={"config": "w8a8_static"})
        with pytest.raises(Exception, match="Quantize before compiling"):
            logits(model)

    def test_data_that_nobody_needs(self):
        model = quantize(tiny_model(), "w8a8", data=object())
        assert "data was not read" in qcompile.report(model).notes[0]

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_activations_that_are_not_finite(self, value):
        model = tiny_model()
        with torch.no_grad():
            model.model.layers[1].post_attention_layernorm.weight[3] = value
        message = r"input of model.layers.1.mlp.gate_proj in block model.layers.1 is NaN or infinite"
        with pytest.raises(CalibrationError, match=message):
            quantize(model, data=ids(), sequence=24)
        assert state_of(model) is None
        with pytest.raises(qcompile.errors.ConfigError, match="already quantized"):
            quantize(model, data=ids(), sequence=24)

    def test_a_site_that_is_never_reached(self):
        class Unused(TinyMLP):
            def __init__(self) -> None:
                super().__init__()
                self.unused = nn.Linear(4, 4)

        config = {"scheme": "w8a8_static", "tracing": "module_walk"}
        with pytest.raises(CalibrationError, match="unused was never reached"):
            quantize(Unused(), config, example_inputs=(x := torch.randn(3, 64),), data=x)
