"""Every scheme of a Linear and of experts on the device: what is stored there, and what is computed."""

import pytest
import torch
from npu_cases import (
    EXPERTS,
    HALF,
    LINEAR,
    Layer,
    equal_weights,
    experts_site,
    linear_site,
    packed_weight,
    quantized,
    routed,
)  # fmt: skip
from npu_modules import moved

from qcompile.backends.npu import BACKEND
from qcompile.kernels import choose
from qcompile.types import Scheme

LINEARS = [scheme for schemes in LINEAR.values() for scheme in schemes]
SCHEMES = [scheme for schemes in EXPERTS.values() for scheme in schemes]


def run(kernel, packed, x, tensors, bias):
    if packed.scheme.activation is None:
        return kernel.linear(x, tensors, bias, packed.scheme, packed.shape[0])
    parts = quantized(x.cpu(), packed) if x.device.type == "cpu" else [p.npu() for p in quantized(x.cpu(), packed)]
    return kernel.scaled_linear(parts, tensors, bias, packed.scheme, packed.shape[0], x.dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("scheme", LINEARS)
def test_a_linear(scheme, dtype, compare):
    parsed = Scheme.parse(scheme)
    kernel, _ = choose(BACKEND, linear_site(64, 256, dtype), parsed)
    for permuted in (False, True):
        packed = packed_weight((64, 256), parsed, dtype, permuted)
        here, there = kernel.prepare(packed), kernel.prepare(moved(packed, "npu"))
        params = {name: param.npu() for name, param in packed.activation_tensors().items()}
        assert equal_weights(moved(kernel.restore(there, parsed, packed.shape, params), "cpu"), packed)
        for lead, bias in (((5,), None), ((2, 3), torch.randn(64).to(dtype)), ((1, 1), None)):
            x = torch.randn(*lead, 256).to(dtype)
            own = None if bias is None else bias.npu()
            compare(run(kernel, packed, x.npu(), there, own), run(kernel, packed, x, here, bias), str(list(lead)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts(scheme, dtype, compare):
    here = Layer(scheme, dtype)
    there = Layer(scheme, dtype)
    there.packed, there.biases = [moved(p, "npu") for p in here.packed], [bias.npu() for bias in here.biases]
    for kernel, packed in zip(here.kernels, here.packed, strict=True):
        params = {name: param.npu() for name, param in packed.activation_tensors().items()}
        tensors = kernel.prepare(moved(packed, "npu"))
        assert equal_weights(moved(kernel.restore(tensors, here.scheme, packed.shape, params), "cpu"), packed)
    for tokens, k, biases in ((9, 2, False), (1, 1, True)):
        (ids, routing), x = routed(tokens, k=k), torch.randn(tokens, 256).to(dtype)
        actual = there.run(x.npu(), ids.npu(), routing.npu(), biases=biases)
        here.biases = [bias.cpu() for bias in there.biases]
        compare(actual, here.run(x, ids, routing, biases=biases), f"{tokens} tokens")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a4", "w8a8_static", "w8a8_static_sym"])
def test_quantization_of_activations(scheme, dtype, compare):
    kind = Scheme.parse(scheme).activation
    params = list(packed_weight((64, 256), Scheme.parse(scheme), dtype).activation_tensors().values())
    x, quantize = torch.randn(3, 5, 256).to(dtype), BACKEND.operations["quantize"]
    assert not quantize.refuses(x, params, str(kind))
    expected = quantize.compute(x, params, str(kind))
    for actual, wanted in zip(quantize.compute(x.npu(), [p.npu() for p in params], str(kind)), expected, strict=True):
        compare(actual, wanted)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_norms_and_the_quantization_after_them(dtype, compare):
    x, residual, weight = torch.randn(3, 5, 256).to(dtype), torch.randn(3, 5, 256).to(dtype), torch.rand(256).to(dtype)
    static = list(packed_weight((64, 256), Scheme.parse("w8a8_static"), dtype).activation_tensors().values())
    cases = [("rms_norm", (x, weight), None), ("add_rms_norm", (x, residual, weight), None)]
    for params, scheme in (([], "w8a8"), (static, "w8a8_static")):
        cases.append(("add_rms_norm_quantize", (x, residual, weight), (params, str(Scheme.parse(scheme).activation))))
    for name, tensors, quantization in cases:
        operation = BACKEND.operations[name]
        params, activation = quantization or ([], "")

        def run(where, operation=operation, tensors=tensors, params=params, activation=activation):
            own = [tensor.to(where) for tensor in tensors]
            rest = ([param.to(where) for param in params], activation, False) if activation else ()
            arguments = (*own, None, 1e-6, None, 0.0, False, *rest)
            return None if operation.refuses(*arguments) else operation.compute(*arguments)

        expected, actual = run("cpu"), run("npu")
        if expected is None:  # stored scales beside bfloat16: in two steps
            assert dtype == torch.bfloat16
            assert params
            continue
        for ours, wanted in (
            zip(actual, expected, strict=True) if isinstance(expected, list | tuple) else [(actual, expected)]
        ):
            compare(ours, wanted, f"{name} {activation}")


def test_a_site_is_stored_as_fractal_nz_where_that_is_allowed():
    for scheme, nz in (("w8a8", True), ("w8a8_static", True), ("w4a8", True), ("w4a4", False), ("w4a16_g32", False)):
        parsed = Scheme.parse(scheme)
        kernel, _ = choose(BACKEND, linear_site(64, 256), parsed)
        weight = kernel.prepare(moved(packed_weight((64, 256), parsed), "npu"))[0]
        assert (torch.ops.npu.get_npu_format(weight) == 29) == nz, scheme
    for scheme, nz in (("w8a8", True), ("w4a8", True), ("w4a4", True), ("w4a16_g32", False), ("w8a16", False)):
        parsed = Scheme.parse(scheme)
        kernel, _ = choose(BACKEND, experts_site(6, 64, 256), parsed)
        weight = kernel.prepare(moved(packed_weight((6, 64, 256), parsed), "npu"))[0]
        assert (torch.ops.npu.get_npu_format(weight) == 29) == nz, scheme
