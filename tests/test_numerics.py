"""Packing, scales and rounding of weights, against definitions written in plain Python."""

import itertools
import math

import pytest
import torch
from helpers import expand_groups
from hypothesis import given
from hypothesis import strategies as st

from qcompile import numerics
from qcompile.errors import UnsupportedError
from qcompile.types import Scheme

BITS = range(2, 9)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def scheme(bits: int, group: int | None = None, asym: bool = False) -> Scheme:
    return Scheme.parse(f"w{bits}a16" + (f"_g{group}" if group else "") + ("_asym" if asym else ""))


def codes_of(packed) -> torch.Tensor:
    return numerics.unpack_codes(packed.codes, packed.scheme.weight.bits, packed.shape[1])


def relative_error(weight: torch.Tensor, packed) -> float:
    restored = numerics.dequantize_packed(packed, torch.float32)
    return ((restored - weight.float()).square().sum() / weight.float().square().sum()).item()


def row_scales(packed) -> torch.Tensor:
    """Absolute float32 scale of every weight."""
    return expand_groups(packed.scales.float().abs(), packed.scheme.weight, *packed.shape)


# ---------------------------------------------------------------------------------------------------- bit streams


@st.composite
def code_rows(draw):
    bits = draw(st.sampled_from(BITS))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))


@given(code_rows())
def test_codes_lie_in_the_stream_where_the_formula_says(case):
    bits, values = case
    packed = numerics.pack_codes(torch.tensor(values, dtype=torch.uint8), bits)
    stream = sum(value << (bits * i) for i, value in enumerate(values))
    assert bytes(packed.tolist()) == stream.to_bytes(math.ceil(len(values) * bits / 8), "little")
    words = bytes(packed.tolist()) + bytes(-len(packed) % 4 + 4)
    for i, value in enumerate(values):  # the int32 words of the file formats
        word, offset = divmod(bits * i, 32)
        pair = int.from_bytes(words[4 * word : 4 * word + 8], "little")
        assert (pair >> offset) & (2**bits - 1) == value


@given(code_rows(), st.integers(1, 3))
def test_packing_round_trips_along_the_last_dimension(case, rows):
    bits, values = case
    codes = torch.tensor([values] * rows, dtype=torch.uint8).view(rows, 1, len(values))
    packed = numerics.pack_codes(codes, bits)
    assert packed.shape == (rows, 1, math.ceil(len(values) * bits / 8))
    assert torch.equal(numerics.unpack_codes(packed, bits, len(values)), codes)


def test_packing_reads_no_memory_order():
    codes = torch.randint(0, 8, (9, 5), dtype=torch.uint8)
    assert torch.equal(numerics.pack_codes(codes.t(), 3), numerics.pack_codes(codes.t().contiguous(), 3))


# --------------------------------------------------------------------------------------------------- weight scales


@st.composite
def weights(draw):
    out, inn = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(out, inn, generator=generator) * 10.0 ** draw(st.integers(-6, 3))
    shape = draw(st.sampled_from(("normal", "positive", "negative", "zero row", "outlier", "constant")))
    match shape:
        case "positive":
            weight = weight.abs()
        case "negative":
            weight = -weight.abs()
        case "zero row":
            weight[0] = 0
        case "outlier":
            weight[:, 0] *= 100
        case "constant":
            weight = weight[:, :1].expand(out, inn)
    return weight.clamp(-2e4, 2e4).to(dtype)


any_scheme = st.builds(scheme, st.sampled_from(BITS), group=st.sampled_from((None, 1, 7, 16, 64)), asym=st.booleans())


@given(weights(), any_scheme, st.sampled_from(("minmax", "mse")))
def test_codes_are_in_range_and_stand_for_finite_weights(weight, scheme, observer):
    packed = numerics.quantize_weight(weight, scheme, observer=observer)
    assert packed.shape == weight.shape
    assert packed.scales.dtype == weight.dtype
    assert (packed.scales != 0).all()
    assert codes_of(packed).max().item() < 2**scheme.weight.bits
    if packed.zeros is not None:
        assert packed.zeros.max().item() < 2**scheme.weight.bits
    restored = numerics.dequantize_packed(packed)
    assert restored.dtype == weight.dtype
    assert restored.isfinite().all()


@given(weights(), any_scheme)
def test_the_error_is_bounded_by_the_step(weight, scheme):
    """Half a step; a scale rounded to its dtype adds its rounding times the number of steps, a symmetric range misses
    one step on the side opposite to its extreme, and the float result is rounded once."""
    packed = numerics.quantize_weight(weight, scheme)
    rounding = torch.finfo(weight.dtype).eps / 2
    steps = row_scales(packed)
    bound = (0.5 if packed.zeros is not None else 1.0) * steps + rounding * (2**scheme.weight.bits + 1) * steps
    if weight.dtype == torch.float16:  # scales are multiples of 2 ** -24 there
        bound += 2**scheme.weight.bits * 2.0**-25
    restored = numerics.dequantize_packed(packed, torch.float32)
    assert ((restored - weight.float()).abs() <= bound * (1 + 1e-5)).all()


