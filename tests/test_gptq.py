"""The formats gptq and gptq_v2: against their description, against files of gptqmodel and AutoRound, and malformed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import logits, quantize_linears, relative_error, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from stored import assert_same, change, change_config, described, golden, random_packed, round_trip, written

import qcompile
from qcompile import numerics
from qcompile.backends.cpu import CPU
from qcompile.errors import FormatError, UnsupportedError
from qcompile.formats import StoredSite, TensorHeader, gptq, gptq_v2
from qcompile.modules import quantized_modules
from qcompile.types import Scheme, WeightType

V1, V2 = gptq.FORMAT, gptq_v2.FORMAT
BITS, FORMATS = st.sampled_from([2, 3, 4, 8]), st.sampled_from([V1, V2])
UNITS = st.integers(1, 3)  # of 32 codes, which every width can store


# ------------------------------------------------------------------------------------------------------ one module


@given(FORMATS, BITS, st.booleans(), st.sampled_from([None, 1, 16, 32]), UNITS, UNITS)
def test_what_is_written_is_read(format, bits, symmetric, group, out, inn):
    scheme = Scheme(WeightType(bits, symmetric, group))
    packed = random_packed(scheme, 32 * out, 32 * inn, smallest_zero=2 - format.version)
    assert_same(round_trip(format, packed), packed)


@given(FORMATS, BITS, st.booleans(), st.sampled_from([None, 8, 32]), UNITS, UNITS)
def test_a_permuted_weight_keeps_its_values(format, bits, symmetric, group, out, inn):
    scheme = Scheme(WeightType(bits, symmetric, group))
    packed = random_packed(scheme, 32 * out, 32 * inn, permuted=True, smallest_zero=2 - format.version)
    again = round_trip(format, packed)
    assert torch.equal(numerics.dequantize_packed(again), numerics.dequantize_packed(packed))
    if scheme.weight.groups(32 * inn) == 1:
        assert again.permutation is None  # one group has no order to keep


def field(words: list[int], bits: int, i: int) -> int:
    """Code i of a bit stream in signed 32-bit words, as the format's description has it."""
    word, shift = divmod(bits * i, 32)
    low, high = (w % 2**32 for w in (words[word], [*words, 0][word + 1]))
    return ((low | high << 32) >> shift) % 2**bits


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("permuted", [False, True])
def test_every_bit_is_where_the_description_puts_it(version, bits, permuted):
    format, scheme = (V1, V2)[version - 1], Scheme(WeightType(bits, False, 16))
    packed = random_packed(scheme, 32, 64, permuted=permuted, smallest_zero=1)
    tensors = {name.removeprefix("m."): t.tolist() for name, t in format.write("m", packed).items()}
    expected = numerics.dequantize_packed(packed).tolist()
    rows = [[row[o] for row in tensors["qweight"]] for o in range(32)]
    for o in range(32):
        for i in range(64):
            group = tensors["g_idx"][i]
            zero = field(tensors["qzeros"][group], bits, o) + (version == 1)
            scale = torch.tensor(tensors["scales"][group][o], dtype=torch.float16)
            assert (scale * (field(rows[o], bits, i) - zero)).item() == expected[o][i]


@pytest.mark.parametrize(("bits", "first", "second"), [(2, 0x55, 0xAA), (4, 0x77, 0x88), (8, 0x7F, 0x80)])
def test_symmetric_words(bits, first, second):
    packed = random_packed(Scheme(WeightType(bits)), 32, 32)
    for format, byte in ((V1, first), (V2, second)):
        assert set(format.write("m", packed)["m.qzeros"].flatten().view(torch.uint8).tolist()) == {byte}


SECTION = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}


