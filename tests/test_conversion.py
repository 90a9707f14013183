"""From one checkpoint format to another: the same numbers, or an error before anything is written."""

import contextlib
from pathlib import Path

import pytest
import torch
from helpers import TinyMLP, logits, quantize_linears, tiny_model
from safetensors.torch import load_file
from stored import golden
from typer.testing import CliRunner

import qcompile
from qcompile.cli import app
from qcompile.errors import ConfigError, QcompileError, UnsupportedError
from qcompile.modules import quantized_modules

FORMATS = ("compressed-tensors", "gptq", "gptq_v2", "awq", "modelslim")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A small Qwen2 (whose q, k and v have biases) in float16, int4 with zero points above 0."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("source") / "w4"
    qcompile.save(quantize_linears(tiny_model("qwen2", torch.float16), "w4a16_g32_asym"), folder)
    return folder


def numbers(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Codes, scales and the rest of every quantized weight of a checkpoint; zero points in the middle are left out."""
    modules = quantized_modules(qcompile.load(path, progress=False))
    packed = {name: module.packed() for name, module in modules.items()}
    all_ = {name: own.tensors() | own.activation_tensors() for name, own in packed.items()}
    middle = {n: {"input_zero": 0, "zeros": 2 ** (own.scheme.weight.bits - 1)} for n, own in packed.items()}
    return {
        n: {key: t for key, t in own.items() if key not in middle[n] or (t != middle[n][key]).any()}
        for n, own in all_.items()
    }


def assert_same_numbers(first: Path, second: Path) -> None:
    before, after = numbers(first), numbers(second)
    assert before.keys() == after.keys()
    for name, tensors in before.items():
        assert tensors.keys() == after[name].keys(), name
        for key, tensor in tensors.items():
            assert torch.equal(tensor.double(), after[name][key].double()), (name, key)


def converts(path: Path, out: Path, format: str) -> bool:
    """Whether ``path`` was converted; if not, nothing was written."""
    with contextlib.suppress(UnsupportedError):
        qcompile.convert(path, out, format=format, progress=False)
        return True
    assert not out.exists()
    assert not list(out.parent.glob(".*"))
    return False


@pytest.mark.parametrize("format", FORMATS)
def test_numbers_and_logits_stay(format, source, tmp_path):
    assert converts(source, tmp_path / "out", format) or format == "gptq"
    if format == "gptq":  # rounding may have made a zero point of 0, which it cannot store
        return
    assert_same_numbers(source, tmp_path / "out")
    before, after = (qcompile.load(path, progress=False) for path in (source, tmp_path / "out"))
    assert torch.equal(logits(before), logits(after))


@pytest.mark.parametrize(
    ("case", "expressed_by"),
    [
        ("gptq-v1-w4-g128-sym-moe", set(FORMATS)),
        ("awq-gemm-w4-g32-asym-moe", set(FORMATS) - {"gptq"}),
        ("gptq-v1-w4-g32-sym-descact", {"compressed-tensors", "gptq", "gptq_v2"}),
        ("gptq-v1-w3-g128-sym", {"compressed-tensors", "gptq", "gptq_v2"}),
        ("ct-w8a8-int8-static", {"compressed-tensors", "modelslim"}),
        ("ct-nvfp4", {"compressed-tensors"}),
        ("msm-w8a8-dynamic-moe", {"compressed-tensors", "modelslim"}),
        ("msm-w4a8-dynamic", {"compressed-tensors", "modelslim"}),
    ],
)
def test_goldens_convert_to_what_can_hold_them(case, expressed_by, tmp_path):
    path = golden(case)
    converted = {format for format in FORMATS if converts(path, tmp_path / format, format)}
    assert converted - {"gptq"} == expressed_by - {"gptq"}
    for format in converted:
        assert_same_numbers(path, tmp_path / format)


def test_there_and_back_again_is_the_same_file(source, tmp_path):
    qcompile.convert(source, tmp_path / "awq", format="awq", progress=False)
    qcompile.convert(tmp_path / "awq", tmp_path / "back", format="compressed-tensors", progress=False)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (tmp_path / "back" / "config.json").read_text() == (source / "config.json").read_text()


def test_a_float_checkpoint_has_nothing_to_convert(tmp_path):
    qcompile.save(tiny_model(), tmp_path / "float")
    with pytest.raises(ConfigError, match="is a float checkpoint: quantize it"):
        qcompile.convert(tmp_path / "float", tmp_path / "out", format="gptq")


def test_what_exists_is_kept_unasked(source, tmp_path):
    qcompile.convert(source, tmp_path / "out", format="awq", progress=False)
    with pytest.raises(ConfigError, match="exists"):
        qcompile.convert(source, tmp_path / "out", format="gptq_v2", progress=False)
    qcompile.convert(source, tmp_path / "out", format="gptq_v2", overwrite=True, progress=False)
    assert_same_numbers(source, tmp_path / "out")


def test_a_module_that_is_not_of_transformers(tmp_path):
    model = quantize_linears(TinyMLP().half(), "w4a16_g32_asym")
    qcompile.save(model, tmp_path / "mlp")
    with pytest.raises(ConfigError, match="pass the float module as model="):
        qcompile.convert(tmp_path / "mlp", tmp_path / "out", format="gptq_v2")
    qcompile.convert(tmp_path / "mlp", tmp_path / "out", format="gptq_v2", model=TinyMLP().half(), progress=False)
    loaded = qcompile.load(tmp_path / "out", model=TinyMLP().half(), progress=False)
    x = torch.randn(3, 64).half()
    assert torch.equal(loaded(x), model(x))


def test_the_command(source, tmp_path):
    run = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), "--format", "awq"])
    assert run.exit_code == 0, run.output
    assert_same_numbers(source, tmp_path / "out")
    refused = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "no"), "--format", "awk"])
    assert isinstance(refused.exception, QcompileError)
    assert "awk" in str(refused.exception)
