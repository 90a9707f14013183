"""Checkpoints of the shape of large models whose files are headers over nothing: sparse, and of no room on the disk."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SIZES = {"I32": 4, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F8_E4M3": 1}
Tensors = Mapping[str, tuple[str, list[int]]]


def write_headers(path: Path, config: Any, section: Mapping[str, Any] | None, tensors: Tensors, files: int = 8) -> Path:
    """A folder with config.json, ``files`` sparse files of these tensors (dtype, shape), and their index."""
    path.mkdir()
    described = json.loads(config.to_json_string())
    if section is not None:
        described["quantization_config"] = dict(section)
    (path / "config.json").write_text(json.dumps(described))
    names, index = list(tensors), {}
    for shard in range(files):
        file, header, offset = f"model-{shard + 1:05d}-of-{files:05d}.safetensors", {}, 0
        for name in names[shard * len(names) // files : (shard + 1) * len(names) // files]:
            dtype, shape = tensors[name]
            size = SIZES[dtype]
            for length in shape:
                size *= length
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            offset, index[name] = offset + size, file
        text = json.dumps(header).encode()
        with (path / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + offset)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def int8(name: str, out: int, inn: int) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    """A Linear of compressed-tensors with int8 weights and dynamic activations."""
    yield f"{name}.weight", ("I8", [out, inn])
    yield f"{name}.weight_scale", ("BF16", [out, 1])


def int8_section(ignore: list[str]) -> dict[str, Any]:
    """The quantization section of such a checkpoint."""
    from qcompile.formats._groups import describe
    from qcompile.types import Scheme

    group = describe(Scheme.parse("w8a8"), False, ["Linear"])
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "format": "int-quantized",
        "config_groups": {"group_0": group}, "ignore": ignore, "version": "0.18.0",
    }  # fmt: skip


def deepseek_v3(path: Path) -> Path:
    """DeepSeek-V3 (671 billion parameters) in w8a8: 61 layers, 256 experts, latent attention."""
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16", tie_word_embeddings=False)
    hidden, heads = config.hidden_size, config.num_attention_heads
    found: dict[str, tuple[str, list[int]]] = {}
    ignore = ["lm_head"]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        rope, nope = config.qk_rope_head_dim, config.qk_nope_head_dim
        attention = {
            "q_a_proj": (config.q_lora_rank, hidden), "q_b_proj": (heads * (nope + rope), config.q_lora_rank),
            "kv_a_proj_with_mqa": (config.kv_lora_rank + rope, hidden),
            "kv_b_proj": (heads * (nope + config.v_head_dim), config.kv_lora_rank),
            "o_proj": (hidden, heads * config.v_head_dim),
        }  # fmt: skip
        for name, (out, inn) in attention.items():
            found |= int8(f"{layer}.self_attn.{name}", out, inn)
        norms = {
            "input_layernorm": hidden, "post_attention_layernorm": hidden,
            "self_attn.q_a_layernorm": config.q_lora_rank, "self_attn.kv_a_layernorm": config.kv_lora_rank,
        }  # fmt: skip
        found |= {f"{layer}.{name}.weight": ("BF16", [size]) for name, size in norms.items()}
        dense = i < config.first_k_dense_replace
        owners = [("mlp", config.intermediate_size)] if dense else [
            *((f"mlp.experts.{e}", config.moe_intermediate_size) for e in range(config.n_routed_experts)),
            ("mlp.shared_experts", config.moe_intermediate_size * config.n_shared_experts),
        ]  # fmt: skip
        for owner, size in owners:
            for name, (out, inn) in {
                "gate_proj": (size, hidden),
                "up_proj": (size, hidden),
                "down_proj": (hidden, size),
            }.items():
                found |= int8(f"{layer}.{owner}.{name}", out, inn)
        if not dense:
            found[f"{layer}.mlp.gate.weight"] = ("BF16", [config.n_routed_experts, hidden])
            found[f"{layer}.mlp.gate.e_score_correction_bias"] = ("F32", [config.n_routed_experts])
    found |= {f"{name}.weight": ("BF16", [config.vocab_size, hidden]) for name in ("model.embed_tokens", "lm_head")}
    found["model.norm.weight"] = ("BF16", [hidden])
    return write_headers(path, config, int8_section(ignore), found, files=160)


def qwen3_235b(path: Path) -> Path:
    """Qwen3-235B-A22B in AWQ: 94 layers, 128 experts."""
    return qwen3_moe(path, layers=94, experts=128, hidden=4096, intermediate=1536, heads=64, files=40)


def qwen3_moe(path: Path, layers: int, experts: int, hidden: int, intermediate: int, heads: int, files: int) -> Path:
    """A mixture of experts of Qwen3 in AWQ, groups of 128: 4 key/value heads, 8 experts per token."""
    from transformers import Qwen3MoeConfig

    group, head = 128, 128
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=4, head_dim=head, num_experts=experts, num_experts_per_tok=8, vocab_size=151936,
        tie_word_embeddings=False, architectures=["Qwen3MoeForCausalLM"], dtype="float16",
    )  # fmt: skip
    found: dict[str, tuple[str, list[int]]] = {}

    def linear(name: str, out: int, inn: int) -> None:
        found[f"{name}.qweight"] = ("I32", [inn, out // 8])
        found[f"{name}.qzeros"] = ("I32", [inn // group, out // 8])
        found[f"{name}.scales"] = ("F16", [inn // group, out])

    wide, narrow = heads * head, 4 * head
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, out, inn in (("q", wide, hidden), ("k", narrow, hidden), ("v", narrow, hidden), ("o", hidden, wide)):
            linear(f"{layer}.self_attn.{name}_proj", out, inn)
        for name, size in (("self_attn.q_norm", head), ("self_attn.k_norm", head), ("input_layernorm", hidden)):
            found[f"{layer}.{name}.weight"] = ("F16", [size])
        found[f"{layer}.post_attention_layernorm.weight"] = ("F16", [hidden])
        found[f"{layer}.mlp.gate.weight"] = ("F16", [experts, hidden])
        for expert in range(experts):
            for name in ("gate_proj", "up_proj"):
                linear(f"{layer}.mlp.experts.{expert}.{name}", intermediate, hidden)
            linear(f"{layer}.mlp.experts.{expert}.down_proj", hidden, intermediate)
    found |= {f"{name}.weight": ("F16", [151936, hidden]) for name in ("model.embed_tokens", "lm_head")}
    found["model.norm.weight"] = ("F16", [hidden])
    section = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return write_headers(path, config, section, found, files)
