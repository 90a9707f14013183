"""The format awq: against the published layouts, against files of AutoAWQ and gptqmodel, and malformed."""

import json

import pytest
import torch
from helpers import logits, quantize_linears, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from stored import assert_same, change, change_config, described, random_packed, round_trip, written

import qcompile
from qcompile import numerics
from qcompile.errors import FormatError, UnsupportedError
from qcompile.formats import StoredSite, TensorHeader
from qcompile.formats.awq import FORMAT
from qcompile.modules import quantized_modules
from qcompile.types import PackedWeight, Scheme, WeightType

# ------------------------------------------------------------------------------------------------------ one module


@given(st.booleans(), st.sampled_from([None, 1, 16, 32]), st.integers(1, 5), st.integers(1, 3))
def test_what_is_written_is_read(symmetric, group, out, inn):
    packed = random_packed(Scheme(WeightType(4, symmetric, group)), 8 * out, 32 * inn)
    assert_same(round_trip(FORMAT, packed), packed)


def nibble(word: int, k: int) -> int:
    """The 4 bits of a signed word at shift 4 * k."""
    return (word >> (4 * k)) & 15


def numbers(packed: PackedWeight) -> tuple[list, list, list]:
    """Codes, zero points and scales as lists of rows."""
    zeros = packed.zeros if packed.zeros is not None else torch.full(packed.scales.shape, 8)
    return numerics.unpack_codes(packed.codes, 4, packed.shape[1]).tolist(), zeros.tolist(), packed.scales.tolist()


def signed(words: list[list[int]], bits: int) -> torch.Tensor:
    limit = 1 << (bits - 1)
    values = [[(word + limit) % (2 * limit) - limit for word in row] for row in words]
    return torch.tensor(values, dtype={16: torch.int16, 32: torch.int32}[bits])


def test_every_bit_of_gemm_is_where_the_description_puts_it():
    packed = random_packed(Scheme.parse("w4a16_g16_asym"), 24, 32)
    codes, zeros, scales = numbers(packed)
    tensors = {name: tensor.tolist() for name, tensor in FORMAT.write("m", packed).items()}
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    for c in range(3):
        for k, column in enumerate(order):
            o = 8 * c + column
            assert [nibble(row[c], k) for row in tensors["m.qweight"]] == codes[o]
            assert [nibble(row[c], k) for row in tensors["m.qzeros"]] == zeros[o]
    assert [list(column) for column in zip(*tensors["m.scales"], strict=True)] == scales


