"""Mixtures of experts on disk: one by one or fused, float or quantized, saved, loaded, and quantized while loading."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import logits, relative_error, tiny_model
from moe_models import FAMILIES, IDS, Decoder, Looping, tiny_moe
from safetensors.torch import load_file, save_file
from stored import change, random_packed

import qcompile
from qcompile import numerics, parts, storage
from qcompile.errors import CalibrationError, ConfigError, FormatError, UnsupportedError
from qcompile.modules import FloatWeight, QuantExperts, quantized_modules
from qcompile.types import PackedWeight

EVERY = pytest.mark.parametrize("family", FAMILIES)


def quantize(model, config="w4a16_g32"):
    return qcompile.quantize(model, config, progress=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small quantized Qwen3-MoE, and its folder."""
    torch.manual_seed(0)
    model = quantize(tiny_moe("qwen3_moe", torch.bfloat16))
    folder = tmp_path_factory.mktemp("moe") / "w4"
    qcompile.save(model, folder)
    return model, folder


# -------------------------------------------------------------------------------------------------------------- float


@EVERY
def test_float_files_of_transformers(family, tmp_path):
    model = tiny_moe(family)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(qcompile.load(tmp_path)), logits(model))


@EVERY
def test_float_files_with_the_names_of_the_modules(family, tmp_path):
    model = tiny_moe(family)
    model.config.save_pretrained(tmp_path)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert torch.equal(logits(qcompile.load(tmp_path)), logits(model))


@EVERY
def test_a_float_model_is_stored_as_transformers_stores_it(family, tmp_path):
    model = tiny_moe(family, torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    qcompile.save(model, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_experts_that_are_missing_are_listed_as_ranges(tmp_path):
    tiny_moe("mixtral").save_pretrained(tmp_path)

    def lose(tensors):
        for expert in (2, 3, 4, 7):
            del tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight"]

    change(tmp_path, lose)
    with pytest.raises(FormatError, match=r"missing: model\.layers\.1\.block_sparse_moe\.experts\.2-4,7\.w3\.weight$"):
        qcompile.load(tmp_path)


# ---------------------------------------------------------------------------------------------------------- quantized


@EVERY
@pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "w8a8"])
def test_what_is_loaded_is_what_was_saved(family, scheme, tmp_path):
    model = quantize(tiny_moe(family), scheme)
    qcompile.save(model, tmp_path / "saved")
    loaded = qcompile.load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert quantized_modules(loaded).keys() == quantized_modules(model).keys()


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq", "modelslim"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_are_stored_one_by_one(format, family, tmp_path):
    model = quantize(tiny_moe(family, torch.float16), "w4a16_g32_asym")
    qcompile.save(model, tmp_path / "saved", format=format)
    (file,) = (tmp_path / "saved").glob("*.safetensors")
    block = {"mixtral": "block_sparse_moe"}.get(family, "mlp")
    names = {"mixtral": ("w1", "w2", "w3")}.get(family, ("gate_proj", "up_proj", "down_proj"))
    suffix = {"compressed-tensors": "weight_packed", "modelslim": "weight"}.get(format, "qweight")
    assert {f"model.layers.1.{block}.experts.7.{name}.{suffix}" for name in names} <= load_file(file).keys()
    loaded = qcompile.load(tmp_path / "saved", dtype=torch.float16)
    assert relative_error(logits(loaded), logits(model)) < 1e-3


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a16"])
def test_transformers_reads_symmetric_experts(scheme, tmp_path):
    from transformers import AutoModelForCausalLM

    model = quantize(tiny_moe("qwen3_moe", torch.bfloat16), scheme)
    qcompile.save(model, tmp_path / "saved")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert relative_error(logits(loaded), logits(model)) < 0.03


