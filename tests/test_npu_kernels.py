"""Every kernel of the NPU backend on Ascend's operations as the goldens compute them: products, layouts, bytes."""

import dataclasses

import pytest
import torch
from npu_cases import EXPERTS, HALF, LINEAR, TOLERANCE, equal_weights, linear_site, packed_weight, quantized, size
from npu_library import define

from qcompile import numerics
from qcompile.backends.npu import BACKEND
from qcompile.errors import UnsupportedError
from qcompile.kernels import Kernel, choose
from qcompile.types import Scheme

define()

CASES = [
    pytest.param(kernel, Scheme.parse(scheme), dtype, id=f"{kernel}-{scheme}-{str(dtype).removeprefix('torch.')}")
    for kernel, schemes in LINEAR.items()
    for scheme in schemes
    for dtype in HALF
]
each_case = pytest.mark.parametrize(("kernel", "scheme", "dtype"), CASES)


def run(kernel: Kernel, packed, x, bias=None):
    out, tensors = packed.shape[0], kernel.prepare(packed)
    if packed.scheme.activation is None:
        return kernel.linear(x, tensors, bias, packed.scheme, out)
    return kernel.scaled_linear(quantized(x, packed), tensors, bias, packed.scheme, out, x.dtype)


def exact(packed, x, bias=None):
    """The product in float64, and the size of what was summed."""
    inputs, weight = x.double(), numerics.dequantize_packed(packed).double()
    if packed.scheme.activation is not None:
        inputs = numerics.dequantize_activation(quantized(x, packed), packed.scheme.activation)
        weight = numerics.dequantize_packed(dataclasses.replace(packed, scales=packed.scales.double()))
    result, total = inputs @ weight.t(), (inputs.square() @ weight.square().t()).sqrt()
    return (result, total) if bias is None else (result + bias.double(), total + bias.double().abs())


def assert_product(result, packed, x, bias=None):
    expected, total = exact(packed, x, bias)
    assert result.dtype == x.dtype
    assert result.shape == expected.shape
    assert ((result.double() - expected).norm() / total.norm()).item() <= 1.5 * TOLERANCE[x.dtype]


@each_case
def test_each_scheme_goes_to_its_kernel_and_computes_the_product(kernel, scheme, dtype):
    site = linear_site(64, 256, dtype)
    chosen, why = choose(BACKEND, site, scheme)
    assert chosen is BACKEND.kernel(kernel), why
    packed = packed_weight((64, 256), scheme, dtype)
    bias = torch.randn(64).to(dtype)
    for lead in ((), (1,), (7,), (2, 3), (2, 1, 3)):
        x = torch.randn(*lead, 256).to(dtype)
        assert_product(run(chosen, packed, x), packed, x)
        assert_product(run(chosen, packed, x, bias), packed, x, bias)


@each_case
def test_columns_stored_in_another_order_are_restored_and_computed(kernel, scheme, dtype):
    """Act-order checkpoints: other systems refuse them on NPUs."""
    packed = packed_weight((64, 256), scheme, dtype, permuted=True)
    chosen, x = BACKEND.kernel(kernel), torch.randn(2, 3, 256).to(dtype)
    assert_product(run(chosen, packed, x), packed, x)
    assert equal_weights(chosen.restore(chosen.prepare(packed), scheme, (64, 256), packed.activation_tensors()), packed)


@each_case
def test_restore_is_the_inverse_of_prepare_and_bytes_are_exact(kernel, scheme, dtype):
    chosen = BACKEND.kernel(kernel)
    for shape in ((64, 256), (192, 512)):
        packed = packed_weight(shape, scheme, dtype)
        tensors = chosen.prepare(packed)
        assert chosen.nbytes(linear_site(*shape, dtype), scheme) == size(tensors)
        assert equal_weights(chosen.restore(tensors, scheme, shape, packed.activation_tensors()), packed)


def test_inputs_may_have_any_strides():
    for kernel, schemes in LINEAR.items():
        packed = packed_weight((64, 256), Scheme.parse(schemes[0]))
        base = torch.randn(256, 3, 4).bfloat16()
        for x in (base.permute(1, 2, 0), base[:, 0].t(), torch.randn(5, 512).bfloat16()[:, ::2]):
            assert_product(run(BACKEND.kernel(kernel), packed, x), packed, x)


def test_integer_sums_are_those_of_the_definition():
    """int8 and int4 products are exact; only the order of two multiplications in float32 is free."""
    for name in ("w8a8", "w4a4"):
        scheme = Scheme.parse(name)
        packed = packed_weight((64, 256), scheme)
        kernel, _ = choose(BACKEND, linear_site(64, 256), scheme)
        x = torch.randn(9, 256).bfloat16()
        result, definition = run(kernel, packed, x), run(Kernel(), packed, x)
        assert (result.double() - definition.double()).abs().max() <= 2**-8 * definition.double().abs().max()


def test_without_its_compensation_the_split_int8_product_is_far_off():
    """So a checkpoint's own compensation, or one of another shard, cannot go unnoticed."""
    scheme = Scheme.parse("w4a8")
    packed = packed_weight((64, 256), scheme)
    kernel = BACKEND.kernel("int8_int4_nz")
    words, scales, containers, bias = kernel.prepare(packed)
    x = torch.randn(16, 256).bfloat16()
    parts = quantized(x, packed)
    lacking = kernel.scaled_linear(
        parts, [words, scales, containers, torch.zeros_like(bias)], None, scheme, 64, x.dtype
    )
    expected, total = exact(packed, x)
    assert ((lacking.double() - expected).norm() / total.norm()).item() > 0.05


def test_activations_of_a_linear_survive_the_operation_that_overwrites_them():
    scheme = Scheme.parse("w4a8")
    packed = packed_weight((64, 256), scheme)
    kernel, x = BACKEND.kernel("int8_int4_nz"), torch.randn(5, 256).bfloat16()
    parts, tensors = quantized(x, packed), kernel.prepare(packed)
    before = parts[0].clone()
    first = kernel.scaled_linear(parts, tensors, None, scheme, 64, x.dtype)
    assert torch.equal(parts[0], before)
    assert torch.equal(kernel.scaled_linear(parts, tensors, None, scheme, 64, x.dtype), first)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_static_scale_and_zero_point_cost_no_operation(dtype):
    """Both are in the prepared tensors; a float16 bias alone is added afterwards."""
    scheme = Scheme.parse("w8a8_static")
    packed = packed_weight((64, 256), scheme, dtype)
    kernel = BACKEND.kernel("int8_static_nz")
    tensors, x = kernel.prepare(packed), torch.randn(5, 256).to(dtype)
    parts = quantized(x, packed)

    def traced(bias):
        graph = torch.fx.experimental.proxy_tensor.make_fx(
            lambda codes: kernel.scaled_linear([codes, *parts[1:]], tensors, bias, scheme, 64, dtype)
        )(parts[0])
        return [
            str(node.target) for node in graph.graph.nodes if node.op == "call_function" and "view" not in str(node)
        ]

    assert traced(None) == ["npu.npu_quant_matmul.default"]


def test_unknown_kernels_are_named_with_the_nearest():
    with pytest.raises(UnsupportedError, match=r"no kernel 'int8_stati'\. Did you mean 'int8_static'"):
        BACKEND.kernel("int8_stati")


def test_every_kernel_is_in_the_cases():
    ordinary = {"int8", "int8_static", "int8_int4"}  # what stands behind FRACTAL_NZ; same class, other layout
    assert {kernel.name for kernel in BACKEND.kernels} - ordinary == {*LINEAR, *EXPERTS}
