"""Every CPU kernel against exact products with the dequantized weight, and its promises about layout and bytes."""

import dataclasses
import functools

import pytest
import torch

from qcompile import numerics
from qcompile.backends.cpu import BACKEND, native
from qcompile.errors import UnsupportedError
from qcompile.kernels import Kernel, choose
from qcompile.types import Scheme, Site

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-6}
SHAPES = ((1, 32), (13, 200), (64, 128), (67, 97))
SCHEMES = {
    "native": (
        "w4a16_g128",
        "w4a16_g32_asym",
        "w4a16",
        "w3a16_g40",
        "w8a16",
        "w8a16_g64_asym",
        "w6a16_asym",
        "w8a8",
        "w8a8_dynamic_asym",
        "w4a8",
        "w4a8_g32",
        "w4a8_g128_asym",
        "w4a8_clip",
        "w4a4",
        "w8a8_static",
        "w4a8_g32_asym_static_sym",
    ),
    "int4pack": ("w4a16", "w4a16_g32", "w4a16_g64_asym", "w4a16_g128", "w4a16_g256_asym", "w4a16_asym"),
    "int8pack": ("w8a16",),
    "int_mm": (
        "w8a8",
        "w8a8_static",
        "w8a8_static_sym",
        "w8a8_dynamic_asym",
        "w4a8",
        "w4a8_clip",
        "w4a8_static",
        "w4a4",
        "w4a4_dynamic_asym",
        "w3a8",
    ),
    "reference": [
        "w2a16_g16",
        "w3a16_asym",
        "w4a16_g32_asym",
        "w5a16_g7",
        "w6a16",
        "w7a16_g32",
        "w8a16_g64_asym",
        "w8a8",
        "w8a8_static",
        "w8a8_asym_dynamic_asym",
        "w4a8_g32_asym_static_sym",
        "w4a8_g128_clip",
        "w4a4_g32",
        "wfp8a16",
        "wfp8a16_tensor",
        "wfp8a16_b16x32",
        "wfp8afp8",
        "wfp8afp8_g64",
        "wfp8afp8_tensor_static",
        "wfp8afp8_b16x32",
        "wfp8afp8_b128x128_static",
        "wnvfp4a16",
        "wnvfp4anvfp4",
        "wmxfp4a16",
        "wmxfp4amxfp4",
        "wmxfp8amxfp8",
    ],
}

PARAMS = {  # what calibration would find for values around one
    "int": {
        "input_scale": torch.tensor([0.025]),
        "input_zero": torch.tensor([-9], dtype=torch.int32),
        "alpha": torch.tensor([0.8]),
    },
    "fp8": {"input_scale": torch.tensor([0.01])},
    "nvfp4": {"input_scale": torch.tensor([600.0])},
}


def site(out: int, inn: int, dtype: torch.dtype) -> Site:
    return Site("layer", "linear", out, inn, dtype)


def supported_cases():
    for kernel in BACKEND.kernels:
        for name in SCHEMES[kernel.name]:
            for dtype in DTYPES:
                if not kernel.refuses(site(64, 128, dtype), Scheme.parse(name)):
                    yield pytest.param(kernel, Scheme.parse(name), dtype, id=f"{kernel.name}-{name}-{dtype}"[:99])


each_case = pytest.mark.parametrize(("kernel", "scheme", "dtype"), list(supported_cases()))


@functools.cache
def packed_weight(scheme: Scheme, out: int, inn: int, dtype: torch.dtype, permuted: bool = False):
    weight = torch.randn(out, inn, generator=torch.Generator().manual_seed(out * inn)).to(dtype)
    params = (
        {name: PARAMS[scheme.weight.number][name] for name in scheme.activation.params} if scheme.activation else {}
    )
    packed = dataclasses.replace(numerics.quantize_weight(weight, Scheme(scheme.weight)), scheme=scheme, **params)
    order = torch.randperm(inn, generator=torch.Generator().manual_seed(inn)).to(torch.int32)
    return dataclasses.replace(packed, permutation=order) if permuted else packed


