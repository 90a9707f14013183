"""Whole checkpoints as tools write them beside the goldens: recipes of CANN, fp8 of DeepSeek, mixtures of types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import logits, quantize_linears, relative_error, tiny_model
from moe_models import tiny_moe
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import qcompile
from qcompile import numerics
from qcompile.errors import FormatError, UnsupportedError
from qcompile.modules import quantized_modules

TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def rewrite(folder: Path, edit, section: dict | None = None) -> None:
    """Let ``edit`` change the dict of a folder's tensors, and replace the quantization section."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if section is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))


# ------------------------------------------------------------------------------------ experts of the CANN recipes, w4a8


def recipe_folder(folder: Path, *, clip: bool) -> dict[str, float]:
    """A Qwen3-MoE as the recipes' converter writes it, in float32; returns the clip of each down_proj.

    Linears are W8A8. Of an expert, 4-bit codes of the rows 2 r and 2 r + 1 share byte [r, i]; the scales are float32
    numbers in the lower half of int64 ones; ``bias`` is 8 * sum(W), which corrects the hardware's split of int8.
    """
    model = tiny_moe("qwen3_moe")
    config = {"scheme": "w8a8", "rules": [{"match": "experts", "scheme": "w4a8"}]}
    qcompile.save(qcompile.quantize(model, config, progress=False), folder)
    alphas: dict[str, float] = {}

    def convert(tensors: dict[str, Tensor]) -> None:
        for name in [
            n.removesuffix(".weight") for n, t in tensors.items() if ".experts." in n and t.dtype == torch.int8
        ]:
            codes, scales = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
            assert int(codes.abs().max()) <= 8
            tensors[f"{name}.weight"] = (codes[0::2] & 15) | (codes[1::2] << 4)
            tensors[f"{name}.weight_scale"] = scales.flatten().view(torch.int32).to(torch.int64)
            tensors[f"{name}.bias"] = 8 * (codes * scales).sum(1)
            if clip and name.endswith("down_proj"):
                alphas[name] = 0.5 + len(alphas) / 64
                tensors[f"{name}.alpha"] = torch.tensor(alphas[name])

    int8, int4 = ({"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"} for bits in (8, 4))
    section = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": int8, "input_activations": TOKEN},
            "group_1": {
                "targets": ["MoEGMM"], "weights": int4, "input_activations": TOKEN, "activation_use_clip": clip,
            },
        },
    }  # fmt: skip
    rewrite(folder, convert, section)
    return alphas


def recipe_forward(block, packed: dict, x: Tensor, alphas: dict[str, float]) -> Tensor:
    """The experts' forward that such checkpoints are made for, token by token and in float32."""

    def quantized(row: Tensor, limit: Tensor) -> Tensor:
        scale = limit / 127
        return torch.round(row.clamp(-limit, limit) / scale).clamp(-128, 127) * scale

    _, weights, chosen = block.gate(x)
    up, down = (numerics.dequantize_packed(packed[name]) for name in ("gate_up_proj", "down_proj"))
    result = torch.zeros_like(x)
    for t, row in enumerate(x):
        for weight, e in zip(weights[t], chosen[t].tolist(), strict=True):
            gate, value = (up[e] @ quantized(row, row.abs().max())).chunk(2)
            y = F.silu(gate) * value
            alpha = alphas[e] if alphas else 1.0
            result[t] += weight * (down[e] @ quantized(y, alpha * y.abs().max()))
    return result