@given(weights(), st.sampled_from(BITS))
def test_float32_asymmetric_error_is_half_a_step(weight, bits):
    weight = weight.float()
    packed = numerics.quantize_weight(weight, scheme(bits, 16, asym=True))
    error = (numerics.dequantize_packed(packed) - weight).abs()
    assert (error <= row_scales(packed) * 0.50005).all()


@given(weights(), any_scheme)
def test_mse_is_never_worse_than_minmax(weight, scheme):
    errors = {}
    for observer in ("minmax", "mse"):
        packed = numerics.quantize_weight(weight.float(), scheme, observer=observer)
        errors[observer] = (numerics.dequantize_packed(packed) - weight.float()).square().sum().item()
    assert errors["mse"] <= errors["minmax"] * (1 + 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_the_extreme_of_a_symmetric_group_is_exact(bits, dtype):
    weight = torch.randn(50, 64).to(dtype)
    packed = numerics.quantize_weight(weight, scheme(bits, 16))
    groups, restored = (w.unflatten(1, (-1, 16)) for w in (weight, numerics.dequantize_packed(packed)))
    extreme = groups.abs().argmax(-1, keepdim=True)
    assert torch.equal(restored.gather(-1, extreme), groups.gather(-1, extreme))
    assert (codes_of(packed).unflatten(1, (-1, 16)).gather(-1, extreme) == 0).all()


@given(weights(), st.sampled_from(BITS), st.sampled_from((None, 16)), st.sampled_from(("minmax", "mse")))
def test_narrow_codes_are_symmetric_around_zero(weight, bits, group, observer):
    packed = numerics.quantize_weight(weight, scheme(bits, group), observer=observer, codes="narrow")
    half = 2 ** (bits - 1)
    codes = codes_of(packed).int() - half
    assert codes.abs().max() <= half - 1
    assert (packed.scales > 0).all()
    mirrored = numerics.quantize_weight(-weight, scheme(bits, group), observer=observer, codes="narrow")
    assert torch.equal(codes_of(mirrored).int() - half, -codes)
    if observer == "minmax" and weight.dtype == torch.float32 and (weight != 0).any():
        assert codes.abs().max() == half - 1
        error = (numerics.dequantize_packed(packed) - weight).abs()
        assert (error <= row_scales(packed) * 0.50005).all()


def test_codes_without_a_sign_cannot_be_narrow():
    for name in ("w4a16_asym", "wfp8a16"):
        with pytest.raises(UnsupportedError, match="narrow codes are those of symmetric integers"):
            numerics.quantize_weight(torch.randn(2, 8), Scheme.parse(name), codes="narrow")


@pytest.mark.parametrize("asym", [False, True])
def test_a_row_of_zeros_is_exact(asym):
    packed = numerics.quantize_weight(torch.zeros(2, 40), scheme(4, 16, asym))
    assert (packed.scales > 0).all()
    assert (numerics.dequantize_packed(packed) == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_rows_use_the_whole_asymmetric_range(sign):
    weight = sign * torch.linspace(1, 2, 64).expand(3, 64)
    packed = numerics.quantize_weight(weight, scheme(4, asym=True))
    assert (packed.zeros == (0 if sign > 0 else 15)).all()
    assert numerics.dequantize_packed(packed)[0, -1].item() == pytest.approx(2 * sign, rel=1e-6)


@pytest.mark.parametrize("asym", [False, True])
def test_a_single_column_is_exact(asym):
    weight = torch.tensor([[0.3], [-5.0], [0.0]])
    packed = numerics.quantize_weight(weight, scheme(4, None, asym))
    assert torch.allclose(numerics.dequantize_packed(packed), weight, rtol=1e-6)


def test_a_short_last_group_has_a_scale_of_its_own():
    weight = torch.cat([torch.randn(4, 32), torch.randn(4, 5) * 100], 1)
    packed = numerics.quantize_weight(weight, scheme(8, 32))
    assert packed.scales.shape == (4, 2)
    alone = [numerics.quantize_weight(part.contiguous(), scheme(8)) for part in weight.split(32, 1)]
    assert torch.equal(
        numerics.dequantize_packed(packed), torch.cat([numerics.dequantize_packed(part) for part in alone], 1)
    )


def test_the_largest_float16_survives():
    largest = torch.finfo(torch.float16).max
    weight = torch.tensor([[largest, 1.0, -7000.0, 0.0], [-largest, largest / 2, 3.0, -1.0]], dtype=torch.float16)
    for bits in BITS:
        restored = numerics.dequantize_packed(numerics.quantize_weight(weight, scheme(bits)))
        assert restored.isfinite().all()
        assert restored[0, 0] == largest
        assert restored[1, 0] == -largest


def test_subnormal_float16_weights_keep_their_precision():
    tiny = 2.0**-24
    steps = torch.tensor([[-8, -3, 1, 7, 0, 5]])
    packed = numerics.quantize_weight((steps * tiny).half(), scheme(4))
    assert torch.equal(numerics.dequantize_packed(packed, torch.float32), steps * tiny)
    small = torch.randn(64, 256) * 1e-3  # int8 scales of such rows are below the normal float16 numbers
    half = numerics.signal_to_noise(small.half(), numerics.quantize_weight(small.half(), scheme(8)))
    single = numerics.signal_to_noise(small, numerics.quantize_weight(small, scheme(8)))
    assert half == pytest.approx(single, abs=0.3)


def test_scales_are_stored_in_the_dtype_asked_for():
    weight = torch.randn(8, 64)
    packed = numerics.quantize_weight(weight, scheme(4, 32, asym=True), scale_dtype=torch.bfloat16)
    assert packed.scales.dtype == torch.bfloat16
    assert ((numerics.dequantize_packed(packed, torch.float32) - weight).abs() <= 0.6 * row_scales(packed)).all()


def test_rows_are_independent_of_the_chunks_they_are_worked_on_in(monkeypatch):
    weight = torch.randn(17, 48)
    whole = numerics.quantize_weight(weight, scheme(4, 16, asym=True), observer="mse")
    noise = numerics.signal_to_noise(weight, whole)
    monkeypatch.setattr(numerics, "CHUNK", 100)
    parts = numerics.quantize_weight(weight, scheme(4, 16, asym=True), observer="mse")
    assert all(torch.equal(tensor, parts.tensors()[name]) for name, tensor in whole.tensors().items())
    assert numerics.signal_to_noise(weight, parts) == pytest.approx(noise, rel=1e-6)


@pytest.mark.parametrize(
    ("asym", "observer", "expected"),
    [(False, "minmax", 0.01069), (False, "mse", 0.00936), (True, "minmax", 0.01014), (True, "mse", 0.00903)],
)
def test_the_error_of_int4_on_gaussian_weights_is_the_known_one(asym, observer, expected):
    weight = torch.randn(20_000, 128)
    packed = numerics.quantize_weight(weight, scheme(4, 128, asym), observer=observer)
    assert relative_error(weight, packed) == pytest.approx(expected, rel=0.02)
    assert numerics.signal_to_noise(weight, packed) == pytest.approx(-10 * math.log10(expected), abs=0.1)


# ------------------------------------------------------------------------------------------------------ dequantize


@pytest.mark.parametrize("name", ["w4a16_g16", "w3a16_g16_asym", "w8a16"])
def test_a_permutation_moves_columns_back(name):
    weight = torch.randn(5, 40)
    order = torch.randperm(40).to(torch.int32)
    stored = numerics.quantize_weight(weight[:, order.long()].contiguous(), Scheme.parse(name))
    plain = numerics.dequantize_packed(stored)
    moved = numerics.dequantize(stored.codes, stored.scales, stored.zeros, order, stored.scheme, 40)
    assert torch.equal(moved[:, order.long()], plain)
    assert (moved - weight).norm().item() == pytest.approx((plain - weight[:, order.long()]).norm().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_rounded_once(dtype):
    packed = numerics.quantize_weight(torch.randn(6, 64).to(dtype), scheme(4, 32, asym=True))
    zeros, scales = (t.repeat_interleave(32, 1) for t in (packed.zeros, packed.scales))
    exact = (codes_of(packed).double() - zeros.double()) * scales.double()
    assert torch.equal(numerics.dequantize_packed(packed), exact.to(dtype))


def test_negative_and_zero_scales_mean_what_they_say():
    packed = numerics.quantize_weight(torch.randn(2, 8), scheme(4))
    scales = torch.tensor([[-0.5], [0.0]])
    restored = numerics.dequantize(packed.codes, scales, None, None, packed.scheme, 8)
    assert torch.equal(restored[0], (codes_of(packed)[0].float() - 8) * -0.5)
    assert (restored[1] == 0).all()


def test_signal_to_noise_counts_what_was_lost():
    exact = torch.arange(-8.0, 8.0)[None]
    assert numerics.signal_to_noise(exact, numerics.quantize_weight(exact, scheme(4))) == math.inf
    assert numerics.signal_to_noise(torch.zeros(1, 16), numerics.quantize_weight(exact, scheme(4))) == -math.inf
    weight = torch.randn(64, 256)
    ratios = [numerics.signal_to_noise(weight, numerics.quantize_weight(weight, scheme(bits))) for bits in BITS]
    assert all(5 < more - less < 7.5 for less, more in itertools.pairwise(ratios[1:]))  # 6 dB per bit
    half = numerics.quantize_weight(weight / 2, scheme(8))
    assert numerics.signal_to_noise(weight, half) == pytest.approx(20 * math.log10(2), abs=0.01)


def test_signed_codes_multiply_like_the_weight():
    packed = numerics.quantize_weight(torch.randn(4, 10), scheme(8))
    assert torch.equal(numerics.signed_codes(packed.codes) * packed.scales, numerics.dequantize_packed(packed))
