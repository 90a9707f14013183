"""The Triton kernels in Triton's interpreter; ``test_cuda_numerics.py`` runs this file in a process of its own.

The interpreter rounds float32 to bfloat16 towards zero, which the tolerance for bfloat16 leaves room for.
"""

import ptx
import pytest
import torch
from cuda_cases import (
    ARCHS,
    DTYPES,
    error,
    exact,
    exact_experts,
    kernel_for,
    packed_weight,
    run,
    run_experts,
)  # fmt: skip

from qcompile.backends.cuda import BACKEND, tiles
from qcompile.backends.cuda.device import launch
from qcompile.types import Scheme

TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 5e-4}

ptx.install()


@pytest.fixture(params=["portable", "ptx"])
def path(request, monkeypatch):
    """Both ways to take codes apart: that of NVIDIA's GPUs, and that of all others."""
    monkeypatch.setattr(launch, "_path", lambda device: {"PTX": request.param == "ptx", "WIDE": True})
    return request.param


def check(scheme: Scheme, arch: str, dtype: torch.dtype, rows: int, out: int, inn: int, permuted=False, bias=True):
    packed = packed_weight(scheme, (out, inn), dtype, permuted)
    x, offset = torch.randn(rows, inn).to(dtype), torch.randn(out).to(dtype) if bias else None
    with BACKEND.target(arch):
        result = run(kernel_for(scheme, arch, dtype), packed, x, offset)
    assert result.dtype == dtype
    assert result.shape == (rows, out)
    assert error(result, exact(packed, x, offset)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "scheme",
    ["w4a16_g128", "w4a16_g64_asym", "w4a16_g32", "w4a16_g32_asym", "w4a16", "w3a16_g64", "w8a16", "w8a16_g32_asym",
     "w6a16_g128_asym"],
)  # fmt: skip
def test_weight_only(scheme, arch, dtype, path):
    for rows, out, inn in ((1, 64, 512), (40, 72, 200)):
        check(Scheme.parse(scheme), arch, dtype, rows, out, inn)


def check_quantized(scheme: str) -> None:
    for rows, out, inn in ((1, 64, 512), (40, 72, 200), (130, 136, 256)):
        check(Scheme.parse(scheme), "sm_90", torch.float16, rows, out, inn)


@pytest.mark.parametrize(
    "scheme",
    ["w4a8", "w4a8_g32_asym", "w4a8_g64", "w4a8_g128_asym_dynamic_asym", "w4a8_clip", "w4a4", "w3a8_g128"],
)
def test_four_bit_weights_with_quantized_activations(scheme, path):
    check_quantized(scheme)


@pytest.mark.parametrize(
    "scheme",
    ["w8a8", "w8a8_static", "w8a8_static_sym", "w8a8_g32", "w8a8_g128", "w8a8_asym_dynamic_asym", "w6a8", "wfp8afp8",
     "wfp8afp8_static", "wfp8afp8_tensor", "wfp8afp8_b128x128"],
)  # fmt: skip
def test_eight_bit_weights_with_quantized_activations(scheme):
    check_quantized(scheme)


@pytest.mark.parametrize(
    "scheme", ["w8a8", "w8a8_g32", "w4a8_g32", "w4a8_g64", "w4a8", "wfp8afp8", "wfp8afp8_b128x128"]
)
def test_sums_of_quantized_products_are_exact(scheme):
    """float32 parts of a product hold no rounding but that of float32."""
    parsed = Scheme.parse(scheme)
    packed, kernel = (
        packed_weight(parsed, (64, 1024), torch.float32),
        kernel_for(parsed, "sm_80" if "fp8" not in scheme else "sm_89"),
    )
    x = torch.randn(3, 1024)
    assert error(run(kernel, packed, x), exact(packed, x)) < 2e-6


@pytest.mark.parametrize(
    "scheme",
    ["w4a16_g128", "w4a16_g32_asym", "w8a16", "w8a8", "w8a8_static", "w4a8_g64", "w4a8_g128_asym", "w4a4",
     "wfp8afp8", "wfp8afp8_tensor", "wfp8afp8_b128x128"],
)  # fmt: skip
@pytest.mark.parametrize("permuted", [False, True])
def test_experts(scheme, permuted):
    """Few rows, each with a program; many in blocks; experts without rows, at the ends as well; no rows at all."""
    parsed, dtype = Scheme.parse(scheme), torch.float16
    packed = packed_weight(parsed, (6, 72, 192), dtype, permuted and not parsed.weight.block)
    kernel = kernel_for(parsed, "sm_90", dtype, experts=6)
    for counts in ([0, 1, 0, 2, 0, 0], [3, 0, 20, 1, 0, 0], [0, 0, 0, 0, 0, 2], [0] * 6):
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        x = torch.randn(sum(counts), 192).to(dtype)
        result = run_experts(kernel, packed, x, ends)
        assert result.shape == (sum(counts), 72)
        if sum(counts):
            assert error(result, exact_experts(packed, x, ends)) < TOLERANCE[dtype]


