"""What users call: the numbers of every family, and results that can be copied, undone and told about."""

import copy
import io
import json
import weakref

import pytest
import torch
from helpers import TinyMLP, logits, relative_error, tiny_model
from torch import nn

import qcompile
from qcompile.backends.cpu import native
from qcompile.errors import ConfigError, TraceError
from qcompile.modules import QuantLinear, quantized_modules, replace_module, state_of
from qcompile.numerics import dequantize_packed
from qcompile.trace import bind
from qcompile.verify import close

FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "gemma3_text", "phi3", "glm4", "glm")
MIXED = {
    "scheme": "w4a16_g32",
    "rules": [
        {"match": "*.o_proj", "scheme": "w8a16"},
        {"match": "*.layers.1.mlp.down_proj", "scheme": "w4a16_g64_asym"},
    ],
}
DEPTH = 2
"""Each of the two decoder blocks may add a deviation of its own."""


def quantize(model: nn.Module, config="w4a16_g32", **more) -> nn.Module:
    return qcompile.quantize(model, config, progress=False, **more)


def quantized_mlp(config="w4a16_g32") -> nn.Module:
    return quantize(TinyMLP(), config, example_inputs=(x(),))


def x(rows: int = 3, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns)


def run(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(*inputs)


def with_reference_kernels(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that computes the same numbers by definition."""
    model = copy.deepcopy(model)
    for module in quantized_modules(model).values():
        reference = QuantLinear(module.packed(), module.bias, "cpu.reference", module.dtype)
        replace_module(model, module, reference)
    return model


class TestFamilies:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_equals_the_model_with_dequantized_weights(self, family):
        model = tiny_model(family)
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        float_logits, kind = logits(model), type(model)
        assert quantize(model, MIXED) is model
        assert type(model) is kind
        assert list(quantized_modules(model)) == [name for name in names if name != "lm_head"]
        assert {str(m.scheme) for m in quantized_modules(model).values()} == {"w4a16_g32", "w8a16", "w4a16_g64_asym"}

        result = logits(model)
        assert 0.01 < relative_error(result, float_logits) < 0.4  # random weights: far from zero, but the same model
        with torch.no_grad():
            assert torch.equal(bind(state_of(model).graph, model)(torch.arange(3, 27).view(2, 12)), result)
        restored = qcompile.dequantize(copy.deepcopy(model))
        assert type(restored) is kind
        assert [n for n, m in restored.named_modules() if type(m) is nn.Linear] == names
        assert close(result, logits(restored), factor=DEPTH)

    @pytest.mark.parametrize("family", ["qwen2", "phi3"])
    @pytest.mark.parametrize("kernel", ["native", "int_mm"])
    def test_integer_products_equal_their_definition(self, monkeypatch, family, kernel):
        if kernel != "native":
            monkeypatch.setattr(native, "unavailable", lambda: "no C++ compiler")
        elif reason := native.unavailable():
            pytest.skip(reason)
        model = quantize(tiny_model(family, torch.float32), "w8a8")
        assert {m.kernel for m in quantized_modules(model).values()} == {f"cpu.{kernel}"}
        assert close(logits(model), logits(with_reference_kernels(model)), factor=DEPTH)

    @pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a8"])
    def test_batch_and_left_padding_change_no_row(self, scheme):
        model = quantize(tiny_model("qwen3", torch.float32), scheme)
        rows = [torch.randint(3, 150, (length,)) for length in (12, 5, 1)]
        batch = torch.stack([torch.cat([torch.zeros(12 - len(row), dtype=torch.long), row]) for row in rows])
        padded = run(_Masked(model), batch)
        for row, together in zip(rows, padded, strict=True):
            alone = logits(model, row[None])[0]
            assert close(together[-len(row) :], alone, factor=DEPTH)

    def test_generate_works_as_before(self):
        model = quantize(tiny_model("llama", torch.float32), "w8a16")
        ids = torch.randint(3, 150, (2, 6))
        settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        expected = qcompile.dequantize(copy.deepcopy(model)).generate(ids, **settings)
        assert torch.equal(model.generate(ids, **settings), expected)


class _Masked(nn.Module):
    """A language model that ignores the padding token 0, with positions counted from the first real token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids):
        mask = (ids != 0).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


class TestHeads:
    @pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
    def test_a_tied_head_is_untied_when_it_is_quantized(self, family):
        model = tiny_model(family, tie_word_embeddings=True)
        embedding = model.get_input_embeddings().weight
        assert model.lm_head.weight is embedding
        before = embedding.detach().clone()
        config = {"scheme": "w4a16_g32", "rules": [{"match": "lm_head", "scheme": "w8a16"}]}
        plan = qcompile.plan(model, config)
        quantize(model, plan)
        assert str(model.lm_head.scheme) == "w8a16"
        assert type(model.get_input_embeddings()) is not QuantLinear
        assert model.get_input_embeddings().weight is embedding
        assert torch.equal(embedding, before)
        assert model.config.tie_word_embeddings is False
        assert qcompile.report(model).notes == (
            "lm_head shared its weight with model.embed_tokens.weight: each has its own now",
        )
        assert close(logits(model), logits(qcompile.dequantize(copy.deepcopy(model))), factor=DEPTH)

    def test_a_tied_head_that_stays_float_stays_tied(self):
        model = quantize(tiny_model(tie_word_embeddings=True))
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert model.config.tie_word_embeddings is True
        assert qcompile.report(model).notes == ()


class TestPlainModules:
    @pytest.mark.parametrize("tracing", ["export", "module_walk"])
    @pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "w8a8"])
    def test_a_linear_under_two_names_is_replaced_under_both(self, scheme, tracing):
        model, inputs = TinyMLP(), x()
        before = run(model, inputs)
        quantize(model, {"scheme": scheme, "tracing": tracing}, example_inputs=(inputs,))
        assert isinstance(model.first, QuantLinear)
        assert model.again is model.first
        assert relative_error(run(model, inputs), before) < 0.2
        restored = qcompile.dequantize(copy.deepcopy(model))
        assert type(restored.first) is nn.Linear
        assert restored.again is restored.first

    def test_two_linears_with_one_weight_become_two(self):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        model[1].weight = model[0].weight
        quantize(model, "w8a16", example_inputs=(x(),))
        assert qcompile.report(model).notes == ("1 shared its weight with 0.weight: each has its own now",)
        assert torch.equal(model[0].weight_0, model[1].weight_0)
        assert not torch.equal(model[0].bias, model[1].bias)

    def test_biases_and_training_modes_stay(self):
        model = TinyMLP()
        model.last.eval()
        bias = model.first.bias.detach().clone()
        quantize(model, example_inputs=(x(),))
        assert torch.equal(model.first.bias, bias)
        assert model.last.bias is None
        assert (model.training, model.first.training, model.last.training) == (True, True, False)
        restored = qcompile.dequantize(model)
        assert torch.equal(restored.first.bias, bias)
        assert (restored.first.training, restored.last.training) == (True, False)

    @pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 3, 64), (1, 1, 1, 64)])
    @pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a8"])
    def test_inputs_of_any_rank_and_of_no_rows(self, scheme, shape):
        model = quantize(nn.Sequential(nn.Linear(64, 24)), scheme, example_inputs=(x(),))
        result = run(model, torch.randn(shape))
        assert result.shape == (*shape[:-1], 24)
        assert result.isfinite().all()

    def test_a_parameter_product_and_an_uncalled_linear_stay_float_and_keep_working(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.called, self.uncalled = nn.Linear(64, 64), nn.Linear(64, 4)
                self.weight = nn.Parameter(torch.randn(64, 32))

            def forward(self, x):
                return self.called(x) @ self.weight

        model = quantize(Model(), example_inputs=(x(),))
        report = qcompile.report(model)
        reasons = {r.planned.site.name: r.planned.reason for r in report.sites if not r.quantized}
        assert reasons.keys() == {"weight", "uncalled"}
        assert "aten.matmul on a parameter of Model" in reasons["weight"]
        assert reasons["uncalled"] == "the traced forward never calls it"
        assert run(model, x()).shape == (3, 32)

    def test_a_walk_quantizes_what_cannot_be_exported(self):
        class Branches(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(64, 64)

            def forward(self, x):
                return self.linear(x) if x.sum() > 0 else x

        with pytest.raises(TraceError, match="module_walk"):
            quantize(Branches(), example_inputs=(x(),))
        model = quantize(Branches(), {"scheme": "w8a16", "tracing": "module_walk"})
        assert isinstance(model.linear, QuantLinear)
        assert state_of(model).graph is None
        assert run(model, x().abs()).shape == (3, 64)


class TestResults:
    @pytest.mark.parametrize("copied", ["deepcopy", "torch.save"])
    def test_copies_keep_results_and_report(self, copied):
        model = quantize(tiny_model("qwen3"), MIXED)
        if copied == "deepcopy":
            other = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert torch.equal(logits(other), logits(model))
        assert qcompile.report(other).to_dict() == qcompile.report(model).to_dict()
        assert not {id(t) for t in other.buffers()} & {id(t) for t in model.buffers()}
        with pytest.raises(ConfigError, match="already quantized"):
            quantize(other)

    def test_a_state_dict_goes_from_one_model_into_another(self):
        source, target = quantized_mlp(), quantized_mlp()
        inputs = x()
        assert not torch.equal(run(source, inputs), run(target, inputs))
        target.load_state_dict(source.state_dict())
        assert torch.equal(run(source, inputs), run(target, inputs))

    def test_dequantize_gives_the_weights_of_the_codes(self):
        model = quantized_mlp()
        expected = dequantize_packed(model.first.packed(), torch.float32)
        restored = qcompile.dequantize(model)
        assert restored is model
        assert torch.equal(restored.first.weight, expected)
        assert state_of(restored) is None
        assert not quantized_modules(restored)
        with pytest.raises(ConfigError, match="TinyMLP holds no quantized module"):
            qcompile.dequantize(restored)
        quantize(restored, example_inputs=(x(),))  # and again

    def test_print_and_report_tell_what_was_done(self):
        model = quantized_mlp({"scheme": "w4a16_g32", "rules": [{"match": "last", "scheme": "w8a8"}]})
        printed = str(model)
        assert "(first): QuantLinear(in_features=64, out_features=64, bias=True, scheme=w4a16_g32, kernel=" in printed
        assert "(last): QuantLinear(in_features=64, out_features=8, bias=False, scheme=w8a8, kernel=" in printed
        report = qcompile.report(model)
        assert report.coverage == 1.0
        assert [record.name for record in report.passes] == ["quantize_linear"]
        assert report.passes[0].matches == 2
        assert all(10 < result.sqnr < 60 for result in report.sites)
        for part in ("TinyMLP on cpu", "first", "last", "w8a8", "rule 'last'", "2 of 2 sites", "quantize_linear"):
            assert part in str(report)
        facts = json.loads(json.dumps(report.to_dict()))
        assert [site["name"] for site in facts["sites"]] == ["first", "last"]
        assert facts["coverage"] == 1.0

    def test_report_and_dequantize_need_a_quantized_model(self):
        with pytest.raises(ConfigError, match="TinyMLP was not quantized by qcompile"):
            qcompile.report(TinyMLP())
        with pytest.raises(ConfigError, match="TinyMLP holds no quantized module"):
            qcompile.dequantize(TinyMLP())

    def test_an_edited_plan_is_what_is_done(self):
        model = TinyMLP()
        plan = (
            qcompile.plan(model, "w4a16_g32", example_inputs=(x(),)).override("last", "w8a16").override("first", None)
        )
        quantize(model, plan, example_inputs=(x(),))
        assert type(model.first) is nn.Linear
        assert str(model.last.scheme) == "w8a16"
        assert qcompile.report(model).plan is plan

    def test_planning_touches_nothing(self):
        model = TinyMLP()
        before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
        qcompile.plan(model, "w8a8", example_inputs=(x(),))
        for name, parameter in model.named_parameters():
            assert id(parameter) == before[name][0]
            assert torch.equal(parameter, before[name][1])
        assert not hasattr(model, "_qcompile")


def test_a_quantized_model_can_be_collected():
    model = quantized_mlp()
    gone = weakref.ref(model)
    qcompile.report(model)
    del model
    assert gone() is None
