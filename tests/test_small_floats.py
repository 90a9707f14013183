"""Floats of 4 and 8 bits against explicit lists of their numbers, and weights in them against other tools."""

import itertools
import math

import pytest
import torch
from helpers import expand_groups
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from stored import golden

from qcompile import numerics, small_floats
from qcompile.errors import UnsupportedError
from qcompile.types import PackedWeight, Scheme

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [
    (mantissa / 8 if exponent == 0 else 1 + mantissa / 8) * 2.0 ** (max(exponent, 1) - 7)
    for exponent in range(16)
    for mantissa in range(8)
][:-1]  # the last code is NaN


def nearest(value: float, numbers: list[float]) -> float:
    """The nearest of ``numbers`` (ascending, 0 first), half to even codes, saturating, with the sign of ``value``."""
    magnitude = min(abs(value), numbers[-1])
    index = min(range(len(numbers)), key=lambda i: (abs(numbers[i] - magnitude), i % 2))
    return math.copysign(numbers[index], value)


def around(numbers: list[float]) -> torch.Tensor:
    """The numbers, what is half way between two of them, and the neighbours of both in float32; of either sign."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(numbers)]
    exact = torch.tensor([*numbers, *middles, numbers[-1] * 1.05, 1e30])
    near = [torch.nextafter(exact, torch.full_like(exact, end)) for end in (math.inf, 0.0)]
    magnitudes = torch.cat([exact, *near])
    return torch.cat([magnitudes, -magnitudes])


# ---------------------------------------------------------------------------------------------------------- numbers


def test_the_largest_numbers_are_those_of_the_lists():
    assert max(E2M1) == small_floats.E2M1_MAX
    assert max(E4M3) == small_floats.E4M3_MAX
    assert E4M3[1] == small_floats.E4M3_SMALLEST


def test_e2m1_codes_stand_for_the_listed_numbers():
    values = small_floats.e2m1_values(torch.arange(16, dtype=torch.uint8))
    assert values.tolist() == E2M1 + [-number for number in E2M1]
    assert math.copysign(1, values[8].item()) == -1
    assert small_floats.e2m1_codes(values).tolist() == list(range(16))


def test_e4m3_codes_stand_for_the_listed_numbers():
    codes = torch.arange(127, dtype=torch.uint8)
    assert codes.view(torch.float8_e4m3fn).float().tolist() == E4M3


@pytest.mark.parametrize(
    ("rounded", "numbers"), [(small_floats.round_e2m1, E2M1), (small_floats.round_e4m3, E4M3)], ids=["e2m1", "e4m3"]
)
def test_values_are_rounded_to_the_nearest_number_half_to_even(rounded, numbers):
    values = around(numbers)
    expected = torch.tensor([nearest(value, numbers) for value in values.tolist()])
    actual = rounded(values).float()
    assert torch.equal(actual, expected)
    assert torch.equal(torch.signbit(actual), torch.signbit(values))
    assert rounded(torch.tensor([math.inf, -math.inf])).tolist() == [numbers[-1], -numbers[-1]]
    assert rounded(torch.tensor([math.nan])).isnan().all()
    assert torch.equal(rounded(actual).float(), actual)


@given(st.floats(2.0**-148, 2.0**127, width=32), st.sampled_from((("mxfp4", 2), ("mxfp8", 8))))
def test_mx_scales_are_powers_of_two_below_the_largest(largest, case):
    number, exponent = case
    scale = small_floats.mx_scales(torch.tensor([largest]), number)
    expected = max(-127, math.frexp(largest)[1] - 1 - exponent)
    assert scale.dtype == torch.float32
    assert scale.item() == 2.0**expected
    assert scale.to(torch.float8_e8m0fnu).view(torch.uint8).item() == expected + 127


def test_e8m0_codes_stand_for_powers_of_two():
    codes = torch.arange(256, dtype=torch.uint8)
    values = small_floats.e8m0_values(codes)
    assert values[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert values[255].isnan()
    assert torch.equal(values[:255], codes.view(torch.float8_e8m0fnu).float()[:255])


def test_mx_scales_at_the_ends():
    scales = small_floats.mx_scales(torch.tensor([0.0, 2.0**-149, 3.4e38, math.inf, math.nan]), "mxfp4")
    assert scales.to(torch.float8_e8m0fnu).view(torch.uint8).tolist() == [0, 0, 252, 255, 255]
    assert scales[:3].tolist() == [2.0**-127, 2.0**-127, 2.0**125]
    assert scales[3:].isnan().all()


# ---------------------------------------------------------------------------------------------------------- weights

NAMES = ("wfp8a16", "wfp8a16_tensor", "wfp8a16_g32", "wfp8a16_b16x32", "wnvfp4a16", "wmxfp4a16", "wmxfp8a16")
MANTISSA = {"wnvfp4a16": 1, "wmxfp4a16": 1}  # bits; e4m3 has three
each_name = pytest.mark.parametrize("name", NAMES)


def expanded_scales(packed: PackedWeight) -> torch.Tensor:
    """The float64 number by which each code of [out, in] is multiplied."""
    scales = packed.scales.double()
    if packed.outer is not None:
        scales = (packed.scales.float() / packed.outer[..., None]).double()
    scales = expand_groups(scales, packed.scheme.weight, *packed.shape[-2:])
    return scales.expand(packed.shape)


@st.composite
def weights(draw):
    out, inn = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(out, inn, generator=generator) * 10.0 ** draw(st.integers(-6, 2))
    match draw(st.sampled_from(("normal", "zero row", "outlier", "zero"))):
        case "zero row":
            weight[0] = 0
        case "outlier":
            weight[:, 0] *= 1000
        case "zero":
            weight.zero_()
    return weight.to(draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))))


@given(weights(), st.sampled_from(NAMES), st.sampled_from(("minmax", "mse")))
def test_a_weight_becomes_the_nearest_numbers_under_its_scales(weight, name, observer):
    scheme = Scheme.parse(name)
    if scheme.weight.per_tensor:
        observer = "minmax"
    packed = numerics.quantize_weight(weight, scheme, observer=observer)
    scales = expanded_scales(packed)
    assert (scales > 0).all()
    shares = (weight.float() / scales.float()).flatten().tolist()
    numbers = E2M1 if scheme.weight.bits == 4 else E4M3
    expected = torch.tensor([nearest(share, numbers) for share in shares], dtype=torch.float64).view_as(scales) * scales
    actual = numerics.dequantize_packed(in_float64(packed))
    assert torch.equal(actual, expected)
    assert (numerics.dequantize_packed(packed)[weight == 0] == 0).all()


def in_float64(packed: PackedWeight) -> PackedWeight:
    """The same codes with float64 scales that have ``outer`` in them, so that products are exact."""
    scales = packed.scales.double()
    if packed.outer is not None:
        scales = (packed.scales.float() / packed.outer[..., None]).double()
    outer = None if packed.outer is None else torch.ones_like(packed.outer)
    return PackedWeight(packed.scheme, packed.shape, packed.codes, scales, outer=outer)


@each_name
def test_the_largest_weight_of_a_group_is_kept_or_saturates(name):
    """Scales are max / 448 and max / 6: the maximum is exact up to the rounding of the scale. The powers of two of mx
    formats put it between the largest number and twice that power: it loses up to a quarter (e2m1) or an eighth."""
    weight = torch.randn(32, 64)
    packed = numerics.quantize_weight(weight, Scheme.parse(name))
    restored = numerics.dequantize_packed(packed, torch.float32)
    height, width = packed.scheme.weight.block or (1, packed.scheme.weight.group_size or 64)
    if packed.scheme.weight.per_tensor:
        height = 32
    blocks = weight.view(32 // height, height, 64 // width, width).transpose(1, 2).flatten(2)
    kept = restored.view(32 // height, height, 64 // width, width).transpose(1, 2).flatten(2)
    place = blocks.abs().argmax(-1, keepdim=True)
    exact, rounded = blocks.gather(-1, place), kept.gather(-1, place)
    loss = (rounded / exact - 1).abs().max().item()
    assert loss <= {"wnvfp4a16": 0.0625 + 0.01, "wmxfp4a16": 0.25, "wmxfp8a16": 0.125}.get(name, 1e-6)


@each_name
def test_errors_are_bounded_by_the_mantissa(name):
    """Half a unit in the last place, where nothing saturates and the number is not subnormal."""
    weight = torch.randn(64, 96)
    packed = numerics.quantize_weight(weight, Scheme.parse(name))
    shares = weight / expanded_scales(packed)
    top, smallest = (6.0, 1.0) if packed.scheme.weight.bits == 4 else (448.0, 2.0**-6)
    normal = (shares.abs() <= top) & (shares.abs() >= smallest)
    error = (numerics.dequantize_packed(packed, torch.float32) / weight - 1).abs()
    assert normal.float().mean() > 0.3
    assert error[normal].max() <= 2.0 ** -(MANTISSA.get(name, 3) + 1) * 1.0001


@each_name
def test_what_was_rounded_once_is_rounded_to_itself(name):
    weight = torch.randn(32, 64)
    once = numerics.dequantize_packed(numerics.quantize_weight(weight, Scheme.parse(name)), torch.float32)
    twice = numerics.dequantize_packed(numerics.quantize_weight(once, Scheme.parse(name)), torch.float32)
    tolerance = {"rtol": 0, "atol": 0} if "mx" in name else {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(twice, once, **tolerance)


@each_name
def test_experts_are_rounded_one_by_one(name):
    weight = torch.randn(3, 20, 40) * torch.tensor([1.0, 100.0, 1e-3])[:, None, None]
    packed = numerics.quantize_weight(weight, Scheme.parse(name))
    restored = numerics.dequantize_packed(packed)
    for index in range(3):
        alone = numerics.quantize_weight(weight[index], Scheme.parse(name))
        one = packed.expert(index)
        for key, tensor in alone.tensors().items():
            assert torch.equal(one.tensors()[key].view(torch.uint8), tensor.view(torch.uint8)), key
        assert torch.equal(restored[index], numerics.dequantize_packed(alone))


@each_name
def test_rows_are_independent_of_the_chunks_they_are_worked_on_in(name, monkeypatch):
    weight = torch.randn(70, 64)
    whole = numerics.quantize_weight(weight, Scheme.parse(name))
    noise = numerics.signal_to_noise(weight, whole)
    monkeypatch.setattr(numerics, "CHUNK", 1200)
    parts = numerics.quantize_weight(weight, Scheme.parse(name))
    for key, tensor in whole.tensors().items():
        assert torch.equal(tensor.view(torch.uint8), parts.tensors()[key].view(torch.uint8)), key
    assert numerics.signal_to_noise(weight, parts) == pytest.approx(noise, rel=1e-6)


@each_name
def test_mse_is_never_worse_than_minmax(name):
    if "tensor" in name:
        with pytest.raises(UnsupportedError, match="not one for a whole tensor"):
            numerics.quantize_weight(torch.randn(4, 64), Scheme.parse(name), observer="mse")
        return
    weight = torch.randn(64, 64)
    errors = [
        (numerics.dequantize_packed(numerics.quantize_weight(weight, Scheme.parse(name), observer=observer)) - weight)
        .square()
        .sum()
        .item()
        for observer in ("minmax", "mse")
    ]
    assert errors[1] < errors[0]


def test_a_small_group_of_nvfp4_is_not_lost_beside_a_large_one():
    weight = torch.cat([torch.full((1, 16), 1e4), torch.linspace(-0.01, 0.01, 16)[None]], 1)
    packed = numerics.quantize_weight(weight, Scheme.parse("wnvfp4a16"))
    assert packed.scales.float().tolist() == [[448.0, 2.0**-9]]
    assert numerics.dequantize_packed(packed)[0, 16:].abs().max().item() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["wfp8a16", "wfp8a16_tensor"])
def test_the_largest_weight_survives_scales_of_any_size(name, dtype):
    for size in (1e-5, 1e-3, 1.0, 60000.0):
        weight = (torch.linspace(0, 1, 64)[None] * size).to(dtype)
        restored = numerics.dequantize_packed(numerics.quantize_weight(weight, Scheme.parse(name)), torch.float32)
        assert restored.isfinite().all()
        assert restored[0, -1].item() == pytest.approx(weight[0, -1].item(), rel=1 / 15)


# ------------------------------------------------------------------------------------------------------ other tools


def of_golden(name: str):
    """(float weight of another tool, ours from the tensors of its file) of every quantized Linear of a case."""
    folder = golden(f"ct-{name}")
    stored, reference = load_file(folder / "model.safetensors"), load_file(folder / "reference.safetensors")
    scheme = {"fp8-static": "wfp8a16_tensor", "nvfp4": "wnvfp4a16", "mxfp4": "wmxfp4a16"}[name]
    for site in (key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale")):
        wanted, scales = reference[f"{site}.weight"], stored[f"{site}.weight_scale"]
        codes = stored[f"{site}.{'weight' if name == 'fp8-static' else 'weight_packed'}"].view(torch.uint8)
        if name == "fp8-static":
            scales = scales.reshape(1, 1)
        elif name == "mxfp4":
            scales = scales.view(torch.float8_e8m0fnu)
        outer = stored.get(f"{site}.weight_global_scale")
        yield wanted, PackedWeight(Scheme.parse(scheme), tuple(wanted.shape), codes, scales, outer=outer)


@pytest.mark.parametrize("name", ["fp8-static", "nvfp4", "mxfp4"])
def test_stored_weights_of_llm_compressor_are_read_bit_for_bit(name):
    read = list(of_golden(name))
    assert len(read) == 14
    for wanted, packed in read:
        assert torch.equal(numerics.dequantize_packed(packed, torch.bfloat16), wanted)


def test_nvfp4_and_fp8_weights_are_those_of_compressed_tensors():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weight = torch.randn(48, 64)
    for name, settings in {
        "wnvfp4a16": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
        "wfp8a16": {"num_bits": 8, "strategy": "channel"},
    }.items():
        args = quantization.QuantizationArgs(type="float", symmetric=True, **settings)
        groups = weight.unflatten(1, (-1, args.group_size or 64))
        low, high = groups.amin(-1), groups.amax(-1)
        outer = generate_gparam(weight.min(), weight.max()) if args.num_bits == 4 else None
        scales, _ = calculate_qparams(low, high, args, global_scale=outer)
        codes = quantize(weight, scales, None, args, global_scale=outer)
        theirs = dequantize(codes.float(), scales.float(), None, args=args, global_scale=outer)
        ours = numerics.quantize_weight(weight, Scheme.parse(name))
        assert torch.equal(ours.scales.float(), scales.float())
        if outer is not None:
            assert torch.equal(ours.outer, outer)
        assert torch.equal(numerics.dequantize_packed(ours), theirs)


@pytest.mark.parametrize(("name", "bits", "number"), [("mxfp4", 4, "wmxfp4a16"), ("mxfp8", 8, "wmxfp8a16")])
def test_mx_weights_are_those_of_compressed_tensors_but_for_its_rounding_up(name, bits, number):
    """It takes the next power of two for groups whose maximum is 1.75 of one or more; MX 1.0 never does."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    weight = torch.randn(64, 96)
    largest = weight.view(64, 3, 32).abs().amax(-1)
    theirs = torch.exp2(generate_mx_scales(largest, bits) - 127)
    args = quantization.QuantizationArgs(num_bits=bits, type="float", strategy="group", group_size=32, symmetric=True)
    ours = numerics.quantize_weight(weight, Scheme.parse(number))
    rounded_up = torch.frexp(largest)[0] >= 0.875
    assert 0 < rounded_up.sum() < rounded_up.numel() / 2
    assert torch.equal(ours.scales.float() * torch.where(rounded_up, 2, 1), theirs)
    codes = quantize(weight, theirs, None, args)
    expected = dequantize(codes.float(), theirs, None, args=args).view(64, 3, 32)
    actual = numerics.dequantize_packed(ours).view(64, 3, 32)
    assert torch.equal(actual[~rounded_up], expected[~rounded_up])
