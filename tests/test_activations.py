"""Quantized activations of every kind, against formulas in float64 that share no code with them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qcompile.ops  # noqa: F401  (registers qcompile::quantize)
from qcompile.activations import dequantize_activation, quantize_activation
from qcompile.small_floats import mx_scales
from qcompile.types import ActivationType

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DYNAMIC = ("8", "4", "8_dynamic_asym", "4_dynamic_asym", "fp8", "fp8_g128", "mxfp4", "mxfp8")
STATIC = ("8_static", "8_static_sym", "fp8_static")
EVERY = (*DYNAMIC, *STATIC, "8_clip", "4_clip", "nvfp4")


def params_of(name: str) -> list[torch.Tensor]:
    """Stored parameters that suit values around one."""
    stored = {
        "input_scale": torch.tensor([500.0 if name == "nvfp4" else 0.03]),
        "input_zero": torch.tensor([-17], dtype=torch.int32),
        "alpha": torch.tensor([0.7]),
    }
    return [stored[param] for param in ActivationType.parse(name).params]


def quantized(x: torch.Tensor, name: str, params: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """[codes, scale] or [codes, scale, zero], static ones with their stored parameters."""
    activation, params = ActivationType.parse(name), params_of(name) if params is None else params
    parts = quantize_activation(x, activation, params)
    return parts if activation.dynamic else [*parts, *params]


def restored(x: torch.Tensor, name: str, params: list[torch.Tensor] | None = None) -> torch.Tensor:
    return dequantize_activation(quantized(x, name, params), ActivationType.parse(name))


@st.composite
def rows(draw):
    """Some tokens: usual ones, zeros, one-sided, with an outlier, of very different sizes."""
    columns = draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(6, columns, generator=generator) * 10.0 ** draw(st.integers(-4, 3))
    x[1], x[2], x[3] = 0, x[2].abs(), -x[3].abs()
    x[4, 0] *= 1000
    x[5] *= 1e-3
    return x.to(draw(st.sampled_from(DTYPES))).nan_to_num(posinf=6e4, neginf=-6e4)


# --------------------------------------------------------------------------------------------------------- integers


def top_of(name: str) -> int:
    return 2 ** (ActivationType.parse(name).bits - 1) - 1


@given(rows(), st.sampled_from(("8", "4")))
def test_symmetric_codes_are_the_nearest_of_a_range_that_ends_at_the_maximum(x, name):
    codes, scale = quantized(x, name)
    top, exact = top_of(name), x.double()
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert scale.shape == (6, 1)
    torch.testing.assert_close(scale.double(), exact.abs().amax(-1, keepdim=True) / top, rtol=1e-6, atol=2e-45)
    assert codes.abs().max() <= top
    assert ((codes * scale.double() - exact).abs() <= scale * 0.5001).all()
    held = scale[:, 0] > 0
    assert (codes.abs().amax(-1)[held] == top).all()


@given(rows(), st.sampled_from(("8_dynamic_asym", "4_dynamic_asym")))
def test_asymmetric_codes_use_the_range_of_the_row_and_include_zero(x, name):
    codes, scale, zero = quantized(x, name)
    top, exact = top_of(name), x.double()
    low, high = exact.amin(-1, keepdim=True).clamp(max=0), exact.amax(-1, keepdim=True).clamp(min=0)
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.int8, torch.float32, torch.int32)
    assert scale.shape == zero.shape == (6, 1)
    torch.testing.assert_close(scale.double(), (high - low) / (2 * top + 1), rtol=1e-6, atol=2e-45)
    assert zero.min() >= -top - 1
    assert zero.max() <= top
    assert codes.min() >= -top - 1
    assert codes.max() <= top
    error = ((codes.double() - zero) * scale - exact).abs()
    assert (error <= scale * 1.0001).all()  # half a step, and half a step of the zero point at the ends of the range
    inside = (exact > low + scale) & (exact < high - scale)
    assert (error <= scale * 0.5001)[inside].all()
    assert (codes == zero)[exact == 0].all()


@given(
    rows(), st.sampled_from(("8_clip", "4_clip")), st.lists(st.floats(0.0625, 1.0, width=32), min_size=6, max_size=6)
)
def test_a_clip_is_that_share_of_the_rows_own_maximum(x, name, alphas):
    """The learned clip of w4a8 experts: m = alpha max|row|; code = round(clamp(x, -m, m) / (m / top))."""
    top, exact, alpha = top_of(name), x.double(), torch.tensor(alphas)[:, None]
    codes, scale = quantized(x, name, [alpha])
    limit = alpha.double() * exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale.double(), limit / top, rtol=1e-6, atol=2e-45)
    clamped = exact.clamp(-limit, limit)
    assert ((codes * scale.double() - clamped).abs() <= scale * 0.5001).all()
    beyond = (exact.abs() >= limit) & (scale > 0)
    assert (codes.abs() == top)[beyond].all()
    assert (torch.sign(codes.float()) == torch.sign(x.float()))[beyond].all()
    assert (codes[1] == 0).all()
    assert scale[1] == 0


def test_without_a_clip_nothing_is_clipped():
    x = torch.randn(5, 40)
    for part, unclipped in zip(quantized(x, "8_clip", [torch.ones(1)]), quantized(x, "8"), strict=True):
        assert torch.equal(part, unclipped)


@given(rows(), st.floats(2.0**-14, 8, width=32), st.integers(-128, 127))
def test_static_codes_are_clamped_around_the_stored_zero_point(x, step, offset):
    scale, zero = torch.tensor([step]), torch.tensor([offset], dtype=torch.int32)
    (codes,) = quantize_activation(x, ActivationType.parse("8_static"), [scale, zero])
    assert codes.dtype == torch.int8
    shares = x.double() / scale.double()
    expected = (shares + offset).clamp(-128, 127)
    assert ((codes - expected).abs() <= 0.5 + 1e-6 * shares.abs()).all()
    (symmetric,) = quantize_activation(x, ActivationType.parse("8_static_sym"), [scale])
    assert torch.equal(symmetric, torch.round(x.float() / scale).clamp(-128, 127).to(torch.int8))
    assert (symmetric[1] == 0).all()
    assert (codes[1] == offset).all()


def test_static_parameters_may_differ_by_row():
    x, scales, zeros = torch.randn(3, 8), torch.tensor([[0.01], [0.1], [1.0]]), torch.tensor([[0], [5], [-9]])
    (codes,) = quantize_activation(x, ActivationType.parse("8_static"), [scales, zeros.int()])
    for row in range(3):
        (alone,) = quantize_activation(x[row], ActivationType.parse("8_static"), [scales[row], zeros[row].int()])
        assert torch.equal(codes[row], alone)


def test_halves_are_rounded_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]])
    codes, scale = quantized(x, "8")
    assert scale.item() == 1
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -127]]
    codes, scale = quantized(torch.tensor([[7.0, 0.5, 1.5, -2.5]]), "4")
    assert codes.tolist() == [[7, 0, 2, -2]]
    (codes,) = quantize_activation(
        torch.tensor([0.5, 1.5, 2.5]), ActivationType.parse("8_static"), [torch.ones(1), torch.tensor([1])]
    )
    assert codes.tolist() == [1, 3, 3]  # the zero point is added after rounding


# ----------------------------------------------------------------------------------------------------- small floats


@given(rows(), st.sampled_from(("fp8", "fp8_g128", "fp8_g16")))
def test_fp8_scales_put_the_maximum_of_a_group_at_448(x, name):
    size = ActivationType.parse(name).group_size or x.shape[1]
    codes, scale = quantized(x, name)
    assert (codes.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert codes.shape == x.shape
    assert scale.shape == (6, math.ceil(x.shape[1] / size))
    for index, group in enumerate(x.double().split(size, 1)):
        largest = group.abs().amax(-1)
        torch.testing.assert_close(scale[:, index].double(), largest / 448, rtol=1e-6, atol=2e-45)
        own = codes[:, index * size : (index + 1) * size].double()
        held = scale[:, index] > 1e-30
        assert (own.abs().amax(-1)[held] == 448).all()
        error = (own * scale[:, index, None] - group).abs()
        # half a unit in the last of three bits after the leading one; 2 ** -9 below 2 ** -6
        assert (error <= torch.maximum(group.abs() * 2.0**-4, scale[:, index, None].double() * 2.0**-10) * 1.0001).all()


def test_static_fp8_saturates():
    scale = torch.tensor([0.5])
    (codes,) = quantize_activation(
        torch.tensor([1.0, -224.0, 225.0, -1e9, math.inf, math.nan]), ActivationType.parse("fp8_static"), [scale]
    )
    assert codes.float()[:5].tolist() == [2.0, -448.0, 448.0, -448.0, 448.0]
    assert codes.float()[5].isnan()


@given(rows(), st.sampled_from(("mxfp4", "mxfp8")))
def test_mx_groups_have_powers_of_two(x, name):
    codes, scale = quantized(x, name)
    top, bits, smallest = (6.0, 1, 0.5) if name == "mxfp4" else (448.0, 3, 2.0**-9)
    assert codes.dtype == (torch.float32 if name == "mxfp4" else torch.float8_e4m3fn)
    assert scale.shape == (6, math.ceil(x.shape[1] / 32))
    for index, group in enumerate(x.float().split(32, 1)):
        assert torch.equal(scale[:, index], mx_scales(group.abs().amax(-1), name))
        own, step = codes[:, index * 32 : (index + 1) * 32].double(), scale[:, index, None].double()
        assert own.abs().max() <= top
        clamped = group.double().clamp(-top * step, top * step)
        error = (own * step - clamped).abs()
        assert (error <= torch.maximum(clamped.abs() * 2.0 ** -(bits + 1), step * smallest / 2)).all()


@given(rows())
def test_nvfp4_scales_are_e4m3_numbers_under_the_stored_one(x):
    outer = torch.tensor([448 * 6 / max(x.abs().max().item(), 1e-3)])
    codes, scale = quantized(x, "nvfp4", [outer])
    assert scale.shape == (6, math.ceil(x.shape[1] / 16))
    inner = (scale * outer).double()
    torch.testing.assert_close(inner.to(torch.float8_e4m3fn).double(), inner, rtol=1e-6, atol=0)
    for index, group in enumerate(x.float().split(16, 1)):
        largest = group.abs().amax(-1).double() / 6
        floor = 2.0**-9 / outer.item()
        bound = largest / 16 + floor
        assert ((scale[:, index] - largest).abs() <= bound * 1.0001).all()
        own, step = codes[:, index * 16 : (index + 1) * 16].double(), scale[:, index, None].double()
        clamped = group.double().clamp(-6 * step, 6 * step)
        assert ((own * step - clamped).abs() <= torch.maximum(clamped.abs() / 4, step / 4) * 1.0001).all()


def test_nvfp4_activations_are_those_of_compressed_tensors():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x, outer = torch.randn(2, 5, 64), torch.tensor([600.0])
    args = quantization.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, dynamic="local",
        scale_dtype=torch.float8_e4m3fn, symmetric=True,
    )  # fmt: skip
    scales, _ = compute_dynamic_scales_and_zp(x, args, None, global_scale=outer)
    codes, ours = quantized(x, "nvfp4", [outer])
    assert torch.equal(ours, scales.float() / outer)
    assert torch.equal(codes, quantize(x, scales, None, args, global_scale=outer))


# ------------------------------------------------------------------------------------------------------- every kind


@pytest.mark.parametrize("name", EVERY)
def test_zeros_are_exact_in_every_kind(name):
    x = torch.randn(3, 50)
    x[1], x[:, 7] = 0, 0
    result = restored(x, name)
    assert result.isfinite().all()
    assert (result[x == 0] == 0).all()
    codes, scale, *zero = quantized(x, name)
    kind = ActivationType.parse(name)
    assert (codes[1].float() == (zero[0].expand(3, 1)[1] if zero else 0)).all()
    if kind.dynamic and kind.number in ("int", "fp8"):
        assert (scale[1] == 0).all()


@pytest.mark.parametrize("name", EVERY)
def test_rows_are_independent_of_each_other_and_of_memory_order(name):
    x = torch.randn(2, 3, 150)
    together = restored(x, name)
    for i in range(2):
        for j in range(3):
            assert torch.equal(restored(x[i, j], name), together[i, j])
    assert torch.equal(restored(x.transpose(0, 1), name), together.transpose(0, 1))
    assert torch.equal(restored(x.permute(2, 0, 1).contiguous().permute(1, 2, 0), name), together)
    assert restored(x[:, :0], name).shape == (2, 0, 150)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["8", "4", "fp8", "fp8_g128", "mxfp4", "mxfp8", *STATIC])
def test_what_was_rounded_once_is_rounded_to_itself(name, dtype):
    """Up to the rounding of the scale: the maximum of a row is a code. The other kinds move the range of a row."""
    x = torch.randn(4, 96).to(dtype)
    once = restored(x, name)
    torch.testing.assert_close(restored(once.float(), name), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("name", [*DYNAMIC, "8_clip"])
def test_a_row_that_is_not_finite_stays_so_and_spoils_no_other(name, wrong):
    x = torch.randn(3, 64)
    x[1, 5] = wrong
    result = restored(x, name)
    assert not result[1, :32].isfinite().all()
    others = restored(x[[0, 2]], name)
    assert torch.equal(result[[0, 2]], others)
    if name in ("8", "4", "8_clip", "8_dynamic_asym", "4_dynamic_asym"):
        codes, scale, *zero = quantized(x, name)
        product = (codes[1].double() - (zero[0][1] if zero else 0)).sum() * scale[1]
        assert not product.isfinite()


@pytest.mark.parametrize("name", [*STATIC, "nvfp4"])
def test_infinities_saturate_where_scales_are_stored(name):
    x = torch.tensor([[math.inf, -math.inf, 1.0, *[0.0] * 13]])
    finite = torch.tensor([[1e30, -1e30, 1.0, *[0.0] * 13]])
    assert torch.equal(restored(x, name)[0, :2], restored(finite, name)[0, :2])


@pytest.mark.parametrize("name", EVERY)
def test_ops_describe_what_they_return(name):
    """The fake of ``qcompile::quantize`` has the shapes and dtypes of the real tensors."""
    torch.library.opcheck(
        torch.ops.qcompile.quantize.default, (torch.randn(2, 3, 150), params_of(name), name),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
