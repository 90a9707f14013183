"""The format compressed-tensors: against its own package, against files that llm-compressor wrote, and malformed."""

import json
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from hypothesis import given
from hypothesis import strategies as st

import qcompile
from qcompile import numerics
from qcompile.errors import FormatError, UnsupportedError
from qcompile.formats import StoredSite, TensorHeader
from qcompile.formats.compressed_tensors import FORMAT
from qcompile.modules import quantized_modules
from qcompile.storage import DTYPES
from qcompile.types import PackedWeight, Scheme, WeightType

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def golden(case: str) -> Path:
    """The folder of a checkpoint that another tool wrote."""
    if not (GOLDEN / case).is_dir():
        pytest.skip(f"the golden checkpoint {case} is not on this machine (looked in {GOLDEN})")
    return GOLDEN / case


def random_packed(
    scheme: Scheme, out: int, inn: int, *, permuted: bool = False, dtype: torch.dtype = torch.bfloat16
) -> PackedWeight:
    """Any canonical weight: all codes, negative and zero scales, all zero points."""
    weight = scheme.weight
    codes = torch.randint(0, 2**weight.bits, (out, inn)).to(torch.uint8)
    scales = torch.randn(out, weight.groups(inn)).to(dtype)
    scales[0] = 0
    zeros = None if weight.symmetric else torch.randint(0, 2**weight.bits, scales.shape).to(torch.uint8)
    permutation = None
    if permuted:
        groups = torch.arange(inn) // (weight.group_size or inn)
        permutation = torch.argsort(groups[torch.randperm(inn)], stable=True).to(torch.int32)
    return PackedWeight(scheme, (out, inn), numerics.pack_codes(codes, weight.bits), scales, zeros, permutation)


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
    again = round_trip(packed)
    assert again.scheme == packed.scheme
    for name, tensor in packed.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name


@given(BITS, st.booleans(), st.sampled_from([None, 4, 16]), SIZES, SIZES)
def test_a_permuted_weight_keeps_its_values(bits, symmetric, group, out, inn):
    packed = random_packed(Scheme(WeightType(bits, symmetric, group)), out, inn, permuted=True)
    again = round_trip(packed)
    assert torch.equal(numerics.dequantize_packed(again), numerics.dequantize_packed(packed))
    assert again.permutation is None if group is None else True


def test_int8_activations_are_stored_as_int8():
    packed = random_packed(Scheme.parse("w8a8"), 24, 40, dtype=torch.float32)
    tensors = FORMAT.write("m", packed)
    assert {n: t.dtype for n, t in tensors.items()} == {"m.weight": torch.int8, "m.weight_scale": torch.float32}
    again = round_trip(packed)
    assert again.scheme == packed.scheme
    assert torch.equal(again.codes, packed.codes)


@given(BITS, SIZES, SIZES)
def test_words_are_those_of_the_package(bits, out, inn):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed = random_packed(Scheme(WeightType(bits, False, 8)), out, inn)
    codes = numerics.unpack_codes(packed.codes, bits, inn).to(torch.int16) - 2 ** (bits - 1)
    zeros = packed.zeros.to(torch.int16) - 2 ** (bits - 1)
    tensors = FORMAT.write("m", packed)
    assert torch.equal(tensors["m.weight_packed"], pack_to_int32(codes.to(torch.int8), bits))
    assert torch.equal(tensors["m.weight_zero_point"], pack_to_int32(zeros.to(torch.int8), bits, packed_dim=0))


@given(BITS, st.booleans(), st.sampled_from([None, 16]), SIZES)
def test_the_package_decompresses_what_is_written(bits, symmetric, group, out):
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    packed = random_packed(Scheme(WeightType(bits, symmetric, group)), out, 48)
    tensors = FORMAT.write("m", packed)
    section = FORMAT.quantization_config([StoredSite("m", packed.scheme, packed.shape, tuple(tensors))], [])
    scheme = QuantizationScheme.model_validate(section["config_groups"]["group_0"])
    state = {name.removeprefix("m."): tensor for name, tensor in tensors.items()}
    weight = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(weight, numerics.dequantize_packed(packed))


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