def read(tensors, section, shape=(32, 64)):
    format = V2 if section.get("checkpoint_format") == "gptq_v2" else V1
    (site,) = described(format, tensors, shape, section)
    return format.read(site, tensors.__getitem__)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_zero_in_version_1(bits):
    """gptqmodel subtracts from whole words, so that a zero borrows from the next field; others do field by field."""
    packed = random_packed(Scheme(WeightType(bits, False, 16)), 32, 64)
    packed.zeros[:8] = torch.tensor([0, 0, 1, 0] * 2, dtype=torch.uint8)[:, None]
    assert "zero points are 0" in V1.refuses(packed.scheme, packed.shape, packed)
    tensors, section = V2.write("m", packed), SECTION | {"bits": bits, "checkpoint_format": "gptq"}
    ones = sum(1 << shift for shift in range(0, 32, bits))
    borrowed = tensors | {"m.qzeros": ((tensors["m.qzeros"].long() - ones + 2**31) % 2**32 - 2**31).int()}
    assert_same(read(borrowed, section | {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}), packed)
    fields = numerics.pack_codes((packed.zeros - 1).t().contiguous() & (2**bits - 1), bits)
    masked = tensors | {"m.qzeros": fields.view(torch.int32)}
    assert_same(read(masked, section), packed)


@pytest.mark.parametrize(
    ("format", "changes", "symmetric"),
    [
        (V1, {}, True),
        (V1, {"checkpoint_format": None}, True),
        (V1, {"checkpoint_format": None, "format": "GPTQ"}, True),
        (V2, {"checkpoint_format": None}, True),  # without a label, symmetric zero points tell
        (V1, {"sym": None}, False),  # nothing says that it is symmetric, so its zero points are kept
        (V2, {"sym": False}, False),
    ],
)
def test_the_version_and_symmetry(format, changes, symmetric):
    packed = random_packed(Scheme.parse("w4a16_g16"), 32, 64)
    tensors, section = written(format, packed)
    again = read(tensors, {k: v for k, v in (section | changes).items() if v is not None})
    assert again.scheme.weight.symmetric is symmetric
    assert torch.equal(numerics.dequantize_packed(again), numerics.dequantize_packed(packed))


@pytest.mark.parametrize(("stored", "claimed", "zeros"), [(V1, "gptq_v2", "7"), (V2, "gptq", "8")])
def test_a_version_that_the_zero_points_contradict(stored, claimed, zeros):
    tensors, section = written(stored, random_packed(Scheme.parse("w4a16_g16"), 32, 64))
    says = rf"m\.qzeros stores {zeros},.* says '{claimed}' and sym, so that all must be 8: .* those of '{stored.name}'"
    with pytest.raises(FormatError, match=says):
        read(tensors, section | {"checkpoint_format": claimed})


def test_symmetry_that_the_zero_points_contradict():
    tensors, section = written(V2, random_packed(Scheme.parse("w4a16_g16_asym"), 32, 64))
    with pytest.raises(FormatError, match=r"m\.qzeros stores 0, 1, 2.*says 'gptq_v2' and sym.* set sym to false"):
        read(tensors, section | {"sym": True})


def test_group_indices():
    packed = random_packed(Scheme.parse("w4a16_g16_asym"), 32, 64, smallest_zero=1)
    tensors, _ = written(V1, packed)
    section, expected = SECTION | {"desc_act": True}, numerics.dequantize_packed(packed)
    trivial = torch.arange(64, dtype=torch.int32) // 16
    assert read(tensors, section).permutation is None  # static groups
    assert read({n: t for n, t in tensors.items() if n != "m.g_idx"}, SECTION).permutation is None  # AutoRound
    reversed_groups = read(tensors | {"m.g_idx": 3 - trivial.long()}, section)
    flipped = {n: t.flip(0) for n, t in tensors.items() if n in ("m.qzeros", "m.scales")}
    again = read(tensors | flipped | {"m.g_idx": 3 - trivial}, section)
    assert again.permutation.tolist() == reversed_groups.permutation.tolist()
    assert torch.equal(numerics.dequantize_packed(again), expected)
    for wrong in (trivial + 1, trivial - 1):
        with pytest.raises(FormatError, match=r"m\.g_idx names groups -?\d to \d, but there are 4"):
            read(tensors | {"m.g_idx": wrong}, section)
    with pytest.raises(FormatError, match=r"m\.g_idx is not in order.*desc_act is false"):
        read(tensors | {"m.g_idx": 3 - trivial}, SECTION)
    with pytest.raises(FormatError, match=r"model\.safetensors: m\.g_idx is missing: .*desc_act True"):
        read({n: t for n, t in tensors.items() if n != "m.g_idx"}, section)
    with pytest.raises(FormatError, match=r"m\.g_idx is F32 \[64\], but must be I32 or I64 \[64\]"):
        read(tensors | {"m.g_idx": trivial.float()}, section)


@given(st.sampled_from([V1, V2]), BITS, st.booleans(), st.sampled_from([None, 8, 16, 24]), st.data())
def test_any_order_of_columns(format, bits, symmetric, group, data):
    """W[o, i] = (q[i, o] - z[g_idx[i], o]) * s[g_idx[i], o], however many columns a group has."""
    packed = random_packed(Scheme(WeightType(bits, symmetric, group)), 32, 64, smallest_zero=2 - format.version)
    tensors, section = written(format, packed)
    groups = packed.scheme.weight.groups(64)
    shuffled = torch.tensor(data.draw(st.permutations([i * groups // 64 for i in range(64)])))
    anyhow = torch.tensor(data.draw(st.lists(st.integers(0, groups - 1), min_size=64, max_size=64)))
    halves = torch.arange(64) * groups // 128  # in twos, so that groups stay large
    codes = numerics.unpack_codes(packed.codes, bits, 64).float()
    zeros = torch.full_like(packed.scales, 2 ** (bits - 1)) if symmetric else packed.zeros
    for g_idx in (shuffled, anyhow, halves):
        again = read(tensors | {"m.g_idx": g_idx.to(torch.int32)}, section | {"desc_act": True})
        expected = (codes - zeros.float()[:, g_idx]) * packed.scales.float()[:, g_idx]
        assert torch.equal(numerics.dequantize_packed(again), expected.to(packed.scales.dtype))
        if format.refuses(again.scheme, again.shape, again) == "":
            rewritten = numerics.dequantize_packed(round_trip(format, again))
            assert torch.equal(rewritten, numerics.dequantize_packed(again))


def test_a_short_last_group():
    packed = random_packed(Scheme.parse("w4a16_g24"), 32, 64)
    assert "24 does not divide its 64 input features" in V1.refuses(packed.scheme, packed.shape)
    tensors, section = written(V1, packed)
    assert_same(read(tensors, section), packed)


@pytest.mark.parametrize(
    ("scheme", "shape", "says"),
    [
        ("w8a8", (32, 64), "no quantized activations"),
        ("w5a16", (32, 64), "stores 2, 3, 4, 8 bits, not 5"),
        ("w4a16", (12, 64), "multiple of 8 output features, not 12"),
        ("w4a16", (32, 60), "multiple of 8 input features, not 60"),
        ("w3a16", (48, 64), "multiple of 32 output features, not 48"),
        ("w4a16_g32", (32, 48), "group size 32 does not divide its 48 input features"),
    ],
)
def test_what_cannot_be_written(scheme, shape, says):
    for format in (V1, V2):
        assert says in format.refuses(Scheme.parse(scheme), shape)


def test_scales_are_stored_as_they_are_or_not_at_all():
    packed = random_packed(Scheme.parse("w4a16_g16"), 32, 64, dtype=torch.bfloat16)
    again = round_trip(V1, packed)
    assert again.scales.dtype == torch.float16
    assert torch.equal(again.scales.float(), packed.scales.float())
    for scale in (1e-9, 1e9):
        packed.scales[3, 2] = scale
        assert "1 of its 128 scales are torch.bfloat16 numbers that float16" in V1.refuses(
            packed.scheme, packed.shape, packed
        )


# ----------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"bits": 8}, FormatError, r"m\.qweight is I32 \[8, 32\], but must be I32 \[16, 32\]"),
        ({"bits": 3}, FormatError, r"m\.qweight is I32 \[8, 32\], but must be I32 \[6, 32\]"),
        ({"group_size": 32}, FormatError, r"m\.qzeros is I32 \[4, 4\], but must be I32 \[2, 4\]"),
        ({"group_size": -1}, FormatError, r"m\.qzeros is I32 \[4, 4\], but must be I32 \[1, 4\]"),
        ({"group_size": 0}, FormatError, "group size must be positive"),
        ({"bits": "4"}, FormatError, "gives m the bits '4'; it must be an integer"),
        ({"group_size": None}, FormatError, "gives m the group_size None"),
        ({"bits": 5}, UnsupportedError, "m: 5-bit int weights are not read"),
        ({"checkpoint_format": "gptq_p"}, UnsupportedError, "the GPTQ layout 'gptq_p' is not read"),
        ({"is_marlin_format": True}, UnsupportedError, "the GPTQ layout 'marlin' is not read"),
        ({"pack_dtype": "int16"}, UnsupportedError, "'int16' words"),
        ({"dynamic": {"-:m": {}}}, FormatError, r"m\.qweight is stored quantized.*excludes m .*rule '-:m' of dynamic"),
        (
            {"dynamic": {"+:m": {"bits": 8}}},
            FormatError,
            r"m\.qweight is I32.*the rule '\+:m' of dynamic makes m w8a16",
        ),
        ({"dynamic": {"m": 8}}, FormatError, "dynamic must map names to objects"),
        ({"dynamic": {"(": {}}}, FormatError, "not a regular expression"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:mlx"}, UnsupportedError, "'auto_round:mlx'"),
        ({"quant_method": "auto-round", "data_type": "mx_fp"}, UnsupportedError, "m: 4-bit mx_fp weights"),
        ({"quant_method": "auto-round", "act_bits": 8}, UnsupportedError, "m: 8-bit activations"),
        ({"quant_method": "auto-round", "extra_config": {"m": {"bits": 16}}}, FormatError, "excludes m .*extra_config"),
    ],
)
def test_a_config_that_contradicts_the_tensors(changes, error, says):
    tensors, section = written(V1, random_packed(Scheme.parse("w4a16_g16"), 32, 64))
    with pytest.raises(error, match=says):
        read(tensors, section | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"dynamic": {"-:n": {}, "+:.*m": {"group_size": 16}, "-:.*": {}}},  # the first rule that matches wins
        {"dynamic": {"m": {"group_size": 16}}},
        {"quant_method": "auto-round", "extra_config": {"m": {"group_size": 16}, "x": {"bits": 16}}},
        {"quant_method": "auto-round", "extra_config": {"^[lm]$": {"group_size": 16}}},
        {"quant_method": "intel/auto-round", "backend": "auto_round:exllamav2", "group_size": 16},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "group_size": 16},
    ],
)
def test_settings_of_one_module(changes):
    packed = random_packed(Scheme.parse("w4a16_g16"), 32, 64)
    tensors, section = written(V1, packed)
    assert_same(read(tensors, section | {"group_size": 64} | changes), packed)


@pytest.mark.parametrize(
    ("packing", "stored", "symmetric"),
    [
        ("auto_round:auto_gptq", V1, False),
        ("auto_round", V2, False),
        ("auto_round:gptqmodel", V2, False),
        ("auto_round:tritonv2", V1, False),  # says nothing about the version: 1, unless symmetric zero points tell
        ("auto_round:tritonv2", V1, True),
        ("auto_round:tritonv2", V2, True),
    ],
)
def test_layouts_of_auto_round(packing, stored, symmetric):
    packed = random_packed(Scheme(WeightType(4, symmetric, 16)), 32, 64, smallest_zero=1)
    tensors = {name: t for name, t in stored.write("m", packed).items() if name != "m.g_idx"}
    section = {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": symmetric, "packing_format": packing}
    assert_same(read(tensors, section), packed)


def test_a_section_inside_text_config():
    tensors, section = written(V1, random_packed(Scheme.parse("w4a16_g16"), 32, 64))
    headers = {n: TensorHeader(n, "F16" if "scales" in n else "I32", tuple(t.shape), "f") for n, t in tensors.items()}
    config = {"text_config": {"quantization_config": section}}
    assert V1.detect(config, headers)
    assert not V2.detect(config, headers)
    (site,) = V1.sites(config, headers, {"m": (32, 64)})
    assert str(site.scheme) == "w4a16_g16"


def test_tensors_that_contradict_each_other():
    tensors, section = written(V1, random_packed(Scheme.parse("w4a16_g16"), 32, 64))
    awq_shape = {"m.qweight": torch.zeros(64, 4, dtype=torch.int32)}
    for changed, claims, says in [
        ({"m.weight": torch.zeros(32, 64)}, {}, r"both m\.weight and m\.qweight"),
        ({"m.scales": tensors["m.scales"].int()}, {}, r"m\.scales is I32"),
        ({"m.qweight": tensors["m.qweight"][:-1]}, {}, r"m\.qweight is I32 \[7, 32\]"),
        (awq_shape, {}, "qweight has the shape of AWQ gemm"),
        ({"lm_head.qweight": torch.zeros(1, 8).int()}, {}, r"lm_head\.qweight is stored quantized.*\(lm_head\)"),
        ({"lm_head.weight": torch.zeros(8, 8)}, {"lm_head": True}, r"lm_head\.weight is float, but config\.json says"),
    ]:
        with pytest.raises(FormatError, match=says):
            read(tensors | changed, section | claims)
    for suffix in ("qweight", "qzeros", "scales"):
        with pytest.raises(FormatError, match=rf"m\.{suffix} is missing"):
            read({n: t for n, t in tensors.items() if n != f"m.{suffix}"}, section)
    with pytest.raises(UnsupportedError, match=r"x\.qweight belongs to a quantized module that is no Linear"):
        read(tensors | {"x.qweight": tensors["m.qweight"]}, section)
    tensors["m.scales"][1, 1] = float("nan")
    with pytest.raises(FormatError, match=r"m\.scales holds NaN"):
        read(tensors, section)


def test_modules_that_differ_get_rules():
    names = {"a.0": "w4a16_g32", "a.1": "w4a16_g32", "b": "w8a16_asym", "lm_head": "w4a16_g32"}
    sites = [StoredSite(n, Scheme.parse(s), (32, 64), (), {"permuted": n == "a.1"}) for n, s in names.items()]
    section = V2.quantization_config(sites, ["gate"])
    assert (section["bits"], section["group_size"], section["sym"], section["desc_act"]) == (4, 32, True, False)
    assert section["lm_head"] is True
    assert section["dynamic"] == {
        "-:^gate$": {},
        r"+:^a\.1$": {"desc_act": True},
        "+:^b$": {"bits": 8, "group_size": -1, "sym": False},
    }


# ------------------------------------------------------------------------------------------------- whole checkpoints

MIXED = {"q_proj": "w8a16_g32", "o_proj": "w2a16_g64_asym", "gate_proj": "w3a16_g32_asym", "down_proj": "w4a16"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small symmetric GPTQ checkpoint."""
    torch.manual_seed(0)
    model = quantize_linears(tiny_model())
    folder = tmp_path_factory.mktemp("gptq") / "w4"
    qcompile.save(model, folder, format="gptq")
    return model, folder


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("scheme", ["w4a16_g32", MIXED])
@pytest.mark.parametrize("head", [False, True])
def test_a_loaded_model_is_the_saved_one(format, scheme, head, tmp_path):
    if format == "gptq" and isinstance(scheme, dict):
        scheme = {name: each.removesuffix("_asym") for name, each in scheme.items()}
    model = quantize_linears(tiny_model(dtype=torch.float16, tie_word_embeddings=head), scheme, head=head)
    qcompile.save(model, tmp_path / "saved", format=format)
    loaded = qcompile.load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert {n: str(m.scheme) for n, m in quantized_modules(loaded).items()} == {
        n: str(m.scheme) for n, m in quantized_modules(model).items()
    }
    planned = qcompile.report(loaded).plan.quantized[0]
    assert planned.reason.startswith(f"stored as {format}")
    section = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert section == json.loads((tmp_path / "saved/quantize_config.json").read_text())


def test_nothing_is_written_that_gptq_cannot_express(tmp_path):
    for scheme, says in [
        ({"q_proj": "w4a16_g32", "k_proj": "w6a16"}, r"k_proj \(w6a16\) cannot be saved as gptq: GPTQ stores 2, 3"),
        ("w8a8", r"\(w8a8\) cannot be saved as gptq: GPTQ has no quantized activations"),
    ]:
        model = quantize_linears(tiny_model(), scheme)
        with pytest.raises(UnsupportedError, match=says):
            qcompile.save(model, tmp_path / "saved", format="gptq")
    model = quantize_linears(tiny_model(dtype=torch.float32))
    with pytest.raises(UnsupportedError, match=r"q_proj .* scales are torch\.float32 numbers that float16"):
        qcompile.save(model, tmp_path / "saved", format="gptq")
    assert not list(tmp_path.iterdir())


def test_the_side_file_serves_when_config_has_no_section(checkpoint, copied):
    config = json.loads((copied / "config.json").read_text())
    del config["quantization_config"]
    (copied / "config.json").write_text(json.dumps(config))
    side = json.loads((copied / "quantize_config.json").read_text())
    del side["quant_method"]  # as AutoGPTQ wrote it
    (copied / "quantize_config.json").write_text(json.dumps(side))
    assert torch.equal(logits(qcompile.load(copied)), logits(checkpoint[0]))
    (copied / "quantize_config.json").write_text("{")
    with pytest.raises(FormatError, match=r"quantize_config\.json is not readable JSON"):
        qcompile.load(copied)


def test_biases_that_the_model_does_not_have(checkpoint, copied):
    """AutoGPTQ stored zeros for every Linear; others, of smoothing with a shift, count."""
    name = "model.layers.0.mlp.up_proj.bias"
    change(copied, lambda tensors: tensors.update({name: torch.zeros(256, dtype=torch.float16)}))
    assert torch.equal(logits(qcompile.load(copied)), logits(checkpoint[0]))
    change(copied, lambda tensors: tensors[name].add_(1))
    loaded = qcompile.load(copied)
    assert torch.equal(loaded.get_submodule(name.removesuffix(".bias")).bias, torch.ones(256, dtype=torch.bfloat16))
    assert not torch.equal(logits(loaded), logits(checkpoint[0]))


def test_biases_are_kept(tmp_path):
    model = quantize_linears(tiny_model("qwen2", dtype=torch.float16))
    for module in quantized_modules(model).values():
        if module.bias is not None:
            torch.nn.init.normal_(module.bias)
    qcompile.save(model, tmp_path / "saved", format="gptq")
    assert torch.equal(logits(qcompile.load(tmp_path / "saved")), logits(model))


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "changes", "says"),
    [
        (None, {"checkpoint_format": "gptq_v2"}, r"q_proj\.qzeros stores 7,.*those of 'gptq'"),
        (None, {"bits": 8}, r"q_proj\.qweight is I32 \[16, 128\], but must be I32 \[32, 128\]"),
        (None, {"group_size": 64}, r"q_proj\.qzeros is I32 \[4, 16\], but must be I32 \[2, 16\]"),
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:-1].clone()}), {}, rf"{UP}\.qweight is I32 \[15,"),
        (lambda t: t.pop(f"{UP}.g_idx"), {"desc_act": True}, rf"{UP}\.g_idx is missing"),
        (lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"].float()}), {}, rf"{UP}\.g_idx is F32"),
        (lambda t: t[f"{UP}.g_idx"].add_(1), {"desc_act": True}, rf"{UP}\.g_idx names groups 1 to 4"),
        (lambda t: t[f"{UP}.scales"].fill_(float("nan")), {}, rf"{UP}\.scales holds NaN"),
        (lambda t: t[f"{UP}.scales"].fill_(float("inf")), {}, rf"{UP}\.scales holds NaN or infinity"),
        (lambda t: t.pop(f"{UP}.qzeros"), {}, rf"{UP}\.qzeros is missing"),
    ],
)
def test_damage(edit, changes, says, copied):
    if edit:
        change(copied, edit)
    change_config(copied, **changes)
    with pytest.raises(FormatError, match=says) as error:
        qcompile.load(copied)
    assert str(copied) in str(error.value)
    assert "model.safetensors" in str(error.value)


def test_uneven_groups_become_smaller_ones(copied, checkpoint, tmp_path):
    change(copied, lambda tensors: tensors[f"{UP}.g_idx"][:16].add_(1))
    change_config(copied, desc_act=True)
    model = qcompile.load(copied)
    planned = {result.planned.site.name: result.planned for result in qcompile.report(model).sites}[UP]
    assert str(planned.scheme) == "w4a16_g16"
    assert "its g_idx has uneven groups" in planned.reason
    packed, before = (m.get_submodule(UP).packed() for m in (model, checkpoint[0]))
    zero = torch.ones(128, dtype=torch.int64) * 8
    codes = numerics.unpack_codes(before.codes, 4, 128).long() - zero
    groups = torch.arange(128) // 32
    groups[:16] += 1
    expected = codes.to(packed.scales.dtype) * before.scales.to(packed.scales.dtype)[:, groups]
    assert torch.equal(numerics.dequantize_packed(packed), expected)
    qcompile.convert(copied, tmp_path / "converted", format="compressed-tensors")
    assert torch.equal(logits(qcompile.load(tmp_path / "converted")), logits(model))


# ---------------------------------------------------------------------------------------------------------- goldens


def weights(model) -> dict[str, torch.Tensor]:
    """Dequantized weights by name, in the dtype of the scales."""
    return {f"{n}.weight": numerics.dequantize_packed(m.packed()) for n, m in quantized_modules(model).items()}


def test_scales_that_a_kernel_rounds_are_reported(monkeypatch):
    folder = golden("gptq-v1-w4-g128-sym")  # float16 scales in a bfloat16 model
    monkeypatch.setattr(CPU, "kernels", tuple(kernel for kernel in CPU.kernels if kernel.name != "native"))
    says = r"the F16 scales of 14 sites are rounded to torch\.bfloat16.*dtype=torch\.float16"
    (note,) = qcompile.inspect(folder).notes
    assert re.search(says, note)
    reference = load_file(folder / "reference.safetensors")
    for name, weight in weights(qcompile.load(folder)).items():
        assert relative_error(weight, reference[name]) < 2**-8


@pytest.mark.parametrize("case", ["gptq-v1-w4-g128-sym", "gptq-v1-w4-g128-asym", "gptq-v2-w4-g128-asym"])
def test_golden_files_of_the_other_version(case, tmp_path):
    """Symmetric zero points give a wrong version away; nobody can tell from asymmetric ones."""
    folder = Path(shutil.copytree(golden(case), tmp_path / "copied"))
    change_config(folder, checkpoint_format="gptq" if "v2" in case else "gptq_v2")
    if "asym" in case:
        qcompile.load(folder, dtype=torch.float16)
        return
    with pytest.raises(FormatError, match=r"qzeros stores 7,.*'gptq_v2' and sym"):
        qcompile.load(folder)
