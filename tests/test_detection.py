"""What a folder holds: files by any name, pickles only when asked, fp8, and formats that are refused by name."""

import json
from pathlib import Path

import pytest
import torch
from helpers import logits, quantize_linears, tiny_model
from safetensors.torch import load_file, save_file

import qcompile
from qcompile import numerics
from qcompile.errors import FormatError, UnsupportedError
from qcompile.modules import quantized_modules


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small quantized Qwen3, and its folder."""
    torch.manual_seed(0)
    model = quantize_linears(tiny_model(), "w4a16_g32")
    folder = tmp_path_factory.mktemp("detection") / "w4"
    qcompile.save(model, folder, format="gptq")
    return model, folder


def change_config(folder: Path, **section) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = section
    (folder / "config.json").write_text(json.dumps(config))


# --------------------------------------------------------------------------------------------------------- file names


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g", "quant_model_weight_w8a8", "weights", "model-00001-of-00001"])
def test_one_file_of_any_name(name, copied, checkpoint):
    (copied / "model.safetensors").rename(copied / f"{name}.safetensors")
    assert torch.equal(logits(qcompile.load(copied)), logits(checkpoint[0]))


def split(folder: Path, *names: str) -> dict[str, torch.Tensor]:
    """Distribute the tensors of a folder over several files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for i, name in enumerate(names):
        save_file({n: t for j, (n, t) in enumerate(tensors.items()) if j % len(names) == i}, folder / name)
    return tensors