@pytest.mark.parametrize("clip", [True, False])
@torch.no_grad()
def test_recipes_with_clipped_activations(clip, tmp_path):
    alphas = recipe_folder(tmp_path / "recipe", clip=clip)
    model = qcompile.load(tmp_path / "recipe", progress=False)
    schemes = {n.rpartition(".")[2]: str(m.scheme) for n, m in quantized_modules(model).items()}
    assert schemes["gate_up_proj"] == "w4a8"
    assert schemes["down_proj"] == ("w4a8_clip" if clip else "w4a8")
    assert schemes["q_proj"] == "w8a8"

    block = model.model.layers[1].mlp
    packed = {name: block.experts.get_submodule(name).packed() for name in ("gate_up_proj", "down_proj")}
    own = [alpha for name, alpha in alphas.items() if "layers.1." in name]
    x = torch.randn(6, 128)
    expected = recipe_forward(block, packed, x, own)
    assert relative_error(block(x[None])[0], expected) < 1e-4
    if clip:
        assert packed["down_proj"].alpha.tolist() == pytest.approx(own)
        assert relative_error(expected, recipe_forward(block, packed, x, [])) > 0.01  # the clip does something


@pytest.mark.parametrize("clip", [True, False])
def test_recipes_are_written_and_converted(clip, tmp_path):
    recipe_folder(tmp_path / "recipe", clip=clip)
    model = qcompile.load(tmp_path / "recipe", progress=False)
    expected = logits(model)
    qcompile.save(model, tmp_path / "saved")
    qcompile.convert(tmp_path / "recipe", tmp_path / "converted", format="compressed-tensors", progress=False)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "converted"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    for name in ("saved", "converted"):
        assert torch.equal(logits(qcompile.load(tmp_path / name, progress=False)), expected)
    for format in ("gptq", "gptq_v2", "awq", *(["modelslim"] if clip else [])):
        with pytest.raises(UnsupportedError, match=r"cannot be converted to .*; use"):
            qcompile.convert(tmp_path / "recipe", tmp_path / format, format=format, progress=False)
        assert not (tmp_path / format).exists()
    if not clip:
        qcompile.convert(tmp_path / "recipe", tmp_path / "modelslim", format="modelslim", progress=False)
        assert torch.equal(logits(qcompile.load(tmp_path / "modelslim", progress=False)), expected)


@pytest.mark.parametrize("clip", [True, False])
def test_recipes_are_written_in_their_own_layout(clip, tmp_path):
    recipe_folder(tmp_path / "recipe", clip=clip)
    model = qcompile.load(tmp_path / "recipe", progress=False)
    qcompile.save(model, tmp_path / "saved", format="cann-recipes")
    qcompile.convert(tmp_path / "recipe", tmp_path / "converted", format="cann-recipes", progress=False)
    before = load_file(tmp_path / "recipe" / "model.safetensors")
    for name in ("saved", "converted"):
        after = load_file(tmp_path / name / "model.safetensors")
        assert before.keys() == after.keys()
        for own, tensor in before.items():
            same = torch.allclose if own.endswith("bias") else torch.equal  # sums, in another order
            assert after[own].dtype == tensor.dtype
            assert same(after[own].view(tensor.shape), tensor), own
        groups = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["config_groups"]
        assert [group["targets"] for group in groups.values()] == [["Linear"], ["MoEGMM"]]
        assert groups["group_1"]["activation_use_clip"] == clip
        assert torch.equal(logits(qcompile.load(tmp_path / name, progress=False)), logits(model))


def test_what_recipes_cannot_express(tmp_path):
    for scheme, says in {"w4a16_g32": "it stores w8a8", "w4a8": "is no expert and w4a8"}.items():
        model = quantize_linears(tiny_model(), scheme)
        with pytest.raises(UnsupportedError, match=says):
            qcompile.save(model, tmp_path / "saved", format="cann-recipes")
        assert not (tmp_path / "saved").exists()


def test_recipes_whose_clips_are_not_all_there(tmp_path):
    recipe_folder(tmp_path / "recipe", clip=True)
    one = "model.layers.0.mlp.experts.3.down_proj.alpha"
    rewrite(tmp_path / "recipe", lambda tensors: tensors.pop(one))
    with pytest.raises(UnsupportedError, match=r"must have one scheme, but .*experts\.3\.down_proj is w4a8"):
        qcompile.inspect(tmp_path / "recipe")
    rewrite(tmp_path / "recipe", lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith("alpha")])
    with pytest.raises(
        FormatError, match=r"'group_1' says activation_use_clip, but no module of it has a stored alpha"
    ):
        qcompile.inspect(tmp_path / "recipe")