G32 = {"num_bits": 4, "strategy": "group", "group_size": 32}
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (section_for({"num_bits": 8, "type": "float", "strategy": "channel"}), "m: weights are 8-bit float"),
        (section_for({"num_bits": 4, "type": "float", "strategy": "tensor_group"}), "m: weights are 4-bit float"),
        (section_for({"num_bits": 8, "strategy": "block"}), "m: weights are quantized per block"),
        (section_for(G32, TOKEN), "m: qcompile has no such scheme yet: int8 activations go with"),
        (section_for({"num_bits": 8, "strategy": "channel"}, TOKEN | {"dynamic": False}), "m: it has static 8-bit"),
        (section_for({"num_bits": 8, "strategy": "channel"}, TOKEN | {"type": "float"}), "8-bit float activations"),
        (section_for({"num_bits": 8, "strategy": "channel"}, TOKEN | {"symmetric": False}), "not symmetric per token"),
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
        (section_for(G32 | {"group_size": 64}), r"weight_scale is BF16 \[16, 2\], but must be .* \[16, 1\]"),
        (section_for(G32 | {"num_bits": 8}), r"weight_packed is I32 \[16, 8\], but must be I32 \[16, 16\]"),
        (section_for(G32 | {"symmetric": False}), r"m\.weight_zero_point is missing"),
        (section_for(G32 | {"actorder": "group"}), r"m\.weight_g_idx is missing"),
        (section_for(G32, format="int-quantized"), r"m\.weight is missing"),
        (section_for(G32, ignore=["m"]), r"m\.weight.* is stored quantized, but config\.json ignores m"),
        (section_for(G32, targets=["other"]), "no group that targets it"),
        (section_for(G32, targets=["re:("]), "not a regular expression"),
        (section_for(G32 | {"group_size": "x", "strategy": None}), "group_size 'x'"),
        (section_for(G32 | {"group_size": 0}), "group_size 0"),
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
        ({"m.weight_g_idx": torch.zeros(64, dtype=torch.int32)}, "weight_g_idx must assign 32 columns"),
        ({"m.weight_g_idx": tensors["m.weight_g_idx"] + 1}, "weight_g_idx must assign 32 columns"),
    ]:
        with pytest.raises(FormatError, match=says):
            FORMAT.read(site, (tensors | changed).__getitem__)
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


# ---------------------------------------------------------------------------------------------------------- goldens

READABLE = ["ct-w4a16-asym-g128-awq", "ct-w4a16-sym-g128-gptq-actorder-group", "ct-w4a16-sym-g128-rtn"]


@pytest.mark.parametrize("case", READABLE)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_golden_weights_and_logits(case, dtype):
    from safetensors.torch import load_file

    folder = golden(case)
    reference = load_file(folder / "reference.safetensors")
    model = qcompile.load(folder, dtype=dtype)
    modules = quantized_modules(model)
    assert {f"{name}.weight" for name in modules} == reference.keys() - {"input_ids", "logits"}
    for name, module in modules.items():
        assert torch.equal(numerics.dequantize_packed(module.packed()), reference[f"{name}.weight"]), name
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    assert relative_error(logits, reference["logits"]) < 0.02  # the peer ran in bfloat16


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("ct-fp8-static", "weights are 8-bit float"),
        ("ct-mixed-w4-attn-w8-mlp", r"mlp\.gate_proj: weights are 8-bit float"),
        ("ct-mxfp4", "weights are 4-bit float"),
        ("ct-nvfp4", "weights are 4-bit float"),
        ("ct-w4a8-int-g128", "int8 activations go with"),
        ("ct-w8a8-int8-static", "static 8-bit int activations"),
        ("ct-w8a8-int8-dynamic-smoothquant-gptq-moe", "mixture of experts"),
    ],
)
def test_golden_files_of_other_schemes_are_refused(case, says):
    folder = golden(case)
    with pytest.raises(UnsupportedError, match=says) as error:
        qcompile.inspect(folder)
    assert "model.layers" in str(error.value)


@pytest.mark.parametrize("case", READABLE)
def test_golden_files_are_saved_as_they_were(case, tmp_path):
    from safetensors.torch import load_file

    folder = golden(case)
    qcompile.save(qcompile.load(folder), tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in before.items():
        if name.endswith("weight_g_idx") and not tensor.any():
            assert name not in after  # one group has no order to keep
            continue
        assert torch.equal(tensor, after.pop(name)), name
    assert not after
    tokenizer = "tokenizer_config.json"
    assert json.loads((folder / tokenizer).read_text()) == json.loads((tmp_path / "again" / tokenizer).read_text())
