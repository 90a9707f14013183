"""AutoRound: what whole blocks compute is nearer to the float model than after rounding, with stored weights alone."""

import pytest
import torch
from helpers import logits, tiny_model
from moe_models import tiny_moe

import qcompile
from qcompile.errors import ConfigError, UnsupportedError
from qcompile.methods.autoround import METHOD, _Learned
from qcompile.modules import quantized_modules
from qcompile.numerics import dequantize_packed
from qcompile.resume import ResumeFolder
from qcompile.types import Scheme

DATA = torch.arange(3, 3 + 8 * 16).view(8, 16)


def made(family: str):
    torch.manual_seed(0)
    return tiny_model(family, torch.float32) if "moe" not in family else tiny_moe(family)


def quantize(model, config, **more):
    more = {"data": DATA, "sequence": 16, "expert_tokens": 1, "progress": False} | more
    return qcompile.quantize(model, config, **more)


def config(scheme: str = "w3a16_g64", steps: int = 15, **more):
    return {"scheme": scheme, "method": "autoround", "options": {"steps": steps}} | more


@pytest.mark.parametrize("name", ["w4a16_g32", "w3a16_g24_asym", "w2a16", "w4a16_asym"])
def test_what_is_stored_is_what_was_learned(name):
    learned = _Learned(torch.randn(2, 12, 100), Scheme.parse(name), torch.bfloat16)
    learned.offsets.uniform_(-1, 1)
    learned.factors.uniform_(-0.2, 0.2)
    packed = learned.packed()
    assert packed.scales.dtype == torch.bfloat16
    torch.testing.assert_close(dequantize_packed(packed, torch.float32), learned.weight(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["w4a16_g32", "w3a16_g24_asym"])
def test_gradients_are_those_of_the_formula(name):
    learned, wanted = _Learned(torch.randn(8, 80), Scheme.parse(name), torch.float32), torch.randn(8, 80)
    with torch.no_grad():
        learned.offsets.uniform_(-1, 1)
        learned.factors.uniform_(-0.3, 0.3)
    for tensor in learned.parameters:
        tensor.requires_grad_(True)
    found = torch.autograd.grad((learned.weight() * wanted).sum(), learned.parameters)
    scales, zeros = (learned.scales * (1 + learned.factors))[..., None], learned.zeros[..., None]
    places = learned.groups / scales + learned.offsets
    places = places + (places.round() - places).detach() + zeros
    weight = ((places.clamp(0, learned.top) - zeros) * scales).flatten(1)[:, :80]
    assert torch.equal(weight, learned.weight())
    for one, other in zip(found, torch.autograd.grad((weight * wanted).sum(), learned.parameters), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("family", "scheme"), [("qwen3", "w3a16_g64"), ("qwen3_moe", "w4a8_asym")])
def test_nearer_to_the_float_model_than_rounding(family, scheme):
    losses = {}
    for method in ("rtn", "autoround"):
        model = made(family)
        expected = logits(model, DATA)
        quantize(model, config(scheme) if method == "autoround" else {"scheme": scheme})
        losses[method] = (logits(model, DATA) - expected).square().mean().item()
        assert qcompile.report(model).coverage == 1.0
    assert losses["autoround"] < 0.8 * losses["rtn"]


def test_an_interrupted_block_is_not_learned_again(tmp_path, monkeypatch):
    def tensors(model):
        named = quantized_modules(model).items()
        return {f"{name}.{key}": t for name, m in named for key, t in m.packed().tensors().items()}

    settings = config(steps=3, rules=[{"match": "*.k_proj", "scheme": "w4a16", "method": "gptq"}])
    expected, save = tensors(quantize(made("qwen3"), settings)), ResumeFolder.save

    def interrupted(self, *rest):
        if self.done == 2:
            raise KeyboardInterrupt
        save(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ResumeFolder, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(made("qwen3"), settings, resume=tmp_path)
    blocks, tune = [], type(METHOD).tune
    monkeypatch.setattr(
        type(METHOD), "tune", lambda self, block, options: blocks.append(block) or tune(self, block, options)
    )
    found = tensors(quantize(made("qwen3"), settings, resume=tmp_path))
    assert len(blocks) == 1  # the second one
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("options", [{"steps": -1}, {"steps": 0.5}, {"rate": True}, {"iters": 3}])
def test_wrong_options(options):
    with pytest.raises(ConfigError, match=r"of method 'autoround' must be|no option"):
        qcompile.QuantConfig(method="autoround", options=options)


def test_activations_with_stored_parameters_are_refused_by_the_plan():
    with pytest.raises(UnsupportedError, match="learns with dynamic activations"):
        qcompile.plan(tiny_model(), {"scheme": "w8a8_static", "method": "autoround"})
