"""A dry run of a checkpoint with 50,000 tensors: its files are headers over nothing, so that no data can be read."""

import json
import struct
from pathlib import Path

import pytest
from big_headers import qwen3_moe
from typer.testing import CliRunner

import qcompile
from qcompile.cli import app

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 48, 116, 2048, 768


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """AWQ in the shape of Qwen3-30B-A3B, with 116 experts: sparse files of 16 GB that take no room on the disk."""
    path = tmp_path_factory.mktemp("dry") / "moe"
    qwen3_moe(path, LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, heads=32, files=8)
    assert len(json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]) > 50_000
    return path


def test_every_site_is_planned(folder):
    plan = qcompile.inspect(folder)
    assert len(plan) == LAYERS * 6 + 1
    assert len(plan.quantized) == LAYERS * 6
    experts = plan["model.layers.47.mlp.experts.gate_up_proj"].site
    assert (experts.shape, experts.role) == ((EXPERTS, 2 * INTERMEDIATE, HIDDEN), "experts")
    assert 0.25 < plan.bytes_after / plan.bytes_before < 0.3


def test_a_missing_scale_is_found(folder):
    index = folder / "model-00003-of-00008.safetensors"
    with index.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        stream.seek(0)
        text = stream.read(8 + length)
    index_json = folder / "model.safetensors.index.json"
    before = index_json.read_text()
    lost = next(name for name, file in json.loads(before)["weight_map"].items() if file == index.name)
    try:
        renamed = text.replace(json.dumps(lost).encode(), json.dumps(lost[:-1] + "x").encode(), 1)
        with index.open("r+b") as stream:
            stream.write(renamed)
        index_json.write_text(before.replace(json.dumps(lost), json.dumps(lost[:-1] + "x"), 1))
        run = CliRunner().invoke(app, ["inspect", str(folder)])
        assert run.exit_code == 1
        assert lost.rpartition(".")[0] in str(run.exception)
    finally:
        with index.open("r+b") as stream:
            stream.write(text)
        index_json.write_text(before)