@pytest.mark.parametrize("arch", ARCHS)
def test_act_order_gathers_the_activations(arch):
    check(Scheme.parse("w4a16_g64_asym"), arch, torch.float16, 3, 64, 192, permuted=True)


@pytest.mark.parametrize("scheme", ["w4a16_g128", "w4a16_g32_asym", "w8a16"])
def test_many_rows_take_other_tiles(scheme):
    for arch in ARCHS:
        check(Scheme.parse(scheme), arch, torch.float16, 130, 64, 128)


@pytest.mark.parametrize("scheme", ["w4a16_g128", "w4a16_g64", "w4a16_g32_asym", "w8a16", "w8a16_asym"])
def test_from_some_rows_on_the_weight_is_dequantized(scheme, path, monkeypatch):
    monkeypatch.setattr(launch, "MANY_ROWS", 20)
    monkeypatch.setattr(launch, "SLICE_BYTES", 64 * 200 * 2)  # several slices
    monkeypatch.setattr(launch, "float_product", None)
    for arch in ARCHS:
        check(Scheme.parse(scheme), arch, torch.float16, 21, 136, 200)


def test_every_element_is_written_and_no_other(monkeypatch):
    """Outputs that begin as NaN have none left; what lies around x and y is neither used nor changed."""
    scheme = Scheme.parse("w4a16_g64_asym")
    packed, kernel = packed_weight(scheme, (72, 200), torch.float16), kernel_for(scheme, "sm_90")
    wide = torch.full((7, 300), torch.nan, dtype=torch.float16)
    wide[1:6, 8:208] = torch.randn(5, 200)
    x, tensors, made = wide[1:6, 8:208], kernel.prepare(packed), []

    empty = torch.Tensor.new_empty

    def poisoned(self, size, *args, **kwargs):
        if not isinstance(size, tuple):  # the interpreter's own
            return empty(self, size, *args, **kwargs)
        made.append(torch.full(size, torch.nan, dtype=kwargs.get("dtype", self.dtype)))
        return made[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    result = kernel.linear(x, tensors, None, scheme, 72)
    assert made
    assert error(result, exact(packed, x)) < TOLERANCE[torch.float16]


def test_splits_give_the_same_sum_in_a_fixed_order():
    scheme = Scheme.parse("w4a16_g128")
    packed, kernel = packed_weight(scheme, (64, 1024), torch.float16), kernel_for(scheme, "sm_90")
    codes, pairs = kernel.prepare(packed)
    x = torch.randn(2, 1024).half()
    arguments = (x, codes, pairs, None, None, 4, True, 128, True, 64)
    parts = torch.ops.qcompile_cuda.float_linear(*arguments, 4)
    assert parts.shape == (4, 2, 64)
    assert error(parts.sum(0), exact(packed, x)) < 1e-6  # float32 sums of exact products
    for part, columns in zip(parts, torch.arange(1024).split(256), strict=True):
        alone = torch.zeros_like(x)
        alone[:, columns] = x[:, columns]
        assert error(part, exact(packed, alone)) < 1e-6
    for splits in (0, 4):
        first, again = (torch.ops.qcompile_cuda.float_linear(*arguments, splits) for _ in range(2))
        assert torch.equal(first, again)


def test_no_rows():
    scheme = Scheme.parse("w4a16_g128")
    packed, kernel = packed_weight(scheme, (64, 256), torch.float16), kernel_for(scheme, "sm_90")
    assert run(kernel, packed, torch.empty(0, 256).half()).shape == (0, 64)
    assert run(kernel, packed, torch.empty(2, 0, 256).half()).shape == (2, 0, 64)


def test_splits_of_another_gpu_are_taken(monkeypatch):
    """A graph that was traced for one GPU runs on another, whose tiles are wider."""
    scheme = Scheme.parse("w4a16")
    packed, kernel = packed_weight(scheme, (64, 384), torch.float16), kernel_for(scheme, "sm_90")
    codes, pairs = kernel.prepare(packed)
    x = torch.randn(1, 384).half()
    chosen = tiles.choose(tiles.Weight("w4a16", 64, 384), 1, launch.current())
    assert 384 % (2 * chosen.bk)
    parts = torch.ops.qcompile_cuda.float_linear(x, codes, pairs, None, None, 4, True, 0, True, 64, 2)
    assert error(parts.sum(0), exact(packed, x)) < 1e-6
