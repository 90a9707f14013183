"""Wrong models, configs, plans and devices: each a clear error, raised before a weight is touched."""

import dataclasses
import re

import pytest
import torch
from helpers import TinyMLP
from torch import nn

import qcompile
from qcompile.errors import CalibrationError, ConfigError, PassError, TraceError, UnsupportedError
from qcompile.modules import quantized_modules


def quantize(model: nn.Module, config="w4a16_g32", **more) -> nn.Module:
    return qcompile.quantize(model, config, progress=False, **more)


def x() -> torch.Tensor:
    return torch.randn(3, 64)


def quantized_mlp() -> nn.Module:
    return quantize(TinyMLP(), example_inputs=(x(),))


def compiled_mlp() -> nn.Module:
    return torch.compile(TinyMLP())


def mlp_compiled_in_place() -> nn.Module:
    model = TinyMLP()
    model.compile()
    return model


def mlp_with_a_compiled_part() -> nn.Module:
    return nn.Sequential(torch.compile(TinyMLP()))


def loaded_by_a_quantizer() -> nn.Module:
    model = TinyMLP()
    model.hf_quantizer = type("BnbQuantizer", (), {})()
    return model


def with_value(value: float) -> nn.Module:
    model = TinyMLP()
    with torch.no_grad():
        model.last.weight[3, 5] = value
    return model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("rtm", "unknown preset 'rtm'. Did you mean 'rtn'?"),
        ("w4a16_g0", "group size must be positive, not 0"),
        ("w4a16_g-32", "group size must be positive, not -32"),
        ("w1a16", "weight bits must be 2 to 8, not 1"),
        ("w9a16", "weight bits must be 2 to 8, not 9"),
        ("w8a3", "activation bits must be 4 or 8"),
        ({"schema": "w8a16"}, "unknown option 'schema'. Did you mean 'scheme'?"),
        ({"options": {"observr": "mse"}}, "no option 'observr'"),
        ({"rules": [{"match": "frist", "scheme": "w8a16"}]}, "'frist' matches no site. Did you mean 'first'?"),
        ({"scheme": "float"}, "nothing would be quantized"),
        (None, "a config is a preset's name, a QuantConfig, a dict or a path"),
        (4, "not int"),
    ],
)
def test_a_wrong_config(config, message):
    model = TinyMLP()
    for function in (qcompile.plan, qcompile.quantize):
        with pytest.raises(ConfigError, match=re.escape(message)):
            function(model, config, example_inputs=(x(),))
    assert not quantized_modules(model)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: "Qwen/Qwen3-0.6B", ConfigError, "not str 'Qwen/Qwen3-0.6B'; load it first"),
        (dict, ConfigError, "expected a torch.nn.Module, not dict"),
        (lambda: TinyMLP, ConfigError, "expected a torch.nn.Module, not type"),
        (lambda: nn.Sequential(nn.ReLU()), ConfigError, "its graph has no Linear layer"),
        (lambda: nn.Linear(64, 8), ConfigError, "wrap it, as in nn.Sequential(linear)"),
        (quantized_mlp, ConfigError, "TinyMLP is already quantized (first and 1 more)"),
        (compiled_mlp, ConfigError, "this model is already compiled: quantize first, then torch.compile"),
        (mlp_compiled_in_place, ConfigError, "this model is already compiled"),
        (mlp_with_a_compiled_part, ConfigError, "0 is already compiled"),
        (loaded_by_a_quantizer, ConfigError, "TinyMLP was loaded by transformers with BnbQuantizer"),
        (lambda: TinyMLP().to("meta"), CalibrationError, "first.weight is on the meta device: load the weights"),
        (lambda: with_value(float("nan")), CalibrationError, "last.weight holds NaN or infinite values"),
        (lambda: with_value(float("-inf")), CalibrationError, "last.weight holds NaN or infinite values"),
        (lambda: TinyMLP().double(), ConfigError, "its weight is torch.float64, not bfloat16, float16 or float32"),
    ],
)
def test_a_wrong_model(make, error, message):
    model = make()
    before = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    dtype = getattr(next(iter(model.parameters()), None), "dtype", None) if before else None
    with pytest.raises(error, match=re.escape(message)):
        quantize(model, example_inputs=(x().to(dtype or torch.float32),))
    after = dict(model.named_modules()) if before else {}
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_a_device_that_is_not_there_is_told_before_the_model_is_traced():
    untraceable = nn.Sequential(nn.Linear(64, 64))
    for function in (qcompile.plan, qcompile.quantize):
        with pytest.raises(UnsupportedError, match="no backend for device 'tpu:0'"):
            function(untraceable, "w8a16", device="tpu:0")


def test_a_plain_module_without_example_inputs():
    with pytest.raises(TraceError, match=r"pass example_inputs=\(tensor, \.\.\.\)"):
        quantize(TinyMLP())


def test_a_plan_of_another_model_names_the_site():
    plan = qcompile.plan(TinyMLP(), example_inputs=(x(),))
    for other in (TinyMLP(128), TinyMLP().bfloat16()):
        inputs = torch.randn(3, other.first.in_features, dtype=other.first.weight.dtype)
        with pytest.raises(ConfigError, match="the plan was made for another model: its site first is"):
            quantize(other, plan, example_inputs=(inputs,))
        assert not quantized_modules(other)
    with pytest.raises(ConfigError, match=r"another model: its site first .*this model's is None"):
        quantize(nn.Sequential(nn.Linear(64, 8)), plan, example_inputs=(x(),))


def test_a_plan_for_a_device_that_is_gone():
    model = TinyMLP()
    plan = dataclasses.replace(qcompile.plan(model, example_inputs=(x(),)), device="npu:7")
    with pytest.raises(UnsupportedError, match="device 'npu:7'"):
        quantize(model, plan, example_inputs=(x(),))


def test_coverage_below_the_plan_names_the_sites(monkeypatch):
    monkeypatch.setattr("qcompile.api.replace_module", lambda model, old, new: None)
    with pytest.raises(UnsupportedError, match="planned but not quantized in the model: first, last"):
        quantize(TinyMLP(), example_inputs=(x(),))


def test_a_site_that_the_graph_lacks_is_named(monkeypatch):
    monkeypatch.setattr("qcompile.rewriting.module_name", lambda node: "")
    with pytest.raises(PassError, match=r"quantize_linear matched 0 of 2: first: no linear node .*; last: no"):
        quantize(TinyMLP(), example_inputs=(x(),))
