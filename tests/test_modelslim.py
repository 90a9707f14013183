"""The format modelslim: against its description, every type, smoothing with a shift, and what is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import logits, quantize_linears, relative_error, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stored import assert_same, random_packed
from torch import Tensor

import qcompile
from qcompile import numerics
from qcompile.errors import FormatError, UnsupportedError
from qcompile.formats import StoredSite, TensorHeader
from qcompile.formats.modelslim import FORMAT
from qcompile.modules import quantized_modules
from qcompile.storage import DTYPES
from qcompile.types import PackedWeight, Scheme

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def described(tensors: dict[str, Tensor], types: dict, shape: tuple[int, int], **more) -> tuple[StoredSite, ...]:
    """The sites that a description and headers make of the tensors of the Linear "m" of that shape."""
    headers = {n: TensorHeader(n, NAMES[t.dtype], tuple(t.shape), "f") for n, t in tensors.items()}
    config = {"quantization_config": {"quant_method": "modelslim", **types, **more}}
    assert FORMAT.detect(config, headers)
    return FORMAT.sites(config, headers, {"m": shape, "lm_head": (8, 8)})


def written(packed: PackedWeight, bias: Tensor | None = None, dtype=torch.bfloat16) -> tuple[dict[str, Tensor], dict]:
    assert not FORMAT.refuses(packed.scheme, packed.shape, packed)
    tensors = FORMAT.write("m", packed, dtype) | FORMAT.write_bias("m", packed, bias)
    site = StoredSite("m", packed.scheme, packed.shape, tuple(tensors))
    return tensors, FORMAT.quantization_config([site], [], ["norm.weight"])


def round_trip(packed: PackedWeight) -> PackedWeight:
    tensors, description = written(packed)
    assert description.keys() >= tensors.keys()
    (site,) = described(tensors, description, packed.shape)
    assert set(site.tensors) == set(tensors)
    return FORMAT.read(site, tensors.__getitem__)


SCHEMES = {
    "w8a16_asym": "W8A16",
    "w8a16_g32_asym": "W8A16",
    "w4a16_asym": "W4A16",
    "w4a16_g32_asym": "W4A16",
    "w8a8": "W8A8_DYNAMIC",
    "w8a8_static": "W8A8",
    "w4a8": "W4A8_DYNAMIC",
    "w4a8_g32": "W4A8_DYNAMIC",
    "w4a4": "W4A4_DYNAMIC",
    "w4a4_g32": "W4A4_DYNAMIC",
    "wfp8afp8": "WFP8AFP8_DYNAMIC",
    "wmxfp8amxfp8": "W8A8_MXFP8",
    "wmxfp4amxfp4": "W4A4_MXFP4",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_type_is_read_as_it_was_written(scheme):
    packed = random_packed(scheme, 24, 96, dtype=torch.float32)
    if scheme == "w8a8_static":  # of any other scale the product with the input's is stored, and loses its last bit
        packed.scales.copy_(torch.exp2(torch.randint(-9, 2, packed.scales.shape).float()))
    _, description = written(packed)
    assert (description["m.weight"], description["norm.weight"]) == (SCHEMES[scheme], "FLOAT")
    assert description["model_quant_type"] == SCHEMES[scheme]
    assert_same(round_trip(packed), packed)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16_g32", "w8a8_static_sym"])
def test_symmetric_weights_and_activations_become_those_with_a_zero_point_in_the_middle(scheme):
    packed = random_packed(scheme, 24, 96, dtype=torch.float32)
    again = round_trip(packed)
    torch.testing.assert_close(numerics.dequantize_packed(again), numerics.dequantize_packed(packed), rtol=1e-6, atol=0)
    if again.zeros is not None:
        assert (again.zeros == 2 ** (packed.scheme.weight.bits - 1)).all()
    if again.input_zero is not None:
        assert again.input_zero.tolist() == [0]


def test_a_pair_of_rows_has_the_even_one_in_its_low_bits():
    packed = random_packed("w4a8", 6, 16, dtype=torch.float32)
    tensors, _ = written(packed)
    codes = numerics.unpack_codes(packed.codes, 4, 16).int() - 8
    for row, pair in enumerate(tensors["m.weight"].int()):
        low, high = pair & 15, pair >> 4
        assert torch.equal(torch.where(low > 7, low - 16, low), codes[2 * row])
        assert torch.equal(high, codes[2 * row + 1])
    torch.testing.assert_close(tensors["m.scale_bias"][:, 0], 8 * numerics.dequantize_packed(packed).sum(1))


@pytest.mark.parametrize("name", ["x.down_proj", "x.o_proj", "x.q_proj"])
def test_layers_that_are_split_along_their_inputs_have_a_correction_for_each_part(name):
    packed = random_packed("w4a8", 6, 64, dtype=torch.float32)
    correction = FORMAT.write(name, packed)[f"{name}.scale_bias"]
    assert correction.shape == (6, 1 if "q_proj" in name else 16)
    torch.testing.assert_close(correction.sum(1), 8 * numerics.dequantize_packed(packed).sum(1), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------- static activations


@given(st.booleans(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_the_static_forward_of_the_hardware_is_that_of_the_canonical_weight(has_bias, dtype):
    """y = (sum(q_x * q) + quant_bias) * deq_scale, of integers: the bias and the zero point are within quant_bias."""
    packed = random_packed("w8a8_static", 12, 32, dtype=torch.float32)
    packed.scales.abs_().clamp_(min=0.01)
    bias = torch.randn(12) if has_bias else None
    tensors, description = written(packed, bias, dtype)
    deq_scale = tensors["m.deq_scale"]
    assert deq_scale.dtype == (torch.float32 if dtype == torch.bfloat16 else torch.int64)
    if deq_scale.dtype == torch.int64:
        deq_scale = deq_scale.int().view(torch.float32)
    x = torch.randn(5, 32)
    q_x = (torch.round(x / packed.input_scale) + packed.input_zero).clamp(-128, 127)
    exact = q_x.double() @ tensors["m.weight"].double().t()
    expected = (exact + tensors["m.quant_bias"]) * deq_scale.double()
    (site,) = described(tensors, description, packed.shape)
    again, read = FORMAT.read(site, tensors.__getitem__), FORMAT.read_bias(site, tensors.__getitem__)
    assert site.owns_bias
    assert (read is not None) == has_bias
    (codes,) = numerics.quantize_activation(x, again.scheme.activation, [again.input_scale, again.input_zero])
    inputs = numerics.dequantize_activation([codes, again.input_scale, again.input_zero], again.scheme.activation)
    actual = inputs @ numerics.dequantize_packed(again).double().t() + (0 if read is None else read.double())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(FORMAT.write_bias("m", again, read)["m.quant_bias"], tensors["m.quant_bias"])


def test_a_scale_that_is_stored_beside_the_product_is_taken_as_it_is():
    packed = random_packed("w8a8_static", 12, 32, dtype=torch.float32)
    tensors, description = written(packed, torch.randn(12))
    tensors |= {"m.weight_scale": packed.scales, "m.weight_offset": torch.zeros(12, 1), "m.bias": torch.ones(12)}
    (site,) = described(tensors, description, packed.shape)
    assert set(site.tensors) == set(tensors)  # the bias too, which quant_bias holds
    assert torch.equal(FORMAT.read(site, tensors.__getitem__).scales, packed.scales)


def test_both_halves_of_a_mixed_type():
    packed = random_packed("w8a8_static", 12, 32, dtype=torch.float32)
    tensors, _ = written(packed, bias := torch.randn(12))
    tensors |= {"m.weight_scale": packed.scales, "m.weight_offset": torch.zeros(12, 1)}
    (site,) = described(tensors, {"m.weight": "W8A8_MIX"}, packed.shape)
    assert str(site.scheme) == "w8a8"
    assert "its static half, for decoding, is not used" in site.note
    again = FORMAT.read(site, tensors.__getitem__)
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(again.scales, packed.scales)
    step = (packed.input_scale * packed.scales[:, 0]).abs()
    assert bool(((FORMAT.read_bias(site, tensors.__getitem__) - bias).abs() <= 0.51 * step)[1:].all())


# -------------------------------------------------------------------------------------------------------------- types


def test_two_scales_of_old_files():
    packed = random_packed("w4a8_g32", 8, 128, dtype=torch.float32)
    codes = (numerics.unpack_codes(packed.codes, 4, 128).int() - 8).to(torch.int8)
    channel, group = torch.rand(8, 1), torch.rand(8, 4)
    tensors = {
        "m.weight": codes,
        "m.weight_scale": channel,
        "m.weight_offset": torch.zeros(8, 1),
        "m.weight_scale_second": group,
        "m.weight_offset_second": torch.zeros(8, 4, dtype=torch.int64),
    }
    (site,) = described(tensors, {"m.weight": "W4A8_DYNAMIC"}, (8, 128), group_size=32)
    again = FORMAT.read(site, tensors.__getitem__)
    assert str(again.scheme) == "w4a8_g32"
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(again.scales, channel * group)
    with pytest.raises(FormatError, match=r"4 groups of 128 inputs, but the description has the group_size 64"):
        described(tensors, {"m.weight": "W4A8_DYNAMIC"}, (8, 128), group_size=64)


@pytest.mark.parametrize(
    ("changes", "kind", "error", "says"),
    [
        (
            {},
            "W4A4_FLATQUANT_DYNAMIC",
            UnsupportedError,
            r"'W4A4_FLATQUANT_DYNAMIC' of ModelSlim is not read; known: W8A16",
        ),
        ({}, "FLOAT", FormatError, r"m\.weight_\w+ is stored, but the description has m as FLOAT"),
        ({}, "W8A8", FormatError, r"m\.input_scale is missing"),
        ({"m.weight_scale": torch.ones(16, 3)}, "W8A8_DYNAMIC", FormatError, "3 groups .* group_size 0"),
        ({"m.weight": torch.zeros(8, 32)}, "W8A8_DYNAMIC", FormatError, r"m\.weight is F32 \[8, 32\]"),
        ({"q.weight_scale": torch.ones(1)}, "W8A8_DYNAMIC", UnsupportedError, "no Linear of this model"),
        ({"k.kv_cache_scale": torch.ones(1)}, "W8A8_DYNAMIC", UnsupportedError, r"k\.kv_cache_scale .*key-value cache"),
        ({"a.fa_q.scale": torch.ones(1)}, "W8A8_DYNAMIC", UnsupportedError, r"a\.fa_q\.scale .*quantized attention"),
        ({"m.div.mul_scale": torch.ones(1)}, "W8A8_DYNAMIC", UnsupportedError, r"m\.div\.mul_scale .*smoothing"),
        ({"heads_rotation": torch.ones(1)}, "W8A8_DYNAMIC", UnsupportedError, r"heads_rotation .*rotations"),
    ],
)
def test_descriptions_that_are_not_read(changes, kind, error, says):
    packed = random_packed("w8a8", 16, 32, dtype=torch.float32)
    tensors = written(packed)[0] | changes
    with pytest.raises(error, match=says):
        described(tensors, {"m.weight": kind}, (16, 32), group_size=0)


@pytest.mark.parametrize(
    ("scheme", "name", "change", "says"),
    [
        ("w8a8", "weight_offset", lambda t: t.fill_(1), r"weight_offset is not zero, but W8A8_DYNAMIC has symmetric"),
        ("w8a16_asym", "weight_offset", lambda t: t.fill_(0.5), "no 8-bit integers"),
        ("w8a16_asym", "weight_offset", lambda t: t.fill_(128), "no 8-bit integers"),
        ("w4a4", "weight", lambda t: t.fill_(8), r"m\.weight holds numbers outside of -8\.\.7, not 4-bit"),
        ("w4a8", "scale_bias", lambda t: t.add_(1), r"scale_bias is not 8 \* sum\(weight\)"),
        ("w8a8", "weight_scale", lambda t: t.fill_(torch.nan), "weight_scale holds NaN"),
        ("w8a8_static", "input_scale", lambda t: t.zero_(), "divided by an input_scale of zero"),
        ("w8a8_static", "input_offset", lambda t: t.fill_(300), "input_offset is 300.0, not an integer of -128..127"),
        ("w8a8_static", "deq_scale", lambda t: t.fill_(torch.inf), "deq_scale holds NaN or infinity"),
    ],
)
def test_damaged_data(scheme, name, change, says):
    packed = random_packed(scheme, 16, 32, dtype=torch.float32)
    packed.scales.abs_().clamp_(min=0.01)
    tensors, description = written(packed)
    (site,) = described(tensors, description, (16, 32))
    change(tensors[f"m.{name}"])
    with pytest.raises(FormatError, match=says):
        FORMAT.read(site, tensors.__getitem__)


@pytest.mark.parametrize(
    ("scheme", "shape", "says"),
    [
        ("w3a16", (16, 32), "no type for w3a16"),
        ("w8a8_dynamic_asym", (16, 32), "no type for w8a8_dynamic_asym"),
        ("w4a8_clip", (16, 32), "no clipped activations"),
        ("w4a8", (15, 32), "pairs of rows, which 15 rows are not"),
        ("w8a16_g32", (16, 48), "group size 32 does not divide its 48 inputs"),
        ("wnvfp4a16", (16, 32), "no type for wnvfp4a16"),
    ],
)
def test_what_cannot_be_written(scheme, shape, says):
    reason = FORMAT.refuses(Scheme.parse(scheme), shape)
    assert says in reason
    assert "use compressed-tensors" in reason


def test_one_description_has_one_group_size():
    sites = [StoredSite(n, Scheme.parse(s), (8, 64), ()) for n, s in {"a": "w4a16_g32", "b": "w4a16_g64"}.items()]
    with pytest.raises(UnsupportedError, match="one group size for all modules"):
        FORMAT.quantization_config(sites, [])


# ------------------------------------------------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small qwen2 (its q, k and v have biases) with static and dynamic sites, and its folder."""
    torch.manual_seed(0)
    model = quantize_linears(tiny_model("qwen2"), {"q_proj": "w8a8", "up_proj": "w4a8", "down_proj": "w8a16"})
    folder = tmp_path_factory.mktemp("modelslim") / "saved"
    qcompile.save(model, folder, format="modelslim")
    return model, folder


