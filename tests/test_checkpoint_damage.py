"""Damaged checkpoints: an error that says what is wrong where, and nothing of theirs is run."""

import json
from pathlib import Path

import pytest
import torch
from helpers import change_config
from safetensors.torch import load_file, save_file
from stored import change

import qcompile
from qcompile import storage
from qcompile.errors import ConfigError, FormatError, UnsupportedError

INDEX = "model.safetensors.index.json"


SCALE, PACKED = "model.layers.0.mlp.up_proj.weight_scale", "model.layers.0.mlp.up_proj.weight_packed"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop(NORM), rf"missing: {NORM}"),
        (lambda t: t.pop(SCALE), rf"{SCALE} is missing"),
        (lambda t: t.pop(PACKED), rf"{PACKED} is missing"),
        (lambda t: [t.pop(n) for n in list(t) if "0.mlp.up_proj" in n], r"missing: model\.layers\.0\.mlp\.up_proj"),
        (lambda t: t.update(extra=torch.ones(1)), "unknown to Qwen3ForCausalLM or its format: extra"),
        (lambda t: t.update({NORM: torch.ones(64)}), rf"{NORM} is F32 \[64\], but must be float \[128\]"),
        (lambda t: t.update({NORM: t[NORM].to(torch.int32)}), rf"{NORM} is I32"),
        (lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}), rf"{NORM} is F8_E4M3"),
        (lambda t: t.update({SCALE: t[SCALE][:-1].clone()}), rf"{SCALE} is BF16 \[255, 4\]"),
        (lambda t: t.update({PACKED: t[PACKED].float()}), rf"{PACKED} is F32"),
        (lambda t: t[SCALE].fill_(float("nan")), rf"model\.safetensors: {SCALE} holds NaN"),
        (lambda t: t[SCALE][3, 1].fill_(float("inf")), rf"{SCALE} holds NaN or infinity"),
    ],
)
def test_damaged_tensors(edit, says, copied):
    change(copied, edit)
    with pytest.raises(FormatError, match=says) as error:
        qcompile.load(copied)
    assert str(copied) in str(error.value)
    if "NaN" not in says:  # that is in the data; the rest is known from the headers
        with pytest.raises(FormatError, match=says):
            qcompile.inspect(copied)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: cut(file, file.stat().st_size - 1),
        lambda file: cut(file, 100),
        lambda file: cut(file, 0),
        lambda file: file.write_bytes((2**63).to_bytes(8, "little") + file.read_bytes()[8:]),
        lambda file: file.write_bytes((10**9).to_bytes(8, "little") + file.read_bytes()[8:]),
        lambda file: file.write_bytes(file.read_bytes().replace(b'"shape"', b'"shapf"')),
        lambda file: file.write_bytes(file.read_bytes().replace(b"[128, 16]", b"[128, 99]")),
        lambda file: file.write_bytes(file.read_bytes() + b"more"),
        lambda file: file.write_bytes(b"\x80\x04pickle"),
    ],
)
def test_damaged_files(damage, copied):
    damage(copied / "model.safetensors")
    with pytest.raises(FormatError, match=r"copied/model\.safetensors is not a sound safetensors file"):
        qcompile.load(copied)


def test_a_file_that_shrinks_while_it_is_read(copied):
    with storage.Folder(copied) as folder:
        cut(copied / "model.safetensors", (copied / "model.safetensors").stat().st_size // 2)
        with pytest.raises(FormatError, match="was cut while it was read"):
            _ = [folder.read(name) for name in folder.headers]


def index_of(places: dict) -> str:
    return json.dumps({"weight_map": places})


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ({NORM: "../model.safetensors"}, "not a safetensors file of this folder"),
        ({NORM: "/etc/passwd"}, "not a safetensors file of this folder"),
        ({NORM: "model.bin"}, "not a safetensors file of this folder"),
        ({NORM: 3}, "not a safetensors file of this folder"),
        ({NORM: "gone.safetensors"}, r"gone\.safetensors is not a sound"),
        ({NORM: "model.safetensors"}, r"disagree about lm_head\.weight"),
        ({"nothing": "model.safetensors"}, "disagree about"),
        ({}, "has no weight_map"),
    ],
)
def test_a_damaged_index(places, says, copied):
    (copied / INDEX).write_text(index_of(places))
    if "model.safetensors" not in places.values():
        (copied / "model.safetensors").rename(copied / "hidden")
    with pytest.raises(FormatError, match=says):
        qcompile.load(copied)


def test_two_files_that_claim_the_same_tensor(copied):
    tensors = load_file(copied / "model.safetensors")
    save_file(tensors, copied / "a.safetensors")
    save_file({NORM: tensors[NORM]}, copied / "b.safetensors")
    (copied / INDEX).write_text(index_of(dict.fromkeys(tensors, "a.safetensors") | {NORM: "b.safetensors"}))
    with pytest.raises(FormatError, match=r"holds both model\.safetensors and model\.safetensors\.index\.json"):
        qcompile.load(copied)
    (copied / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=rf"a\.safetensors and its index disagree about {NORM}"):
        qcompile.load(copied)


def test_folders_that_are_no_checkpoints(copied, tmp_path):
    with pytest.raises(FormatError, match="nowhere is not a folder"):
        qcompile.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"empty holds no config\.json"):
        qcompile.load(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"neither a folder nor in the local hub cache.*allow_download"):
        qcompile.load("nobody/has-this-model")
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pickles \(pytorch_model\.bin\)"):
        qcompile.load(copied)
    (copied / "pytorch_model.bin").unlink()
    with pytest.raises(FormatError, match=r"holds neither model\.safetensors nor"):
        qcompile.load(copied)


def layers(count: int):
    return lambda c: c.update(num_hidden_layers=count, layer_types=["full_attention"] * count)


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (lambda c: c["quantization_config"].update(quant_method="hqq"), UnsupportedError, "method 'hqq' is not read"),
        (lambda c: c.update(model_type="unheard_of"), FormatError, "transformers cannot build"),
        (lambda c: c.update(hidden_size=-3), FormatError, "transformers cannot build|must be"),
        (lambda c: c.update(hidden_size=256), FormatError, "weight_packed is I32|must be"),
        (layers(3), FormatError, r"missing: model\.layers\.2"),
        (layers(1), (FormatError, UnsupportedError), r"model\.layers\.1"),
    ],
)
def test_a_damaged_config(edit, error, says, copied):
    change_config(copied, edit)
    with pytest.raises(error, match=says):
        qcompile.load(copied)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\udcff"])
def test_a_config_that_is_not_json(text, copied):
    (copied / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(FormatError, match=r"config\.json (is not readable JSON|must hold a JSON object)"):
        qcompile.load(copied)


def test_code_of_a_checkpoint_is_never_run(copied, tmp_path):
    (copied / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change_config(
        copied, lambda c: c.update(model_type="evil", auto_map={"AutoConfig": "modeling_evil.A"}, architectures=["A"])
    )
    with pytest.raises(FormatError, match="transformers cannot build"):
        qcompile.load(copied)
    assert not (tmp_path / "ran").exists()
