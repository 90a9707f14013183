"""AWQ and SmoothQuant: less is lost than by rounding, in any architecture; what cannot be scaled is said."""

import pytest
import torch
from helpers import logits, tiny_model
from moe_models import tiny_moe

import qcompile
from qcompile.errors import CalibrationError, ConfigError, UnsupportedError
from qcompile.methods import Reader
from qcompile.methods._ranges import encode, group_blocks, search_ranges
from qcompile.methods.awq import METHOD as AWQ
from qcompile.methods.smoothquant import METHOD as SMOOTHQUANT
from qcompile.modules import quantized_modules
from qcompile.numerics import dequantize_packed, quantize_weight
from qcompile.observers import Needs, Statistics
from qcompile.types import Scheme

OUTLIERS = torch.tensor([3, 40, 77, 101])


def statistics(x: torch.Tensor) -> Statistics:
    found = Statistics(Needs(rows=1000, hessian=True), x.shape[1])
    found.update(x)
    return found


def inputs(tokens: int = 400, features: int = 128) -> torch.Tensor:
    """Inputs of which four channels are large."""
    x = torch.randn(tokens, features)
    x[:, OUTLIERS] *= 30
    return x


def lost(x, weight, restored) -> float:
    return (x @ (restored - weight).T).square().sum().item()


def data(vocabulary: int = 150) -> torch.Tensor:
    return torch.randint(3, vocabulary, (8, 24))


def with_outliers(family: str = "qwen3", dtype=torch.float32, **changes):
    """A model in which a few channels of every norm are large and their readers small: plain rounding fails on it."""
    torch.manual_seed(0)
    make = tiny_moe if "moe" in family or family == "gpt_oss" else tiny_model
    model = make(family, dtype, **changes)
    offset = 1.0 if "gemma" in family else 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[OUTLIERS] = (parameter[OUTLIERS] + offset) * 20 - offset
    return model


def quantize(model, config, **more):
    return qcompile.quantize(
        model, config, **({"data": data(), "sequence": 24, "expert_tokens": 1, "progress": False} | more)
    )


class TestRanges:
    @pytest.mark.parametrize("name", ["w4a16_g32", "w3a16_g32_asym", "w2a16_g40", "w8a16"])
    def test_a_searched_range_is_never_worse_by_its_own_measure(self, name):
        weight_type, x, weight = Scheme.parse(name).weight, inputs(), torch.randn(24, 128)
        size = weight_type.group_size or 128
        blocks = group_blocks(x.T @ x, size)
        scales, zeros = search_ranges(weight, weight_type, torch.float32, blocks)
        codes = encode(weight, weight_type, scales, zeros).float()
        wide = lambda values: values.repeat_interleave(size, 1)[:, :128]  # noqa: E731
        found = (codes - wide(zeros)) * wide(scales) - weight
        plain = dequantize_packed(quantize_weight(weight, Scheme(weight_type)), torch.float32) - weight

        def measure(error):
            parts = torch.nn.functional.pad(error, (0, -128 % size)).unflatten(1, (-1, size))
            return torch.einsum("rgi,gij,rgj->rg", parts, blocks, parts)

        assert (measure(found) <= measure(plain) * (1 + 1e-4)).all()
        assert measure(found).sum() < 0.95 * measure(plain).sum()


class TestSearch:
    def test_awq_protects_what_meets_large_inputs(self):
        scheme, x, weight = Scheme.parse("w3a16_g64"), inputs(), torch.randn(64, 128)
        found = statistics(x)
        scale = AWQ.smooth([Reader(weight, scheme, found)], lambda s: s, {})
        assert scale[OUTLIERS].min() > 2 * scale.median()
        packed = quantize_weight(weight * scale, scheme)
        plain = quantize_weight(weight, scheme)
        assert lost(x, weight, dequantize_packed(packed) / scale) < 0.7 * lost(x, weight, dequantize_packed(plain))

    def test_smoothquant_makes_room_for_the_other_activations(self):
        scheme, x, weight = Scheme.parse("w8a8"), inputs(), torch.randn(64, 128)
        scale = SMOOTHQUANT.smooth([Reader(weight, scheme, statistics(x))], lambda s: s, {})
        assert scale[OUTLIERS].min() > 2 * scale.median()

    def test_nothing_is_scaled_where_nothing_helps(self):
        weight = torch.eye(32) * 7  # exact in 4 bits as it is
        assert (
            AWQ.smooth([Reader(weight, Scheme.parse("w4a16"), statistics(torch.ones(50, 32)))], lambda s: s, {}) is None
        )

    def test_readers_share_one_scale(self):
        readers = [Reader(torch.randn(16, 128), Scheme.parse("w4a16_g32"), statistics(inputs(n))) for n in (100, 300)]
        assert AWQ.smooth(readers, lambda s: s, {}).shape == (128,)