def test_a_numbered_series_needs_no_index(copied, checkpoint):
    split(copied, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert torch.equal(logits(qcompile.load(copied)), logits(checkpoint[0]))
    (copied / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match="missing"):
        qcompile.load(copied)


def test_several_files_need_an_index(copied, checkpoint):
    names = ("first.safetensors", "second.safetensors")
    tensors = split(copied, *names)
    with pytest.raises(FormatError, match=r"first\.safetensors, second\.safetensors, but no index that says which"):
        qcompile.load(copied)
    places = {n: names[i % 2] for i, n in enumerate(tensors)}
    (copied / "any.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(logits(qcompile.load(copied)), logits(checkpoint[0]))
    (copied / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(FormatError, match=r"several indexes: any\.safetensors"):
        qcompile.load(copied)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_read_when_asked(legacy, copied, checkpoint):
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(tensors, copied / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(FormatError, match=r"pickles \(pytorch_model\.bin\).*allow_pickle=True"):
        qcompile.load(copied)
    assert torch.equal(logits(qcompile.load(copied, allow_pickle=True)), logits(checkpoint[0]))
    assert len(qcompile.inspect(copied, allow_pickle=True).quantized) == 14
    first = dict(list(tensors.items())[::2])
    torch.save(first, copied / "pytorch_model-00001-of-00002.bin")
    torch.save({n: t for n, t in tensors.items() if n not in first}, copied / "pytorch_model-00002-of-00002.bin")
    places = {n: f"pytorch_model-0000{1 if n in first else 2}-of-00002.bin" for n in tensors}
    (copied / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(logits(qcompile.load(copied, allow_pickle=True)), logits(checkpoint[0]))


class Harmful:
    """What a malicious pickle may hold."""

    def __reduce__(self):
        return print, ("harm was done",)


@pytest.mark.parametrize("content", [Harmful(), {"x": Harmful()}, {"x": 3}, [torch.ones(3)]])
def test_pickles_of_anything_else_are_refused(content, copied, capsys):
    (copied / "model.safetensors").unlink()
    torch.save(content, copied / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin (is not a file of tensors alone|must hold tensors)"):
        qcompile.load(copied, allow_pickle=True)
    assert "harm" not in capsys.readouterr().out


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 3, None])
def test_an_index_that_points_outside_of_the_folder(place, copied):
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": place}}))
    with pytest.raises(FormatError, match="is not a safetensors file of this folder"):
        qcompile.load(copied)


def test_a_header_that_claims_more_than_the_file_holds(copied):
    for length in (2**63 - 1, 2**40, 100_000_001):
        (copied / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(FormatError, match="not a sound safetensors file"):
            qcompile.load(copied)
    entry = {"x": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
    header = json.dumps(entry).encode()
    (copied / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FormatError, match="not a sound safetensors file"):
        qcompile.load(copied)


# ------------------------------------------------------------------------------------------------------ other formats


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("bitsandbytes", r"weights of bitsandbytes \(nf4, int8\); load them with transformers"),
        ("torchao", "tensors of torchao"),
        ("quanto", "weights of optimum-quanto"),
        ("hqq", "weights of HQQ"),
        ("eetq", "weights of EETQ"),
        (
            "nothing-known",
            "'nothing-known' is not read; known formats: awq, cann-recipes, compressed-tensors, fp8, gptq",
        ),
    ],
)
def test_methods_that_are_not_read_are_named(method, says, copied):
    change_config(copied, quant_method=method)
    with pytest.raises(UnsupportedError, match=says):
        qcompile.inspect(copied)


@pytest.mark.parametrize(
    ("name", "owner"),
    [("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"), ("SCB", "bitsandbytes"), ("_weight_qdata", "torchao")],
)
def test_tensors_of_others_give_them_away(name, owner, copied):
    (copied / "quantize_config.json").unlink()
    config = json.loads((copied / "config.json").read_text())
    del config["quantization_config"]
    (copied / "config.json").write_text(json.dumps(config))
    tensors = load_file(copied / "model.safetensors")
    tensors[f"model.layers.0.mlp.up_proj.{name}"] = torch.zeros(3, dtype=torch.uint8)
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(UnsupportedError, match=f"'{owner}' is not read"):
        qcompile.inspect(copied)


# ------------------------------------------------------------------------------------------------------------ HF fp8


def fp8_folder(folder: Path, scheme: str, **section) -> dict[str, torch.Tensor]:
    """The folder of a small model with fp8 weights as transformers stores them, and the weights that they stand for."""
    model = tiny_model()
    model.save_pretrained(folder)
    tensors, weights = load_file(folder / "model.safetensors"), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed = numerics.quantize_weight(module.weight.detach().float(), qcompile.Scheme.parse(scheme))
            tensors[f"{name}.weight"] = packed.codes.view(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale_inv"] = packed.scales
            if section.get("activation_scheme") == "static":
                tensors[f"{name}.input_scale"] = torch.tensor(0.25)
            weights[name] = numerics.dequantize_packed(packed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quant_method="fp8", **section)
    return weights


@pytest.mark.parametrize(
    ("stored", "section", "scheme"),
    [
        ("wfp8a16_b64x32", {"weight_block_size": [64, 32], "activation_scheme": "dynamic"}, "wfp8afp8_b64x32"),
        ("wfp8a16_b64x32", {"weight_block_size": [64, 32], "activation_scheme": "static"}, "wfp8afp8_b64x32_static"),
        ("wfp8a16_tensor", {"activation_scheme": "static"}, "wfp8afp8_tensor_static"),
        ("wfp8a16_tensor", {"weight_block_size": None}, "wfp8afp8_tensor"),
    ],
)
def test_fp8_as_transformers_stores_it(stored, section, scheme, tmp_path):
    weights = fp8_folder(tmp_path / "fp8", stored, **section)
    model = qcompile.load(tmp_path / "fp8")
    modules = quantized_modules(model)
    assert modules.keys() == weights.keys()
    for name, weight in weights.items():
        packed = modules[name].packed()
        assert str(packed.scheme) == scheme
        assert torch.equal(numerics.dequantize_packed(packed), weight)
        assert packed.input_scale is None or packed.input_scale.tolist() == [0.25]
    with pytest.raises(UnsupportedError, match="fp8: it is only read; use compressed-tensors"):
        qcompile.save(model, tmp_path / "again", format="fp8")
    qcompile.save(model, tmp_path / "converted")
    assert torch.equal(logits(qcompile.load(tmp_path / "converted")), logits(model))


@pytest.mark.parametrize(
    ("section", "error", "says"),
    [
        ({"weight_block_size": [64]}, FormatError, r"weight_block_size must be \[rows, columns\], not \[64\]"),
        ({"weight_block_size": [64, 0]}, FormatError, "block sizes must be positive"),
        ({"weight_block_size": [64, 64]}, FormatError, r"weight_scale_inv is F32 \[2, 4\], but must be .* \[2, 2\]"),
        ({"activation_scheme": "other"}, UnsupportedError, "activation_scheme 'other'"),
        ({"fmt": "e5m2"}, UnsupportedError, "'e5m2' are not read"),
    ],
)
def test_fp8_configs_that_contradict_the_tensors(section, error, says, tmp_path):
    fp8_folder(tmp_path / "fp8", "wfp8a16_b64x32", **section)
    with pytest.raises(error, match=says):
        qcompile.inspect(tmp_path / "fp8")


def test_static_fp8_activations_without_a_scale(tmp_path):
    fp8_folder(tmp_path / "fp8", "wfp8a16_b64x32", weight_block_size=[64, 32])
    change_config(tmp_path / "fp8", quant_method="fp8", weight_block_size=[64, 32], activation_scheme="static")
    with pytest.raises(
        FormatError, match=r"input_scale is missing.*Missing in all: model\.layers\.0-1\.mlp\.down_proj\."
    ):
        qcompile.inspect(tmp_path / "fp8")