# ------------------------------------------------------------------------------------------------------ fp8 of DeepSeek


def fp8_weights(tensors: dict[str, Tensor], names: list[str], block: int) -> None:
    """Replace float weights by fp8 ones in square blocks, as the files of DeepSeek-V3 hold them."""
    for name in names:
        scheme = qcompile.Scheme.parse(f"wfp8a16_b{block}x{block}")
        packed = numerics.quantize_weight(tensors[f"{name}.weight"].float(), scheme)
        tensors[f"{name}.weight"] = packed.codes.view(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale_inv"] = packed.scales


def test_deepseek_with_a_layer_that_predicts_further_tokens(tmp_path):
    """Layer 61 of DeepSeek-V3 predicts a second token; transformers leaves it out, quantized or not."""
    model = tiny_moe("deepseek_v3", torch.bfloat16)
    model.save_pretrained(tmp_path / "fp8")
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    kept = ("mlp.gate.weight", "embed_tokens.weight", "lm_head.weight")
    names = [n.removesuffix(".weight") for n, t in tensors.items() if t.dim() == 2 and not n.endswith(kept)]

    def quantize(tensors: dict[str, Tensor]) -> None:
        further = {n: t for n, t in tensors.items() if n.startswith("model.layers.1.")}
        tensors |= {n.replace("layers.1.", "layers.61."): t.clone() for n, t in further.items()}
        tensors["model.layers.61.eh_proj.weight"] = torch.zeros(128, 256, dtype=torch.bfloat16)
        fp8_weights(tensors, [*names, *(n.replace("layers.1.", "layers.61.") for n in names if "layers.1." in n)], 32)

    section = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [32, 32],
        "scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    rewrite(tmp_path / "fp8", quantize, section)
    loaded = qcompile.load(tmp_path / "fp8", progress=False)
    assert any(
        "not part of the model" in note and "model.layers.61" in note for note in qcompile.report(loaded).plan.notes
    )
    assert {str(p.scheme) for p in qcompile.report(loaded).plan.quantized} == {"wfp8afp8_b32x32"}
    stored, last = load_file(tmp_path / "fp8" / "model.safetensors"), "model.layers.1.mlp.experts.7.down_proj"
    expected = stored[f"{last}.weight"].float() * stored[f"{last}.weight_scale_inv"].repeat_interleave(
        32, 0
    ).repeat_interleave(32, 1)
    packed = loaded.get_submodule("model.layers.1.mlp.experts.down_proj").packed()
    assert torch.equal(numerics.dequantize_packed(packed.expert(7)), expected)
    with pytest.warns(UserWarning, match=r"left out, for they are no part of the model: model\.layers\.61"):
        qcompile.convert(tmp_path / "fp8", tmp_path / "ct", format="compressed-tensors", progress=False)
    assert torch.equal(logits(qcompile.load(tmp_path / "ct", progress=False)), logits(loaded))


# ------------------------------------------------------------------------------------------------ gpt-oss in MXFP4


def gpt_oss_folder(folder: Path):
    """A small gpt-oss as OpenAI stores it; the float model with what transformers makes of the same bytes."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = tiny_moe("gpt_oss")
    model.save_pretrained(folder)
    fused = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            for own in ("gate_up_proj", "down_proj"):
                experts, inn, rows = getattr(module, own).shape
                blocks = torch.randint(0, 256, (experts, rows, inn // 32, 16), dtype=torch.uint8)
                scales = torch.randint(120, 126, (experts, rows, inn // 32), dtype=torch.uint8)
                fused |= {f"{name}.{own}_blocks": blocks, f"{name}.{own}_scales": scales}
                weight = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
                getattr(module, own).data.copy_(weight.view(experts, inn, rows))

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            del tensors[name]
        tensors |= fused

    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    rewrite(folder, pack, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    return model


def test_gpt_oss(tmp_path):
    model = gpt_oss_folder(tmp_path / "oss")
    loaded = qcompile.load(tmp_path / "oss", progress=False)
    assert {n.rpartition(".")[2]: str(m.scheme) for n, m in quantized_modules(loaded).items()} == {
        "gate_up_proj": "wmxfp4a16", "down_proj": "wmxfp4a16",
    }  # fmt: skip
    assert relative_error(logits(loaded), logits(model)) < 1e-5
    qcompile.convert(tmp_path / "oss", tmp_path / "ct", format="compressed-tensors", progress=False)
    assert torch.equal(logits(qcompile.load(tmp_path / "ct", progress=False)), logits(loaded))
    qcompile.save(loaded, tmp_path / "saved")
    assert torch.equal(logits(qcompile.load(tmp_path / "saved", progress=False)), logits(loaded))
    with pytest.raises(UnsupportedError, match="mxfp4: it is only read; use compressed-tensors"):
        qcompile.save(loaded, tmp_path / "again", format="mxfp4")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t, n: t.pop(f"{n}_scales"), r"gate_up_proj_scales is missing, but .*gate_up_proj_blocks is there"),
        (
            lambda t, n: t.update({f"{n}_blocks": t[f"{n}_blocks"][:, :, :, :8].clone()}),
            r"U8 \[8, 128, 4, 8\], but must",
        ),
        (lambda t, n: t[f"{n}_scales"].fill_(255), "gate_up_proj_scales holds NaN"),
    ],
)
def test_damaged_gpt_oss(edit, says, tmp_path):
    gpt_oss_folder(tmp_path / "oss")
    rewrite(tmp_path / "oss", lambda tensors: edit(tensors, "model.layers.1.mlp.experts.gate_up_proj"))
    with pytest.raises(FormatError, match=says):
        qcompile.load(tmp_path / "oss", progress=False)


# ----------------------------------------------------------------------------------- compressed-tensors of other times


def test_zero_points_that_early_versions_stored_of_symmetric_numbers(tmp_path):
    qcompile.save(quantize_linears(tiny_model(), "w8a8"), tmp_path / "old")
    section = json.loads((tmp_path / "old" / "config.json").read_text())["quantization_config"]
    section["config_groups"]["group_0"]["input_activations"] = TOKEN | {"dynamic": False, "strategy": "tensor"}

    def add(suffix: str, value: Tensor):
        def edit(tensors: dict[str, Tensor]) -> None:
            for name, scale in [(n, t) for n, t in tensors.items() if n.endswith(".weight_scale")]:
                shape = scale.shape if suffix.startswith("weight") else ()
                tensors[name.replace("weight_scale", suffix)] = value.expand(shape).clone()

        return edit

    rewrite(tmp_path / "old", add("input_scale", torch.tensor(0.05)), section)
    expected = logits(qcompile.load(tmp_path / "old", progress=False))
    rewrite(tmp_path / "old", add("input_zero_point", torch.tensor(0, dtype=torch.int8)))
    rewrite(tmp_path / "old", add("weight_zero_point", torch.tensor(0, dtype=torch.int8)))
    assert torch.equal(logits(qcompile.load(tmp_path / "old", progress=False)), expected)
    name = "model.layers.0.mlp.up_proj.weight_zero_point"
    rewrite(tmp_path / "old", lambda tensors: tensors[name][0].fill_(1))
    with pytest.raises(FormatError, match=rf"{name} is not zero, but config\.json says that weights are symmetric"):
        qcompile.load(tmp_path / "old", progress=False)


def test_a_block_that_is_ignored_as_a_whole(tmp_path):
    """By its name without ``re:``, which the package itself takes for the block's own name only."""
    rules = [{"match": "model.layers.0.*", "scheme": "float"}]
    model = qcompile.quantize(tiny_model(), {"scheme": "w4a16_g32", "rules": rules}, progress=False)
    qcompile.save(model, tmp_path / "saved")
    section = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    section["ignore"] = ["model.layers.0", "lm_head"]
    section["config_groups"]["group_0"]["targets"] = ["Linear"]
    rewrite(tmp_path / "saved", lambda tensors: None, section)
    assert torch.equal(logits(qcompile.load(tmp_path / "saved", progress=False)), logits(model))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "kv_cache_scheme: a quantized key-value cache"),
        ({}, r"unknown to .*: model\.layers\.0\.self_attn\.k_scale"),
    ],
)
def test_scales_of_a_quantized_cache_are_never_ignored(changes, says, tmp_path):
    qcompile.save(quantize_linears(tiny_model(), "wfp8afp8"), tmp_path / "saved")
    section = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    key = "model.layers.0.self_attn.k_scale"
    rewrite(tmp_path / "saved", lambda tensors: tensors.update({key: torch.ones(1)}), section | changes)
    with pytest.raises((UnsupportedError, FormatError), match=says):
        qcompile.inspect(tmp_path / "saved")