def change(folder: Path, edit, types: dict[str, str]) -> None:
    (file,) = folder.glob("quant_model_weights-*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    index = next(folder.glob("*.index.json"))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file.name)}))
    description = folder / "quant_model_description.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | types))


def test_files_are_named_as_the_tools_name_them(checkpoint):
    model, folder = checkpoint
    names = {path.name for path in folder.iterdir()}
    assert names >= {"quant_model_description.json", "quant_model_weights-00001-of-00001.safetensors"}
    assert "quant_model_weights.safetensors.index.json" in names
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    description = json.loads((folder / "quant_model_description.json").read_text())
    tensors = load_file(folder / "quant_model_weights-00001-of-00001.safetensors")
    assert description.keys() - tensors.keys() == {
        "version", "model_quant_type", "group_size", "metadata", "optional",
    }  # fmt: skip
    assert tensors.keys() <= description.keys()
    assert description["model.layers.0.self_attn.q_proj.bias"] == "FLOAT"
    assert torch.equal(logits(qcompile.load(folder)), logits(model))


def test_a_norm_adds_the_bias_that_is_stored_for_it(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint[1], tmp_path / "copied"))
    norm, linear = "model.layers.1.post_attention_layernorm", "model.layers.1.mlp.gate_proj"
    shift = torch.randn(128, dtype=torch.bfloat16)
    weight = checkpoint[0].get_submodule(linear).weight.detach()
    against = -(weight.float() @ shift.float()).to(torch.bfloat16)

    def smooth(tensors):
        tensors |= {f"{norm}.bias": shift, f"{linear}.bias": against}

    change(folder, smooth, {f"{norm}.bias": "FLOAT", f"{linear}.bias": "FLOAT"})
    loaded = qcompile.load(folder)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    plain = checkpoint[0].get_submodule(norm)
    assert torch.equal(loaded.get_submodule(norm)(x), plain(x) + shift)
    assert torch.equal(loaded.get_submodule(linear).bias, against)  # float, and added as well
    assert not torch.equal(logits(loaded), logits(checkpoint[0]))
    with pytest.raises(UnsupportedError, match=r"post_attention_layernorm adds a bias .* only format='modelslim'"):
        qcompile.save(loaded, tmp_path / "other")
    qcompile.save(loaded, tmp_path / "again", format="modelslim")
    assert torch.equal(logits(qcompile.load(tmp_path / "again")), logits(loaded))