def padded_groups(packed: PackedWeight) -> int:
    size, groups = packed.scheme.weight.group_size or packed.shape[1], packed.scales.shape[1]
    multiple = 4 if size == 32 else 2 if size == 64 else 1
    words = (groups + 7) // 8
    return 8 * ((words + multiple - 1) // multiple * multiple)


def gemv(packed: PackedWeight) -> dict[str, torch.Tensor]:
    """The tensors of the layout gemv, number by number."""
    codes, zeros, _ = numbers(packed)
    width = padded_groups(packed)
    zeros = [row + [0] * (width - len(row)) for row in zeros]

    def words(rows):
        return signed(
            [[sum(row[8 * c + k] << 4 * k for k in range(8)) for c in range(len(row) // 8)] for row in rows], 32
        )

    scales = torch.nn.functional.pad(packed.scales, (0, width - packed.scales.shape[1]))
    return {"m.qweight": words(codes), "m.qzeros": words(zeros), "m.scales": scales}


def fast(packed: PackedWeight, zeros_name: str = "qzeros") -> dict[str, torch.Tensor]:
    """The tensors of the layouts gemv_fast and llm-awq, number by number."""
    (out, inn), (codes, zeros, _) = packed.shape, numbers(packed)
    rows = [[0] * inn for _ in range(out)]
    for o in range(out):
        for i in range(inn):
            a, b, c = i % 32 // 8, i % 8 // 2, i % 2
            among = 8 * b + 2 * a + c  # 0, 1, 8, 9, 16, 17, 24, 25, 2, 3 ...
            place = among // 8 * 8 + (among % 2) * 4 + among % 8 // 2  # 0, 2, 4, 6, 1, 3, 5, 7
            rows[o][i // 32 * 32 + place] = codes[o][i]
    words = []
    for r in range(out // 4):
        flat = [rows[4 * r + row][64 * block + k] for block in range(inn // 64) for row in range(4) for k in range(64)]
        words.append([sum(flat[4 * c + t] << 4 * t for t in range(4)) for c in range(inn)])
    padding = (0, padded_groups(packed) - packed.scales.shape[1])
    scaled = (-(packed.scales.float() * torch.tensor(zeros))).to(packed.scales.dtype)
    return {
        "m.qweight": signed(words, 16),
        f"m.{zeros_name}": torch.nn.functional.pad(scaled, padding).t().contiguous(),
        "m.scales": torch.nn.functional.pad(packed.scales, padding).t().contiguous(),
    }


def section_for(packed: PackedWeight, version: str | None = None, **changes) -> dict:
    section = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": packed.scheme.weight.group_size or -1,
        "zero_point": not packed.scheme.weight.symmetric,
        "version": version,
    }
    return {key: value for key, value in (section | changes).items() if value is not None}


def read(tensors, section, shape) -> PackedWeight:
    (site,) = described(FORMAT, tensors, shape, section)
    return FORMAT.read(site, tensors.__getitem__)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 32, 64, 128])
@pytest.mark.parametrize("version", ["gemv", "GEMV", "gemv_fast", "gemv-fast", "llm-awq", "LLM_AWQ"])
def test_layouts_that_are_read_only(version, group, symmetric):
    packed = random_packed(Scheme(WeightType(4, symmetric, group)), 12, 384)
    if version.lower() == "gemv":
        tensors = gemv(packed)
    else:
        packed.scales[0] = -0.5  # of a scale of 0 the zero point is lost in these layouts
        tensors = fast(packed, "scaled_zeros" if "llm" in version.lower() else "qzeros")
    assert_same(read(tensors, section_for(packed, version), packed.shape), packed)


def test_a_scale_of_zero_in_gemv_fast():
    packed = random_packed(Scheme.parse("w4a16_g64_asym"), 12, 128)
    again = read(fast(packed), section_for(packed, "gemv_fast"), packed.shape)
    assert torch.equal(numerics.dequantize_packed(again), numerics.dequantize_packed(packed))


def test_sizes_that_gemv_fast_does_not_pack():
    packed = random_packed(Scheme.parse("w4a16_g16"), 16, 32)
    tensors = {
        "m.qweight": torch.zeros(4, 32, dtype=torch.int16),
        "m.qzeros": torch.zeros(8, 16, dtype=torch.float16),
        "m.scales": torch.ones(8, 16, dtype=torch.float16),
    }
    with pytest.raises(UnsupportedError, match=r"m: 'gemv_fast' or 'llm_awq' packs 4 rows by 64 columns"):
        read(tensors, section_for(packed, "gemv_fast"), packed.shape)


def test_zero_points_that_are_no_integers():
    packed = random_packed(Scheme.parse("w4a16_g64_asym"), 12, 128)
    for wrong in (torch.ones(16, 12).half(), torch.full((16, 12), float("nan")).half()):
        with pytest.raises(FormatError, match=r"m\.qzeros does not hold -z \* scale for zero points z of 0 to 15"):
            read(fast(packed) | {"m.qzeros": wrong}, section_for(packed, "gemv_fast"), packed.shape)


@pytest.mark.parametrize(
    ("changes", "symmetric"),
    [
        ({"zero_point": False}, True),
        ({"zero_point": None, "sym": True}, True),
        ({"zero_point": True, "sym": True}, True),
        ({"zero_point": None}, False),
        ({"version": "exllama"}, False),
        ({"version": None, "checkpoint_format": "gemm", "format": "gemm"}, False),
        ({"bits": None, "w_bit": 4, "group_size": None, "q_group_size": 16, "version": "GEMM"}, False),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "sym": True}, True),
        ({"group_size": 8, "quant_method": "auto-round", "packing_format": "auto_round:auto_awq",
          "extra_config": {"m": {"group_size": 16}}}, False),
    ],
)  # fmt: skip
def test_spellings_of_the_config(changes, symmetric):
    packed = random_packed(Scheme.parse("w4a16_g16"), 16, 64)
    section = section_for(packed, **({"version": "gemm", "zero_point": True} | changes))
    again = read(FORMAT.write("m", packed), section, packed.shape)
    assert again.scheme.weight.symmetric is symmetric
    assert torch.equal(numerics.dequantize_packed(again), numerics.dequantize_packed(packed))


def test_symmetry_that_the_zero_points_contradict():
    packed = random_packed(Scheme.parse("w4a16_g16_asym"), 16, 64)
    with pytest.raises(FormatError, match=r"m\.qzeros holds the zero points 0, 1.*symmetric.*all must be 8"):
        read(FORMAT.write("m", packed), section_for(packed, zero_point=False), packed.shape)


def test_a_layout_that_the_shapes_contradict():
    packed = random_packed(Scheme.parse("w4a16_g32_asym"), 64, 128)
    layouts = {"gemm": FORMAT.write("m", packed), "gemv": gemv(packed), "gemv_fast": fast(packed)}
    for stored, tensors in layouts.items():
        for claimed in layouts.keys() - {stored}:
            with pytest.raises(
                FormatError, match=rf"model\.safetensors: m\.\w+ is .* those of the layout .*'{stored}'"
            ):
                read(tensors, section_for(packed, claimed), packed.shape)
    gptq_shape = {"m.qweight": torch.zeros(16, 64, dtype=torch.int32)}
    with pytest.raises(FormatError, match="qweight has the shape of GPTQ"):
        read(layouts["gemm"] | gptq_shape, section_for(packed), packed.shape)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"group_size": 32}, FormatError, r"m\.qzeros is I32 \[4, 2\], but must be I32 \[2, 2\]"),
        ({"group_size": "16"}, FormatError, "group_size '16'; it must be an integer"),
        ({"bits": None}, FormatError, "bits None; it must be an integer"),
        ({"bits": 8}, UnsupportedError, "m: 8-bit int weights are not read"),
        ({"version": "marlin"}, UnsupportedError, "the AWQ version 'marlin' is not read; known: gemm"),
        ({"version": "gemv_fast"}, FormatError, r"m\.qweight is I32 .* must be I16"),
        ({"modules_to_not_convert": ["m"]}, FormatError, r"m\.qweight is stored quantized.*modules_to_not_convert has"),
        ({"modules_to_not_convert": "m"}, FormatError, "must be a list of names"),
        ({"dynamic": {"-:m": {}}}, FormatError, "rule '-:m' of dynamic"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:awq_x"}, UnsupportedError, "auto_round:awq_x"),
    ],
)
def test_a_config_that_contradicts_the_tensors(changes, error, says):
    packed = random_packed(Scheme.parse("w4a16_g16_asym"), 16, 64)
    with pytest.raises(error, match=says):
        read(FORMAT.write("m", packed), section_for(packed, **({"version": "gemm"} | changes)), packed.shape)