def run(kernel: Kernel, packed, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = packed.shape[0]
    if packed.scheme.activation is None:
        return kernel.linear(x, kernel.prepare(packed), bias, packed.scheme, out)
    return kernel.scaled_linear(quantized(x, packed), kernel.prepare(packed), bias, packed.scheme, out, x.dtype)


def quantized(x: torch.Tensor, packed) -> list[torch.Tensor]:
    """What a kernel takes instead of x."""
    params = list(packed.activation_tensors().values())
    parts = numerics.quantize_activation(x, packed.scheme.activation, params)
    return parts if packed.scheme.activation.dynamic else [*parts, *params]


def assert_product(result: torch.Tensor, packed, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """``result`` is ``x @ W.T + bias``, up to the rounding of x's dtype relative to the size of what was summed."""
    inputs, weight = x, numerics.dequantize_packed(packed, torch.float64)
    if packed.scheme.activation is not None:  # integer products use codes and scales, never a rounded weight
        inputs = numerics.dequantize_activation(quantized(x, packed), packed.scheme.activation)
        weight = numerics.dequantize_packed(dataclasses.replace(packed, scales=packed.scales.double()))
    expected = inputs.double() @ weight.t()
    size = (inputs.double().square() @ weight.square().t()).sqrt()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    assert result.dtype == x.dtype
    assert result.shape == expected.shape
    assert result.is_contiguous()
    error = (result.double() - expected).norm() / size.norm() if result.numel() else torch.zeros(())
    assert error.item() <= TOLERANCE[x.dtype] * (1 if bias is None else 1.5)  # adding the bias may round once more


@each_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kernel_computes_the_product(kernel, scheme, dtype, shape):
    out, inn = shape
    packed = packed_weight(scheme, out, inn, dtype)
    bias = torch.randn(out).to(dtype)
    for lead in ((), (0,), (1,), (7,), (2, 3), (2, 1, 3), (2, 0, 3)):
        x = torch.randn(*lead, inn).to(dtype)
        assert_product(run(kernel, packed, x), packed, x)
        assert_product(run(kernel, packed, x, bias), packed, x, bias)


@each_case
def test_inputs_may_have_any_strides(kernel, scheme, dtype):
    packed = packed_weight(scheme, 13, 200, dtype)
    base = torch.randn(200, 3, 4).to(dtype)
    wide = torch.randn(5, 400).to(dtype)
    for x in (base.permute(1, 2, 0), base[:, 0].t(), wide[:, ::2], wide[:, :200], wide[0, 200:].expand(2, 3, 200)):
        assert_product(run(kernel, packed, x), packed, x)


@each_case
def test_a_stored_permutation_is_applied_to_the_input(kernel, scheme, dtype):
    packed = packed_weight(scheme, 13, 96, dtype, permuted=True)
    x = torch.randn(2, 3, 96).to(dtype)
    assert_product(run(kernel, packed, x), packed, x)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes; not every dtype can be compared."""
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


@each_case
@pytest.mark.parametrize("permuted", [False, True], ids=["plain", "permuted"])
def test_restore_is_the_inverse_of_prepare(kernel, scheme, dtype, permuted):
    for out, inn in SHAPES:
        packed = packed_weight(scheme, out, inn, dtype, permuted)
        restored = kernel.restore(kernel.prepare(packed), scheme, (out, inn), packed.activation_tensors())
        assert restored.tensors().keys() == packed.tensors().keys()
        for name, tensor in packed.tensors().items():
            assert restored.tensors()[name].dtype == tensor.dtype
            assert torch.equal(raw(restored.tensors()[name]), raw(tensor)), name
        assert restored.activation_tensors() == packed.activation_tensors()


@each_case
def test_the_estimate_of_bytes_is_exact(kernel, scheme, dtype):
    for out, inn in SHAPES:
        tensors = kernel.prepare(packed_weight(scheme, out, inn, dtype))
        assert kernel.nbytes(site(out, inn, dtype), scheme) == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", ["native", "int_mm"])
def test_int8_products_equal_the_reference(kernel, shape, dtype):
    if reason := BACKEND.kernel(kernel).refuses(site(*shape, dtype), Scheme.parse("w8a8")):
        pytest.skip(reason)
    packed = packed_weight(Scheme.parse("w8a8"), *shape, dtype)
    x, bias = torch.randn(7, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    result, exact = (run(BACKEND.kernel(name), packed, x, bias) for name in (kernel, "reference"))
    # sums of integers are exact in both; the two scales and the bias are applied in float32 here, in float64 there
    step = torch.finfo(dtype).eps if dtype != torch.float32 else 4 * torch.finfo(dtype).eps
    assert ((result.double() - exact.double()).abs() <= step * exact.double().abs().clamp(min=1)).all()


@pytest.mark.parametrize("name", ["native", "int4pack"])
def test_scales_of_either_sign_and_zero_are_computed_alike(name):
    scheme = Scheme.parse("w4a16_g32_asym")
    packed = packed_weight(scheme, 64, 64, torch.bfloat16)
    scales = packed.scales * torch.tensor([-1.0, 1.0], dtype=torch.bfloat16)
    scales[3] = 0
    packed = dataclasses.replace(packed, scales=scales)
    x = torch.randn(3, 64).bfloat16()
    kernel = BACKEND.kernel(name)
    if reason := kernel.refuses(site(64, 64, torch.bfloat16), scheme):
        pytest.skip(reason)
    assert_product(run(kernel, packed, x), packed, x)
    restored = kernel.restore(kernel.prepare(packed), scheme, (64, 64))
    assert torch.equal(numerics.dequantize_packed(restored), numerics.dequantize_packed(packed))


# ---------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("name", "dtype", "kernel", "facts"),
    [
        ("w4a16_g128", torch.bfloat16, "int4pack", ()),
        ("w4a16", torch.float16, "int4pack", ()),
        ("w4a16_g128", torch.float32, "reference", ("int4pack: fast in bfloat16 and float16 only, not torch.float32",)),
        ("w4a16_g48", torch.bfloat16, "reference", ("group size 48 is none of (32, 64, 128, 256)",)),
        ("w3a16_g32", torch.bfloat16, "reference", ()),
        ("w8a16", torch.bfloat16, "int8pack", ()),
        ("w8a16", torch.float32, "reference", ("int8pack: fast in bfloat16 and float16 only, not torch.float32",)),
        ("w8a16_g64", torch.float16, "reference", ("int8pack: computes symmetric weights with one scale per output",)),
        ("w8a16_asym", torch.float16, "reference", ("int8pack: computes symmetric weights",)),
        ("w8a8", torch.float32, "int_mm", ()),
        ("w4a8_clip", torch.bfloat16, "int_mm", ()),
        ("w8a8_static", torch.bfloat16, "int_mm", ()),
        ("w4a8_g128", torch.bfloat16, "reference", ("int_mm: computes symmetric weights with one scale per output",)),
    ],
)
def test_the_best_kernel_that_can_is_chosen_and_says_why_not_a_better_one(monkeypatch, name, dtype, kernel, facts):
    """A kernel for other numbers is no news: that int4 products refuse int8 weights is not said."""
    wanted = site(64, 128, dtype), Scheme.parse(name)
    monkeypatch.setattr(native, "unavailable", lambda: "no C++ compiler")
    chosen, why = choose(BACKEND, *wanted)
    assert chosen is BACKEND.kernel(kernel)
    assert why.partition("; ")[0] == "native: no C++ compiler"
    assert bool(why.partition("; ")[2]) == bool(facts)
    assert all(fact in why for fact in facts)
    assert "computes int4" not in why
    monkeypatch.setattr(native, "unavailable", lambda: "")
    assert choose(BACKEND, *wanted) == (BACKEND.kernel("native"), "")


def test_without_any_kernel_every_refusal_is_listed():
    class OnlyInt4:
        name, kernels = "only4", tuple(BACKEND.kernel(name) for name in ("int4pack", "int8pack"))

    chosen, why = choose(OnlyInt4(), site(64, 128, torch.float32), Scheme.parse("w8a16"))
    assert chosen is None
    assert "int4pack: computes int4 weights" in why
    assert "int8pack: fast in bfloat16" in why


def test_an_unknown_kernel_is_named_with_the_nearest():
    with pytest.raises(UnsupportedError, match=r"no kernel 'int4pak'\. Did you mean 'int4pack'"):
        BACKEND.kernel("int4pak")


def test_the_cpu_is_always_there():
    assert BACKEND.missing() == ""
    assert {kernel.name for kernel in BACKEND.kernels} == set(SCHEMES)