class TestModels:
    @pytest.mark.parametrize(
        ("family", "config", "most"),
        [
            ("qwen3", {"scheme": "w3a16_g64_asym", "method": "awq"}, 0.7),
            ("gemma3_text", {"scheme": "w3a16_g64", "method": "awq", "options": {"rounding": "gptq"}}, 0.7),
            ("qwen3_moe", {"scheme": "w3a16_g64", "method": "awq"}, 0.7),
            ("qwen3", {"scheme": "w8a8", "method": "smoothquant"}, 0.3),
            ("qwen3", {"scheme": "w4a8_static", "method": "smoothquant", "options": {"rounding": "gptq"}}, 0.5),
        ],
    )
    def test_nearer_to_the_float_model_than_rounding(self, family, config, most):
        ids, losses = data(), {}
        for method in ("rtn", config["method"]):
            model = with_outliers(family)
            expected = logits(model, ids)
            own = config if method != "rtn" else {"scheme": config["scheme"]}
            quantize(model, own, data=ids)
            losses[method] = (logits(model, ids) - expected).square().mean().item()
            assert qcompile.report(model).coverage == 1.0
        assert losses[config["method"]] < most * losses["rtn"]
        notes = qcompile.report(model).notes
        assert any("values were scaled, and what makes them divided" in note for note in notes)

    def test_the_story_in_bfloat16(self, tmp_path):
        model = quantize(tiny_model(), "awq", device="cpu")
        assert {str(module.scheme) for module in quantized_modules(model).values()} == {"w4a16_g128_asym"}
        assert all(module.packed().scales.dtype == torch.bfloat16 for module in quantized_modules(model).values())
        qcompile.save(model, tmp_path / "saved")
        assert torch.equal(logits(qcompile.load(tmp_path / "saved", progress=False)), logits(model))
        plan = qcompile.plan(tiny_model(), "awq", device="npu")
        assert all(planned.kernel.startswith("npu.") and planned.method == "awq" for planned in plan.quantized)

    def test_what_cannot_be_scaled_is_reported_with_the_reason(self):
        model = quantize(with_outliers("gpt_oss"), {"scheme": "w4a16_g32", "method": "awq"})
        (note,) = [note for note in qcompile.report(model).notes if "was not scaled" in note]
        assert "experts.down_proj was not scaled: the experts compute silu" in note
        walked = quantize(tiny_model(), {"scheme": "w4a16_g32", "method": "awq", "tracing": "module_walk"})
        assert any("without a graph nothing is known" in note for note in qcompile.report(walked).notes)

    def test_float_readers_of_a_scaled_value_are_scaled(self):
        """The router and a Linear that a rule leaves float read what is divided."""
        rules = [{"match": "*.k_proj", "scheme": "float"}, {"match": "*.v_proj", "scheme": "w8a16", "method": "rtn"}]
        model, ids = with_outliers("qwen3_moe"), data()
        expected = logits(model, ids)
        config = {"scheme": "w8a16_g32", "method": "awq", "rules": rules}
        quantize(model, config, data=ids)
        error = (logits(model, ids) - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.median() < 0.02  # some tokens are routed to other experts than before


class TestBadInput:
    @pytest.mark.parametrize(
        ("method", "options", "message"),
        [
            ("awq", {"clip": "yes"}, "must be one of .*not 'yes'"),
            ("awq", {"clip": 1}, "must be one of .*not 1"),
            ("awq", {"duo": True}, "no option 'duo'. Known: scaling, clip, rounding"),
            ("smoothquant", {"alpha": 0.5}, "no option 'alpha'"),
        ],
    )
    def test_wrong_options(self, method, options, message):
        with pytest.raises(ConfigError, match=message):
            qcompile.QuantConfig(scheme="w8a8", method=method, options=options)

    def test_schemes_that_do_not_fit_are_refused_by_the_plan(self):
        with pytest.raises(UnsupportedError, match="'smoothquant': its activations are float"):
            qcompile.plan(tiny_model(), {"scheme": "w4a16", "method": "smoothquant"})
        with pytest.raises(UnsupportedError, match="'awq': it rounds to integers, not to fp8"):
            qcompile.plan(tiny_model(), {"scheme": "wfp8afp8", "method": "awq"})

    def test_no_data(self):
        with pytest.raises(CalibrationError, match=r"method 'awq' .* is made from what these sites read"):
            quantize(tiny_model(), "awq", data=None)

    def test_activations_that_are_not_finite_name_the_block(self):
        model = tiny_model()
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[5] = torch.inf
        with pytest.raises(CalibrationError, match=r"q_proj in block model.layers.1 is NaN or infinite"):
            quantize(model, "awq")


class TestRepeats:
    CONFIG = {"scheme": "w4a8_static", "method": "awq"}  # noqa: RUF012

    def codes(self, **more):
        torch.manual_seed(0)
        model = with_outliers("qwen3_moe", torch.bfloat16, num_experts=4)
        quantize(model, self.CONFIG, data=torch.arange(3, 3 + 8 * 16).view(8, 16), sequence=16, **more)
        found = {f"{n}.{k}": t for n, m in quantized_modules(model).items() for k, t in m.packed().tensors().items()}
        return found | {n: p.clone() for n, p in model.named_parameters()}

    def test_an_interrupted_run_and_two_threads_give_the_same_codes(self, tmp_path, monkeypatch):
        from qcompile.resume import ResumeFolder

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        expected, save = self.codes(), ResumeFolder.save

        def interrupted(self, *rest):
            if self.done == 3:  # in the middle of a block whose scales have been folded
                raise KeyboardInterrupt
            save(self, *rest)

        try:
            with monkeypatch.context() as patch:
                patch.setattr(ResumeFolder, "save", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    self.codes(resume=tmp_path)
            torch.set_num_threads(2)
            found = self.codes(resume=tmp_path)
        finally:
            torch.set_num_threads(threads)
        assert found.keys() == expected.keys()
        assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []
