"""The format compressed-tensors: against its own package, against files that llm-compressor wrote, and malformed."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stored import assert_same, random_packed

from qcompile import numerics
from qcompile.errors import FormatError, UnsupportedError
from qcompile.formats import StoredSite, TensorHeader
from qcompile.formats.compressed_tensors import FORMAT
from qcompile.storage import DTYPES
from qcompile.types import PackedWeight, Scheme, WeightType

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def stored(name: str, packed: PackedWeight, tensors=None, section=None):
    """The site that config and headers of one written weight describe, and its tensors."""
    tensors = FORMAT.write(name, packed) if tensors is None else tensors
    section = section or FORMAT.quantization_config(
        [StoredSite(name, packed.scheme, packed.shape, tuple(tensors))], ["lm_head"]
    )
    headers = {n: TensorHeader(n, NAMES[t.dtype], tuple(t.shape), "model.safetensors") for n, t in tensors.items()}
    sites = FORMAT.sites({"quantization_config": section}, headers, {name: packed.shape, "lm_head": (8, 8)})
    return sites, tensors


def round_trip(packed: PackedWeight) -> PackedWeight:
    (site,), tensors = stored("layer.proj", packed)
    assert set(site.tensors) == set(tensors)
    return FORMAT.read(site, tensors.__getitem__)


SIZES = st.integers(1, 70)
BITS = st.integers(2, 8)


@given(BITS, st.booleans(), st.sampled_from([None, 1, 4, 16, 32, 128]), SIZES, SIZES)
def test_what_is_written_is_read(bits, symmetric, group, out, inn):
    packed = random_packed(Scheme(WeightType(bits, symmetric, group)), out, inn)
    assert_same(round_trip(packed), packed)


SCHEMES = [
    "w8a8", "w8a8_static", "w8a8_static_sym", "w8a8_dynamic_asym", "w8a8_asym", "w4a8", "w4a8_g16", "w4a8_g16_asym",
    "w4a8_clip", "w4a4", "w3a8_static", "wfp8a16", "wfp8a16_tensor", "wfp8a16_g32", "wfp8a16_b16x32", "wfp8afp8",
    "wfp8afp8_tensor_static", "wfp8afp8_static", "wfp8afp8_b8x16", "wnvfp4a16", "wnvfp4anvfp4", "wmxfp4a16",
    "wmxfp4amxfp4", "wmxfp8a16", "wmxfp8amxfp8",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_read_as_it_was_written(scheme, dtype):
    packed = random_packed(scheme, 40, 96, dtype=dtype)
    assert_same(round_trip(packed), packed)


@given(BITS, st.booleans(), st.sampled_from([None, 4, 16]), SIZES, SIZES)
def test_a_permuted_weight_keeps_its_values(bits, symmetric, group, out, inn):
    packed = random_packed(Scheme(WeightType(bits, symmetric, group)), out, inn, permuted=True)
    again = round_trip(packed)
    assert torch.equal(numerics.dequantize_packed(again), numerics.dequantize_packed(packed))
    assert again.permutation is None if group is None else True


def test_int8_activations_are_stored_as_int8():
    packed = random_packed("w8a8_static", 24, 40, dtype=torch.float32)
    tensors = FORMAT.write("m", packed)
    kinds = {name.removeprefix("m."): (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert kinds == {
        "weight": (torch.int8, (24, 40)),
        "weight_scale": (torch.float32, (24, 1)),
        "input_scale": (torch.float32, (1,)),
        "input_zero_point": (torch.int8, (1,)),
    }


def test_an_input_scale_keeps_the_dtype_of_the_scales_where_that_loses_nothing():
    packed = random_packed("w8a8_static_sym", 8, 16, dtype=torch.bfloat16)
    assert FORMAT.write("m", packed)["m.input_scale"].dtype == torch.float32
    exact = dataclasses.replace(packed, input_scale=torch.tensor([0.5]))
    assert FORMAT.write("m", exact)["m.input_scale"].dtype == torch.bfloat16


@given(BITS, SIZES, SIZES)
def test_words_are_those_of_the_package(bits, out, inn):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed = random_packed(Scheme(WeightType(bits, False, 8)), out, inn)
    codes = numerics.unpack_codes(packed.codes, bits, inn).to(torch.int16) - 2 ** (bits - 1)
    zeros = packed.zeros.to(torch.int16) - 2 ** (bits - 1)
    tensors = FORMAT.write("m", packed)
    assert torch.equal(tensors["m.weight_packed"], pack_to_int32(codes.to(torch.int8), bits))
    assert torch.equal(tensors["m.weight_zero_point"], pack_to_int32(zeros.to(torch.int8), bits, packed_dim=0))


def package_weight(scheme: Scheme, tensors: dict[str, torch.Tensor], section: dict) -> torch.Tensor:
    """What the package's own decompression makes of the tensors of "m"."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    group = section["config_groups"]["group_0"]
    described = QuantizationScheme.model_validate({k: v for k, v in group.items() if k != "activation_use_clip"})
    state = {name.removeprefix("m."): tensor for name, tensor in tensors.items()}
    return BaseCompressor.get_value_from_registry(group["format"]).decompress(state, described)["weight"]


def section_of(packed: PackedWeight, tensors: dict[str, torch.Tensor]) -> dict:
    return FORMAT.quantization_config([StoredSite("m", packed.scheme, packed.shape, tuple(tensors))], [])


@given(BITS, st.booleans(), st.sampled_from([None, 16]), SIZES)
def test_the_package_decompresses_integers_as_they_are_written(bits, symmetric, group, out):
    packed = random_packed(Scheme(WeightType(bits, symmetric, group)), out, 48)
    tensors = FORMAT.write("m", packed)
    weight = package_weight(packed.scheme, tensors, section_of(packed, tensors))
    assert torch.equal(weight, numerics.dequantize_packed(packed))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_package_decompresses_every_scheme_as_it_is_written(scheme):
    packed = random_packed(scheme, 32, 96, dtype=torch.bfloat16)
    tensors = FORMAT.write("m", packed)
    weight = package_weight(packed.scheme, tensors, section_of(packed, tensors))
    assert torch.equal(weight, numerics.dequantize_packed(packed, weight.dtype))


@pytest.mark.parametrize("inn", [96, 12])  # 12 codes take as many words in both layouts: the version decides
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_padded_words_of_old_versions(bits, inn):
    packed = random_packed(Scheme(WeightType(bits, False, 32)), 60, inn)
    tensors, per_word = FORMAT.write("m", packed), 32 // bits

    def padded(codes: torch.Tensor) -> torch.Tensor:
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word)).long().unflatten(-1, (-1, per_word))
        return (codes << (torch.arange(per_word) * bits)).sum(-1).to(torch.int32)

    tensors["m.weight_packed"] = padded(numerics.unpack_codes(packed.codes, bits, inn))
    tensors["m.weight_zero_point"] = padded(packed.zeros.t()).t().contiguous()
    weights = {"num_bits": bits, "symmetric": False, "strategy": "group", "group_size": 32}
    (site,), _ = stored("m", packed, tensors, section_for(weights, version="0.17.1"))
    again = FORMAT.read(site, tensors.__getitem__)
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(again.zeros, packed.zeros)


@pytest.mark.parametrize("layout", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_weights_alone_as_int8(layout, bits):
    packed = random_packed(Scheme(WeightType(bits, False, 16)), 20, 48)
    signed = numerics.unpack_codes(packed.codes, bits, 48).to(torch.int16) - 2 ** (bits - 1)
    tensors = {
        "m.weight": signed.to(torch.int8),
        "m.weight_scale": packed.scales,
        "m.weight_zero_point": (packed.zeros.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8),
    }
    section = section_for({"num_bits": bits, "symmetric": False, "strategy": "group", "group_size": 16}, format=layout)
    (site,), _ = stored("m", packed, tensors, section)
    again = FORMAT.read(site, tensors.__getitem__)
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(again.zeros, packed.zeros)
    if bits < 8:
        tensors["m.weight"][3, 3] = 2 ** (bits - 1)
        with pytest.raises(FormatError, match=r"m\.weight holds numbers outside"):
            FORMAT.read(site, tensors.__getitem__)


# ----------------------------------------------------------------------------------------------------------- config


def section_for(weights: dict, inputs: dict | None = None, targets=("Linear",), format="pack-quantized", **changes):
    """A quantization_config with one group."""
    group = {"targets": list(targets), "weights": {"type": "int", **weights}, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **changes,
    }


FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
G32 = {"num_bits": 4, "strategy": "group", "group_size": 32}
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (section_for(FP8), "m: layout 'pack-quantized' of compressed-tensors is not read for wfp8a16"),
        (section_for(FP8 | {"num_bits": 6, "strategy": "group", "group_size": 32}), "m: weights are 6-bit float in"),
        (section_for(FP8 | {"strategy": "block", "block_structure": [8, 16]}, TOKEN | {"type": "float"}), "has blocks"),
        (section_for({"num_bits": 8, "strategy": "block"}), "m: weights are 8-bit int, quantized per block"),
        (section_for({"num_bits": 8, "strategy": "channel"}, TOKEN | {"dynamic": False}), "m: it has static 8-bit int"),
        (section_for({"num_bits": 8, "strategy": "channel"}, TOKEN | {"strategy": "tensor"}), "dynamic .* per tensor"),
        (section_for({"num_bits": 8, "strategy": "channel"}, TOKEN | {"type": "float"}), "fp8 activations go with fp8"),
        (
            section_for({"num_bits": 4, "strategy": "channel"}, TOKEN | {"num_bits": 6}),
            "activation bits must be 4 or 8",
        ),
        (section_for({"num_bits": 16, "strategy": "channel"}), "weight bits must be 2 to 8"),
        (section_for({"num_bits": 8, "symmetric": False, "strategy": "tensor"}), "asymmetric with one scale"),
        (section_for(G32, format="marlin-24"), "m: layout 'marlin-24'"),
        (section_for(G32, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (section_for(G32, transform_config={"config_groups": {"R1": {}}}), "transform_config"),
        (section_for(G32, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (section_for(G32, quantization_status="frozen"), "quantization_status is 'frozen'"),
        (section_for(G32) | {"config_groups": {"W4A16": ["Linear"]}}, "preset"),
    ],
)
def test_what_is_not_supported_says_so(section, says):
    packed = random_packed(Scheme.parse("w4a16_g32"), 16, 64)
    with pytest.raises(UnsupportedError, match=says):
        stored("m", packed, section=section)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (section_for(G32 | {"group_size": 64}), r"weight_scale is F16 \[16, 2\], but must be .* \[16, 1\]"),
        (section_for(G32 | {"num_bits": 8}), r"weight_packed is I32 \[16, 8\], but must be I32 \[16, 16\]"),
        (section_for(G32 | {"symmetric": False}), r"m\.weight_zero_point is missing"),
        (section_for(G32 | {"actorder": "group"}), r"m\.weight_g_idx is missing"),
        (section_for(G32, format="int-quantized"), r"m\.weight is missing"),
        (section_for(G32, ignore=["m"]), r"m\.weight.* is stored quantized, but config\.json ignores m"),
        (section_for(G32, targets=["other"]), "no group that targets it"),
        (section_for(G32, targets=["re:("]), "not a regular expression"),
        (section_for(G32 | {"group_size": "x", "strategy": None}), "group_size 'x'"),
        (section_for(G32 | {"group_size": 0}), "group_size 0"),
        (section_for(G32 | {"num_bits": "4"}), "num_bits '4'"),
        (section_for(FP8 | {"strategy": "block", "block_structure": [8]}), r"block_structure \[8\]"),
        (section_for(G32, ignore="lm_head"), "ignore must be a list of names"),
        (section_for(G32) | {"config_groups": {}}, "no config_groups"),
    ],
)
def test_a_config_that_contradicts_the_tensors(section, says):
    packed = random_packed(Scheme.parse("w4a16_g32"), 16, 64)
    with pytest.raises(FormatError, match=says):
        stored("m", packed, section=section)


def test_tensors_that_contradict_each_other():
    packed = random_packed(Scheme.parse("w4a16_g32"), 16, 64)
    tensors = FORMAT.write("m", packed)
    for changed, says in [
        ({"m.weight": torch.zeros(16, 64)}, r"both m\.weight and m\.weight_packed"),
        ({"m.weight_scale": packed.scales.int()}, r"m\.weight_scale is I32"),
        ({"lm_head.weight": torch.zeros(8, 8, dtype=torch.int8)}, r"lm_head\.weight is stored quantized"),
        ({"x.weight_packed": tensors["m.weight_packed"]}, None),
    ]:
        error = UnsupportedError if says is None else FormatError
        with pytest.raises(error, match=says or "no Linear of this model"):
            stored("m", packed, tensors | changed)
    with pytest.raises(FormatError, match=r"m\.weight is float \(F32\), but config group 'group_0' targets m"):
        stored("m", packed, {"m.weight": torch.zeros(16, 64)}, section_for(G32))


def test_damaged_data():
    packed = random_packed(Scheme.parse("w4a16_g32"), 16, 64, permuted=True)
    (site,), tensors = stored("m", packed)
    for changed, says in [
        ({"m.weight_scale": packed.scales.index_fill(0, torch.tensor([3]), float("nan"))}, "weight_scale holds NaN"),
        ({"m.weight_shape": torch.tensor([16, 63])}, r"weight_shape says \[16, 63\]"),
        ({"m.weight_g_idx": tensors["m.weight_g_idx"] + 1}, "weight_g_idx names groups 1 to 2, but there are 2"),
        ({"m.weight_g_idx": tensors["m.weight_g_idx"] - 1}, "weight_g_idx names groups -1 to 0, but there are 2"),
    ]:
        with pytest.raises(FormatError, match=says):
            FORMAT.read(site, (tensors | changed).__getitem__)
    uneven = torch.arange(64, dtype=torch.int32).ge(24).int()  # 24 and 40 columns: eights
    again = FORMAT.read(site, (tensors | {"m.weight_g_idx": uneven}).__getitem__)
    assert str(again.scheme) == "w4a16_g8"
    assert torch.equal(again.scales, packed.scales[:, [0] * 3 + [1] * 5])
    unordered = tensors | {"m.weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    assert FORMAT.read(site, unordered.__getitem__).permutation is None


def test_the_closest_target_wins_and_ignore_wins_over_it():
    def group(bits, *targets):
        return section_for({"num_bits": bits, "strategy": "channel"}, targets=targets)["config_groups"]["group_0"]

    groups = {"a": group(8, "Linear"), "b": group(4, "re:.*proj"), "c": group(2, "x.q_proj")}
    section = section_for({}) | {"config_groups": groups, "ignore": ["re:.*gone.*"], "format": "mixed-precision"}
    bits = {"x.q_proj": 2, "x.k_proj": 4, "x.head": 8}
    tensors = {}
    for name, n in bits.items():
        tensors |= FORMAT.write(name, random_packed(Scheme(WeightType(n)), 8, 32))
    headers = {n: TensorHeader(n, NAMES[t.dtype], tuple(t.shape), "f") for n, t in tensors.items()}
    headers["x.gone_proj.weight"] = TensorHeader("x.gone_proj.weight", "BF16", (8, 32), "f")
    linears = dict.fromkeys([*bits, "x.gone_proj"], (8, 32))
    sites = FORMAT.sites({"quantization_config": section}, headers, linears)
    assert {site.name: site.scheme.weight.bits for site in sites} == bits


def test_one_scale_for_a_whole_weight():
    packed = random_packed(Scheme.parse("w8a8"), 8, 32)
    tensors = FORMAT.write("m", packed) | {"m.weight_scale": torch.tensor([0.5])}
    section = section_for({"num_bits": 8, "strategy": "tensor"}, TOKEN, format="int-quantized")
    (site,), _ = stored("m", packed, tensors, section)
    assert torch.equal(FORMAT.read(site, tensors.__getitem__).scales, torch.full((8, 1), 0.5))


def test_several_schemes_name_their_modules():
    sites = [
        StoredSite(name, Scheme.parse(scheme), (8, 32), ())
        for name, scheme in {"a": "w4a16_g32", "b": "w8a8", "c": "w4a16_g32"}.items()
    ]
    section = FORMAT.quantization_config(sites, ["lm_head"])
    assert section["format"] == "mixed-precision"
    assert section["ignore"] == ["lm_head"]
    groups = {tuple(group["targets"]): group["format"] for group in section["config_groups"].values()}
    assert groups == {("a", "c"): "pack-quantized", ("b",): "int-quantized"}


# ------------------------------------------------------------------------------------------ experts of the CANN recipes


def recipe(packed: PackedWeight, *, alpha: bool) -> dict[str, torch.Tensor]:
    """One expert's Linear as the recipes' converter writes it: pairs of rows, bits of scales, a correction."""
    signed = numerics.unpack_codes(packed.codes, 4, packed.shape[1]).to(torch.int16) - 8
    pairs = (signed[0::2] & 15) | (signed[1::2] << 4)
    return {
        "m.weight": torch.where(pairs > 127, pairs - 256, pairs).to(torch.int8),
        "m.weight_scale": packed.scales.view(torch.int32).to(torch.int64),
        "m.bias": 8 * numerics.dequantize_packed(packed).sum(1),
        **({"m.a_alpha": torch.tensor(0.75)} if alpha else {}),
    }


def recipe_section(*, clip: bool) -> dict:
    """The two groups of such a file."""
    linear = section_for({"num_bits": 8, "strategy": "channel"}, TOKEN, format="int-quantized")
    experts = section_for({"num_bits": 4, "strategy": "channel"}, TOKEN, ["MoEGMM"])["config_groups"]["group_0"]
    linear["config_groups"]["group_1"] = experts | {"activation_use_clip": clip}
    return linear


def of_recipe(tensors, section, shape=(16, 32)):
    headers = {n: TensorHeader(n, NAMES[t.dtype], tuple(t.shape), "f") for n, t in tensors.items()}
    return FORMAT.sites({"quantization_config": section}, headers, {"m": shape}, {"m"})


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("method", ["compressed-tensors", "modelslim"])  # the servers that read it want the latter
def test_experts_of_the_recipes(clip, method):
    packed = random_packed("w4a8", 16, 32, dtype=torch.float32)
    tensors = recipe(packed, alpha=clip)
    (site,) = of_recipe(tensors, recipe_section(clip=clip) | {"quant_method": method})
    assert str(site.scheme) == ("w4a8_clip" if clip else "w4a8")
    assert set(site.tensors) == set(tensors)
    again = FORMAT.read(site, tensors.__getitem__)
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(again.scales, packed.scales)
    assert again.alpha is None if not clip else again.alpha.tolist() == [0.75]
    assert FORMAT.read_bias(site, tensors.__getitem__) is None  # it corrects the hardware's offset
    unsigned = {n: t.view(torch.uint64) if t.dtype == torch.int64 else t for n, t in tensors.items()}
    (site,) = of_recipe(unsigned, recipe_section(clip=clip))
    assert torch.equal(FORMAT.read(site, unsigned.__getitem__).scales, packed.scales)
    assert_same(round_trip(again), again)


def test_experts_of_the_recipes_that_contradict_themselves():
    packed = random_packed("w4a8", 16, 32, dtype=torch.float32)
    tensors = recipe(packed, alpha=True)
    with pytest.raises(FormatError, match="a clip is stored for m, but its group does not say activation_use_clip"):
        of_recipe(tensors, recipe_section(clip=False))
    (site,) = of_recipe(tensors, recipe_section(clip=True))
    with pytest.raises(FormatError, match=r"m\.bias is not the correction"):
        FORMAT.read(site, (tensors | {"m.bias": tensors["m.bias"] + 1}).__getitem__)
    tensors = recipe(packed, alpha=False)
    headers = {n: TensorHeader(n, NAMES[t.dtype], tuple(t.shape), "f") for n, t in tensors.items()}
    with pytest.raises(FormatError, match=r"m\.weight_scale is I64 .*: config group 'group_0' makes m w8a8"):
        FORMAT.sites({"quantization_config": recipe_section(clip=False)}, headers, {"m": (16, 32)})  # not an expert