def test_routers_and_float_experts_are_ignored_by_name(tmp_path):
    model = quantize(
        tiny_moe("qwen3_moe", torch.bfloat16),
        {"scheme": "w4a16_g32", "rules": [{"match": "*layers.0.mlp.experts*", "scheme": "float"}]},
    )
    qcompile.save(model, tmp_path / "saved")
    ignored = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]["ignore"]
    assert {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"} < set(ignored)
    assert "model.layers.0.mlp.experts.3.up_proj" in ignored
    assert torch.equal(logits(qcompile.load(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_one_projection_may_stay_float(family, tmp_path):
    rules = [{"match": "*experts.down_proj", "scheme": "float"}]
    model = quantize(tiny_moe(family, torch.bfloat16), {"scheme": "w8a16", "rules": rules})
    qcompile.save(model, tmp_path / "saved")
    loaded = qcompile.load(tmp_path / "saved")
    assert isinstance(loaded.get_submodule("model.layers.0.mlp.experts.down_proj"), FloatWeight)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("bias", [False, True])
def test_a_list_of_experts_keeps_the_names_of_its_linears(bias, tmp_path):
    model = Decoder(Looping(bias=bias), Looping(bias=bias)).eval()
    twin, ids = copy.deepcopy(model), torch.arange(12).view(2, 6)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    qcompile.quantize(model, "w4a16_g32", example_inputs=IDS, progress=False)
    qcompile.save(model, tmp_path / "saved")
    assert "layers.1.mlp.feed.5.w3.weight_packed" in load_file(tmp_path / "saved/model.safetensors")
    loaded = qcompile.load(tmp_path / "saved", model=twin)
    assert sum(isinstance(module, QuantExperts) for module in loaded.modules()) == 2
    assert torch.equal(loaded(ids), model(ids))


# -------------------------------------------------------------------------------------------------------- bad input


def test_quantized_experts_that_are_missing_are_listed_as_ranges(copied):
    def lose(tensors):
        for expert in (3, 4, 5):
            for name in ("gate_proj", "up_proj"):
                del tensors[f"model.layers.0.mlp.experts.{expert}.{name}.weight_scale"]

    change(copied, lose)
    missing = (
        r"Missing in all: model\.layers\.0\.mlp\.experts\.3-5\.gate_proj\.weight_scale, .*3-5\.up_proj\.weight_scale$"
    )
    with pytest.raises(FormatError, match=missing):
        qcompile.load(copied)


def test_whole_experts_that_are_missing(copied):
    def lose(tensors):
        for name in [name for name in tensors if ".layers.1.mlp.experts.6." in name]:
            del tensors[name]

    change(copied, lose)
    says = r"layers\.1\.mlp\.experts\.gate_up_proj: .*experts\.6\.gate_proj, .*6\.up_proj is not quantized, or missing"
    with pytest.raises(FormatError, match=says):
        qcompile.inspect(copied)


@pytest.mark.parametrize("family", ["gpt_oss", "list"])
def test_a_bias_of_an_expert_that_is_missing(family, tmp_path):
    model = tiny_moe("gpt_oss") if family == "gpt_oss" else Decoder(Looping(bias=True))
    twin = copy.deepcopy(model)
    qcompile.quantize(model, "w8a16", example_inputs=None if family == "gpt_oss" else IDS, progress=False)
    qcompile.save(model, tmp_path / "saved")
    name = "model.layers.1.mlp.experts.5.down_proj" if family == "gpt_oss" else "layers.0.mlp.feed.5.w2"
    change(tmp_path / "saved", lambda tensors: tensors.pop(f"{name}.bias"))
    with pytest.raises(FormatError, match=rf"missing: {name}\.bias"):
        qcompile.load(tmp_path / "saved", model=twin)


def test_experts_that_the_model_does_not_have(copied):
    change(copied, lambda t: t.update({"model.layers.0.mlp.experts.8.down_proj.weight_scale": torch.ones(128, 2)}))
    with pytest.raises(UnsupportedError, match=r"experts\.8\.down_proj\.weight_scale belongs to a quantized module"):
        qcompile.load(copied)


@pytest.mark.parametrize("other", ["model.layers.0.mlp.experts.2.up_proj", "model.layers.0.mlp.experts.2.down_proj"])
def test_experts_of_different_schemes(other, copied):
    """One Linear of one expert is 8-bit, and config.json says so."""
    config = json.loads((copied / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    wide = json.loads(json.dumps(groups["group_0"]))
    wide["weights"]["num_bits"], wide["targets"] = 8, [other]
    groups["group_1"] = wide
    (copied / "config.json").write_text(json.dumps(config))

    def widen(tensors):
        shape = tensors[f"{other}.weight_shape"].tolist()
        tensors[f"{other}.weight_packed"] = torch.zeros((shape[0], shape[1] // 4), dtype=torch.int32)

    change(copied, widen)
    with pytest.raises(UnsupportedError, match=rf"must have one scheme, but .*w4a16_g32; {other} is w8a16_g32"):
        qcompile.load(copied)


def packed(scheme: str, **changes) -> PackedWeight:
    return dataclasses.replace(random_packed(scheme, 16, 32, dtype=torch.float32), **changes)


def test_gate_and_up_read_one_input():
    one, other = (packed("w8a8_static", input_scale=torch.tensor([value])) for value in (0.5, 0.25))
    with pytest.raises(UnsupportedError, match="gate and up have different input scales, but read the same input"):
        parts.join([one, other], one.scheme)
    blocks = random_packed("wfp8a16_b32x32", 48, 32)
    with pytest.raises(UnsupportedError, match="gate and up of 48 rows do not fill blocks of 32"):
        parts.join([blocks, blocks], blocks.scheme)


# ---------------------------------------------------------------------------------------------------- join, stack, cut

SCHEMES = [
    "w4a16_g16", "w3a16_g16_asym", "w8a8_static", "w4a8_clip", "wfp8afp8_tensor_static", "wfp8afp8_b8x16",
    "wnvfp4anvfp4", "wmxfp4amxfp4", "wmxfp8a16",
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stacked_weights_are_cut_into_what_they_were(scheme):
    shared = ("permutation", "outer", "input_scale", "input_zero", "alpha")
    pairs = []
    for _ in range(3):
        gate, up = (random_packed(scheme, 16, 32) for _ in range(2))
        pairs.append((gate, dataclasses.replace(up, **{name: getattr(gate, name) for name in shared})))
    joined = parts._stacked(gate.scheme, 2)
    whole = parts.stack((parts.join(pair, joined) for pair in pairs), 3)
    assert whole.shape == (3, 32, 32)
    pieces = tuple((parts.Piece(f"{i}.gate", 0, 16), parts.Piece(f"{i}.up", 16, 16)) for i in range(3))
    for (name, piece), expected in zip(parts.cut(whole, pieces), (p for pair in pairs for p in pair), strict=True):
        assert torch.equal(numerics.dequantize_packed(piece), numerics.dequantize_packed(expected)), name
        assert piece.activation_tensors().keys() == expected.activation_tensors().keys()
        for key, tensor in expected.activation_tensors().items():
            assert torch.equal(piece.activation_tensors()[key], tensor)


def test_one_expert_in_another_order_gives_all_an_order():
    plain, permuted = random_packed("w4a16_g16", 8, 32), random_packed("w4a16_g16", 8, 32, permuted=True)
    for experts in ([plain, permuted, plain], [permuted, plain, plain]):
        whole = parts.stack(iter(experts), 3)
        weights = numerics.dequantize_packed(whole)
        for weight, expert in zip(weights, experts, strict=True):
            assert torch.equal(weight, numerics.dequantize_packed(expert))


def test_tensors_are_assembled_from_parts_in_any_order():
    tensor = torch.randn(4, 6, 5)
    names = [parts.Part(f"{i}.{j}", 6 * i + 3 * j, (3, 5)) for i in range(4) for j in range(2)]
    stored = dict(parts.take_apart(tensor, names))
    assert torch.equal(stored["2.1"], tensor[2, 3:])
    assert torch.equal(parts.assemble((4, 6, 5), names, stored.__getitem__), tensor)


# ---------------------------------------------------------------------------------------- quantizing what is being read


@EVERY
def test_a_streamed_model_is_the_quantized_one(family, tmp_path):
    model = tiny_moe(family, torch.bfloat16)
    model.save_pretrained(tmp_path)
    streamed = qcompile.load(tmp_path, config="w4a16_g32")
    quantize(model)
    assert quantized_modules(streamed).keys() == quantized_modules(model).keys()
    assert torch.equal(logits(streamed), logits(model))
    expected = {result.planned.site.name: result.sqnr for result in qcompile.report(model).sites}
    for result in qcompile.report(streamed).sites:
        sqnr = expected[result.planned.site.name]
        assert result.sqnr == (sqnr if sqnr is None else pytest.approx(sqnr, abs=1e-3))


def test_fused_float_experts_are_streamed_one_by_one(tmp_path, monkeypatch):
    model = tiny_moe("qwen3_moe", torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    read, sizes = storage.Folder.read, []

    def observed(self, name, index=None):
        tensor = read(self, name, index)
        sizes.append((tensor.numel(), name))
        return tensor

    monkeypatch.setattr(storage.Folder, "read", observed)
    streamed = qcompile.load(tmp_path, config="w8a16")
    assert max(size for size, name in sizes if "experts" in name) == 128 * 128  # gate and up of one expert
    assert torch.equal(logits(streamed), logits(quantize(model, "w8a16")))


def test_a_quantized_checkpoint_cannot_be_quantized_again(checkpoint):
    with pytest.raises(ConfigError, match="is quantized already, as compressed-tensors; leave out the config"):
        qcompile.load(checkpoint[1], config="w8a16")


def test_what_needs_data_cannot_be_streamed(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=r"without calibration data.* Load the float model, then call quantize"):
        qcompile.load(tmp_path, config="w8a8_static")


def test_a_float_weight_that_is_not_finite(tmp_path):
    model = tiny_moe("qwen3_moe", torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 4, 5] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.experts\.down_proj: a stored weight holds NaN or infinite"):
        qcompile.load(tmp_path, config="w8a16")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident memory of Linux's /proc")
@pytest.mark.parametrize("what", ["stream", "load"])
def test_the_peak_is_below_one_and_a_half_of_the_quantized_size(what, tmp_path):
    """150 million parameters in bfloat16 shards; ``python tests/stream_moe.py`` measures two billion."""
    script = Path(__file__).parent / "stream_moe.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "small", what], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["float_bytes"] > 250e6
    assert facts["peak_bytes"] < 1.5 * facts["quantized_bytes"]