# ------------------------------------------------------------------------------------------- ModelSlim, mixed per layer


def modelslim_folder(folder: Path) -> torch.nn.Module:
    """A DeepSeek-V3 with the mixture that its recipes for Ascend have: by layer, W8A8 and W4A8, some of it float."""
    rules = [
        {"match": "*.kv_b_proj", "scheme": "float"},
        {"match": "*.o_proj", "scheme": "w8a16_asym"},
        {"match": "re:model\\.layers\\.1\\.mlp\\.experts", "scheme": "w4a8"},
    ]
    model = qcompile.quantize(tiny_moe("deepseek_v3"), {"scheme": "w8a8", "rules": rules}, progress=False)
    qcompile.save(model, folder, format="modelslim")
    return model


def test_a_mixture_of_types_as_modelslim_has_for_deepseek(tmp_path):
    model = modelslim_folder(tmp_path / "mixed")
    described = json.loads((tmp_path / "mixed" / "quant_model_description.json").read_text())
    layer = "model.layers.1"
    for name, kind in {
        f"{layer}.mlp.experts.7.gate_proj.scale_bias": "W4A8_DYNAMIC",
        f"{layer}.mlp.shared_experts.up_proj.weight": "W8A8_DYNAMIC",
        f"{layer}.self_attn.o_proj.weight_offset": "W8A16",
        f"{layer}.self_attn.kv_b_proj.weight": "FLOAT",
        f"{layer}.mlp.gate.weight": "FLOAT",
    }.items():
        assert described[name] == kind
    assert torch.equal(logits(qcompile.load(tmp_path / "mixed", progress=False)), logits(model))
    qcompile.convert(tmp_path / "mixed", tmp_path / "ct", format="compressed-tensors", progress=False)
    assert torch.equal(logits(qcompile.load(tmp_path / "ct", progress=False)), logits(model))


def test_a_description_counts_before_the_section_of_the_checkpoint_that_was_quantized_once_more(tmp_path):
    model = modelslim_folder(tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(qcompile.load(tmp_path / "mixed", progress=False)), logits(model))


@pytest.mark.parametrize("key", ["kv_cache_type", "kv_quant_type", "fa_quant_type"])
def test_caches_that_a_description_quantizes(key, tmp_path):
    modelslim_folder(tmp_path / "mixed")
    file = tmp_path / "mixed" / "quant_model_description.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "C8"}))
    with pytest.raises(UnsupportedError, match=rf"the description has {key} 'C8', which is not supported"):
        qcompile.inspect(tmp_path / "mixed")