def test_tensors_that_contradict_each_other():
    packed = random_packed(Scheme.parse("w4a16_g16_asym"), 16, 64)
    tensors, section = written(FORMAT, packed)
    for changed, says in [
        ({"m.weight": torch.zeros(16, 64)}, r"both m\.weight and m\.qweight"),
        ({"m.qweight": tensors["m.qweight"][:-1]}, r"m\.qweight is I32 \[63, 2\], but must be I32 \[64, 2\]"),
        ({"m.scales": tensors["m.scales"].int()}, r"m\.scales is I32"),
        ({"m.scales": tensors["m.scales"] * float("nan")}, r"m\.scales holds NaN"),
        ({"lm_head.qweight": tensors["m.qweight"]}, r"lm_head\.qweight is stored quantized"),
    ]:
        with pytest.raises(FormatError, match=says):
            read(tensors | changed, section, packed.shape)
    with pytest.raises(UnsupportedError, match=r"x\.qweight belongs to a quantized module that is no Linear"):
        read(tensors | {"x.qweight": tensors["m.qweight"]}, section, packed.shape)
    for suffix in ("qweight", "qzeros", "scales"):
        with pytest.raises(FormatError, match=rf"m\.{suffix} is missing"):
            read({n: t for n, t in tensors.items() if n != f"m.{suffix}"}, section, packed.shape)


def test_a_mere_substring_in_the_skip_list_does_not_overrule_the_tensors():
    """AutoAWQ and vLLM would skip mlp.gate_proj for "mlp.gate", transformers would not; the file knows."""
    packed = random_packed(Scheme.parse("w4a16_g16_asym"), 16, 64)
    tensors, section = written(FORMAT, packed)
    tensors = {name.replace("m.", "mlp.gate_proj."): tensor for name, tensor in tensors.items()}
    headers = {n: TensorHeader(n, "F16" if "scales" in n else "I32", tuple(t.shape), "f") for n, t in tensors.items()}
    config = {"quantization_config": section | {"modules_to_not_convert": ["mlp.gate"]}}
    (site,) = FORMAT.sites(config, headers, {"mlp.gate_proj": (16, 64), "mlp.gate": (8, 8)})
    assert site.name == "mlp.gate_proj"