def test_a_shift_in_front_of_a_quantized_linear_cancels(checkpoint, tmp_path):
    """norm + shift, and W (x + shift) - W shift: the model computes what it did but for the rounding of activations."""
    folder = Path(shutil.copytree(checkpoint[1], tmp_path / "copied"))
    norm = "model.layers.0.input_layernorm"
    shift = 0.05 * torch.randn(128)
    types = {f"{norm}.module.weight": "FLOAT", f"{norm}.module.bias": "FLOAT"}

    def smooth(tensors):
        tensors[f"{norm}.module.weight"] = tensors.pop(f"{norm}.weight")
        tensors[f"{norm}.module.bias"] = shift.bfloat16()
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = checkpoint[0].get_submodule(f"model.layers.0.self_attn.{name}")
            weight = numerics.dequantize_packed(linear.packed()) if name == "q_proj" else linear.weight
            bias = tensors[f"model.layers.0.self_attn.{name}.bias"]
            bias.copy_(bias.float() - weight.detach().float() @ shift)

    change(folder, smooth, types)
    loaded = qcompile.load(folder)
    assert relative_error(logits(loaded), logits(checkpoint[0])) < 0.03
    assert set(quantized_modules(loaded)) == set(quantized_modules(checkpoint[0]))
    change(folder, lambda t: t.update({f"{norm}.weight": t[f"{norm}.module.weight"].clone()}), {})
    with pytest.raises(UnsupportedError, match=r"input_layernorm\.weight and .*module\.weight are both stored"):
        qcompile.load(folder)


def test_a_bias_that_nothing_can_add(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint[1], tmp_path / "copied"))
    change(folder, lambda t: t.update({"model.embed_tokens.bias": torch.ones(160, dtype=torch.bfloat16)}), {})
    with pytest.raises(FormatError, match=r"model\.embed_tokens is no norm or Linear of the model that lacks a bias"):
        qcompile.load(folder)
