"""The quality benchmark: its models, and its one measure of checkpoints whoever wrote them."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from moe_models import tiny_moe
from safetensors.torch import save_file

import qcompile
from qcompile import evaluation

FILE = Path(__file__).parent.parent / "benchmarks" / "quality.py"


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("quality", FILE)
    module = sys.modules["quality"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float checkpoint with its texts."""
    path = tmp_path_factory.mktemp("quality") / "model"
    torch.manual_seed(0)
    tiny_model(dtype=torch.float32).save_pretrained(path)
    ids = torch.randint(3, 150, (2, 256), dtype=torch.int16)
    save_file({"input_ids": ids.flatten()}, path / "heldout.safetensors")
    save_file({"input_ids": ids}, path / "calibration.safetensors")
    return path


def test_any_folder_is_scored_alike(quality, folder, tmp_path):
    windows, expected = quality.reference(folder)
    assert windows.shape == (2, 256)
    exact = quality.score(folder, windows, expected)
    assert exact.divergence < 1e-6
    model = qcompile.load(folder, progress=False)
    assert exact.perplexity == pytest.approx(evaluation.perplexity(model, windows), rel=1e-4)

    quality.quantize(folder, {"scheme": "w3a16_g32"}, tmp_path / "packed", 0)
    packed = quality.score(tmp_path / "packed", windows, expected)
    assert packed.divergence > 1e-4
    qcompile.dequantize(qcompile.load(tmp_path / "packed", progress=False)).save_pretrained(tmp_path / "floats")
    floats = quality.score(tmp_path / "floats", windows, expected)
    assert floats.divergence == pytest.approx(packed.divergence, rel=1e-3)


@pytest.mark.parametrize("make", [tiny_model, partial(tiny_moe, "qwen3_moe")])
def test_outliers_change_nothing_but_the_channels(quality, make):
    model = make(dtype=torch.float32)
    ids = torch.randint(3, 150, (2, 16))
    with torch.no_grad():
        before = model(ids).logits
        norm = model.model.layers[0].input_layernorm.weight.clone()
        quality.inject_outliers(model)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-4)
    assert (model.model.layers[0].input_layernorm.weight != norm).sum() == quality.OUTLIERS


def test_every_method_is_a_config(quality):
    for method in quality.METHODS.values():
        qcompile.QuantConfig(**method)


def test_a_method_that_refuses_a_scheme_is_a_line(quality, folder, monkeypatch, capsys):
    monkeypatch.setattr(quality, "prepare", lambda *_: folder)
    options = ["--models", "tiny_lm", "--schemes", "wmxfp4a16", "--methods", "gptq", "rtn"]
    monkeypatch.setattr(sys, "argv", ["quality.py", *options])
    quality.main()
    _, refused, rounded = capsys.readouterr().out.splitlines()[2:]
    assert "qcompile-gptq | refused: " in refused
    assert "not to mxfp4" in refused
    assert "qcompile-rtn | refused" not in rounded