@pytest.mark.parametrize(
    ("scheme", "shape", "says"),
    [
        ("w8a8", (32, 64), "no quantized activations"),
        ("w8a16", (32, 64), "stores 4 bits, not 8"),
        ("w4a16", (12, 64), "multiple of 8 output features, not 12"),
        ("w4a16_g32", (32, 48), "group size 32 does not divide its 48 input features"),
    ],
)
def test_what_cannot_be_written(scheme, shape, says):
    assert says in FORMAT.refuses(Scheme.parse(scheme), shape)


def test_weights_that_cannot_be_written():
    permuted = random_packed(Scheme.parse("w4a16_g16"), 16, 64, permuted=True)
    assert "act-order" in FORMAT.refuses(permuted.scheme, permuted.shape, permuted)
    one_group = random_packed(Scheme.parse("w4a16"), 16, 64, permuted=True)
    expected = numerics.dequantize_packed(one_group)
    assert torch.equal(numerics.dequantize_packed(round_trip(FORMAT, one_group)), expected)
    tiny = random_packed(Scheme.parse("w4a16"), 16, 64, dtype=torch.bfloat16)
    tiny.scales[5] = 1e-10
    assert "1 of its 16 scales" in FORMAT.refuses(tiny.scheme, tiny.shape, tiny)


def sites(**schemes: str) -> list[StoredSite]:
    return [StoredSite(name, Scheme.parse(scheme), (32, 64), ()) for name, scheme in schemes.items()]


def test_what_one_config_cannot_say():
    with pytest.raises(UnsupportedError, match=r"one group size for all modules, not 32 \(a\) and -1 \(b\)"):
        FORMAT.quantization_config(sites(a="w4a16_g32", b="w4a16"), [])
    with pytest.raises(UnsupportedError, match="leaving gate float would leave gate_proj float"):
        FORMAT.quantization_config(sites(gate_proj="w4a16"), ["gate"])
    mixed = FORMAT.quantization_config(sites(a="w4a16_g32", b="w4a16_g32_asym"), ["lm_head"])
    assert mixed["zero_point"] is True
    assert "sym" not in mixed
    assert mixed["modules_to_not_convert"] == ["lm_head"]


# ------------------------------------------------------------------------------------------------- whole checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small AWQ checkpoint."""
    torch.manual_seed(0)
    model = quantize_linears(tiny_model(), "w4a16_g32_asym")
    folder = tmp_path_factory.mktemp("awq") / "w4"
    qcompile.save(model, folder, format="awq")
    return model, folder


@pytest.mark.parametrize(
    "scheme", ["w4a16_g32", "w4a16_g64_asym", "w4a16_asym", {"q_proj": "w4a16", "o_proj": "w4a16"}]
)
@pytest.mark.parametrize("head", [False, True])
def test_a_loaded_model_is_the_saved_one(scheme, head, tmp_path):
    model = quantize_linears(tiny_model(tie_word_embeddings=head), scheme, head=head)
    qcompile.save(model, tmp_path / "saved", format="awq")
    loaded = qcompile.load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert {n: str(m.scheme) for n, m in quantized_modules(loaded).items()} == {
        n: str(m.scheme) for n, m in quantized_modules(model).items()
    }
    assert "stored as awq" in str(qcompile.report(loaded))


def test_nothing_is_written_that_awq_cannot_express(tmp_path):
    for scheme, says in [
        ({"q_proj": "w4a16_g32", "k_proj": "w8a16"}, r"k_proj \(w8a16\) cannot be saved as awq: AWQ stores 4 bits"),
        ({"q_proj": "w4a16_g32", "k_proj": "w4a16_g64"}, "one group size for all modules"),
    ]:
        with pytest.raises(UnsupportedError, match=says):
            qcompile.save(quantize_linears(tiny_model(), scheme), tmp_path / "saved", format="awq")
    assert not list(tmp_path.iterdir())


def test_the_side_file_of_old_files(checkpoint, copied):
    config = json.loads((copied / "config.json").read_text())
    del config["quantization_config"]
    (copied / "config.json").write_text(json.dumps(config))
    side = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (copied / "quant_config.json").write_text(json.dumps(side))
    assert torch.equal(logits(qcompile.load(copied)), logits(checkpoint[0]))


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "changes", "says"),
    [
        (None, {"group_size": 64}, r"q_proj\.qzeros is I32 \[4, 16\], but must be I32 \[2, 16\]"),
        (None, {"version": "gemv"}, r"but its tensors are those of the layout 'gemm'"),
        (None, {"sym": True}, r"q_proj\.qzeros holds the zero points"),
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:-1].clone()}), {}, rf"{UP}\.qweight is I32 \[127,"),
        (lambda t: t[f"{UP}.scales"].fill_(float("nan")), {}, rf"{UP}\.scales holds NaN"),
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
