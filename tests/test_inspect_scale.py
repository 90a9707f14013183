"""A dry run of a checkpoint with 50,000 tensors: its files are headers over nothing, so that no data can be read."""

import json
import struct
from pathlib import Path

import pytest
from typer.testing import CliRunner

import qcompile
from qcompile.cli import app

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, GROUP = 48, 116, 2048, 768, 128
SIZES = {"I32": 4, "F16": 2}


def tensors() -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor of an AWQ checkpoint in the shape of Qwen3-30B-A3B, with 116 experts."""
    found: dict[str, tuple[str, list[int]]] = {}

    def linear(name: str, out: int, inn: int) -> None:
        found[f"{name}.qweight"] = ("I32", [inn, out // 8])
        found[f"{name}.qzeros"] = ("I32", [inn // GROUP, out // 8])
        found[f"{name}.scales"] = ("F16", [inn // GROUP, out])

    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, out, inn in (("q", 4096, HIDDEN), ("k", 512, HIDDEN), ("v", 512, HIDDEN), ("o", HIDDEN, 4096)):
            linear(f"{layer}.self_attn.{name}_proj", out, inn)
        for name, size in (("self_attn.q_norm", 128), ("self_attn.k_norm", 128), ("input_layernorm", HIDDEN)):
            found[f"{layer}.{name}.weight"] = ("F16", [size])
        found[f"{layer}.post_attention_layernorm.weight"] = ("F16", [HIDDEN])
        found[f"{layer}.mlp.gate.weight"] = ("F16", [EXPERTS, HIDDEN])
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj"):
                linear(f"{layer}.mlp.experts.{expert}.{name}", INTERMEDIATE, HIDDEN)
            linear(f"{layer}.mlp.experts.{expert}.down_proj", HIDDEN, INTERMEDIATE)
    found |= {f"{name}.weight": ("F16", [151936, HIDDEN]) for name in ("model.embed_tokens", "lm_head")}
    return found | {"model.norm.weight": ("F16", [HIDDEN])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight sparse files of 16 GB together that take no room on the disk."""
    from transformers import Qwen3MoeConfig

    path = tmp_path_factory.mktemp("dry") / "moe"
    path.mkdir()
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=EXPERTS, num_experts_per_tok=8, vocab_size=151936,
        tie_word_embeddings=False, architectures=["Qwen3MoeForCausalLM"], dtype="float16",
    )  # fmt: skip
    quantization = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    described = json.loads(config.to_json_string()) | {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(described))
    found, index = tensors(), {}
    names = list(found)
    for shard in range(8):
        file, header, offset = f"model-{shard + 1:05d}-of-00008.safetensors", {}, 0
        for name in names[shard * len(names) // 8 : (shard + 1) * len(names) // 8]:
            dtype, shape = found[name]
            size = SIZES[dtype] * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            offset, index[name] = offset + size, file
        text = json.dumps(header).encode()
        with (path / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + offset)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert len(found) > 50_000
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
