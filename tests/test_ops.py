"""The semantic ops keep the promises of torch.library, and trace with every kernel of the CPU."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile import numerics, ops
from qcompile.modules import QuantLinear, quantized_modules
from qcompile.types import ActivationType, Scheme

CASES = [
    ("w4a16_g32_asym", "cpu.int4pack", torch.bfloat16),
    ("w8a16", "cpu.int8pack", torch.float16),
    ("w3a16_g16", "cpu.reference", torch.float32),
    ("w8a8", "cpu.int_mm", torch.bfloat16),
    ("w8a8", "cpu.reference", torch.float32),
]
each_case = pytest.mark.parametrize(("scheme", "kernel", "dtype"), CASES, ids=lambda value: str(value))
OUT, IN = 13, 70


@functools.cache
def packed_weight(scheme: str, dtype: torch.dtype):
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    return numerics.quantize_weight(weight, Scheme.parse(scheme))


def quant_linear(scheme: str, kernel: str, dtype: torch.dtype) -> QuantLinear:
    return QuantLinear(packed_weight(scheme, dtype), torch.ones(OUT, dtype=dtype), kernel, dtype)


def inputs(dtype: torch.dtype):
    base = torch.randn(3, 5, IN, dtype=dtype)
    return base, base[0], base[0, 0], base.transpose(0, 1), base[:0]


@each_case
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_linear_ops_pass_the_checks_of_torch(scheme, kernel, dtype, with_bias):
    module = quant_linear(scheme, kernel, dtype)
    bias = module.bias if with_bias else None
    for x in inputs(dtype):
        if module.scheme.activation is None:
            op, args = torch.ops.qcompile.linear, (x, module.tensors(), bias, scheme, kernel, OUT)
        else:
            parts = numerics.quantize_activation(x, module.scheme.activation)
            op = torch.ops.qcompile.scaled_linear
            args = (parts, module.tensors(), bias, scheme, kernel, OUT, dtype)
        torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantize_passes_the_checks_of_torch(dtype):
    for x in inputs(dtype):
        torch.library.opcheck(torch.ops.qcompile.quantize.default, (x, [], "8"))


def test_quantize_is_its_definition():
    x = torch.randn(4, 6, 10).transpose(0, 1)
    expected_parts = numerics.quantize_activation(x, ActivationType(8))
    for result, expected in zip(torch.ops.qcompile.quantize(x, [], "8"), expected_parts, strict=True):
        assert torch.equal(result, expected)
        assert result.is_contiguous()


@each_case
def test_a_module_computes_what_its_weight_says(scheme, kernel, dtype):
    module, x = quant_linear(scheme, kernel, dtype), torch.randn(2, 3, IN, dtype=dtype)
    result = module(x)
    reference = QuantLinear(packed_weight(scheme, dtype), module.bias, "cpu.reference", dtype)(x)
    assert result.dtype == dtype
    assert torch.allclose(result.float(), reference.float(), atol=0.1, rtol=0.02)
    assert torch.equal(module.packed().codes, packed_weight(scheme, dtype).codes)


def test_a_module_shows_itself_and_lists_its_tensors():
    model = torch.nn.Sequential(quant_linear(*CASES[0]), torch.nn.Linear(OUT, OUT))
    assert "in_features=70, out_features=13, bias=True, scheme=w4a16_g32_asym, kernel=cpu.int4pack" in repr(model)
    assert set(model.state_dict()) == {"0.weight_0", "0.weight_1", "0.bias", "1.weight", "1.bias"}
    assert quantized_modules(model) == {"0": model[0]}
    assert not model[0].bias.requires_grad


@each_case
def test_fake_tensors_have_the_shapes_of_real_ones(scheme, kernel, dtype):
    module = quant_linear(scheme, kernel, dtype)
    real = [module(x) for x in inputs(dtype)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [module(mode.from_tensor(x)) for x in inputs(dtype)]
    for result, expected in zip(fake, real, strict=True):
        assert (result.shape, result.dtype, result.stride()) == (expected.shape, expected.dtype, expected.stride())


@each_case
def test_export_keeps_dynamic_shapes_and_one_op_per_module(scheme, kernel, dtype):
    module = quant_linear(scheme, kernel, dtype)
    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=1, max=64)
    program = torch.export.export(
        module, (torch.randn(2, 3, IN, dtype=dtype),), dynamic_shapes=({0: batch, 1: tokens},)
    )
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    expected = (
        ["qcompile.linear.default"]
        if module.scheme.activation is None
        else ["qcompile.quantize.default", "qcompile.scaled_linear.default"]
    )
    assert [target for target in targets if target.startswith("qcompile")] == expected
    for shape in ((1, 1, IN), (5, 7, IN)):
        x = torch.randn(shape, dtype=dtype)
        assert torch.equal(program.module()(x), module(x))


def kernel_call(scheme: str, kernel: str, dtype: torch.dtype):
    """A kernel's own operations as a function of x: what the pass ``lower`` puts into a graph."""
    tensors, found, parsed = (
        quant_linear(scheme, kernel, dtype).tensors(),
        ops.find_kernel(kernel),
        Scheme.parse(scheme),
    )

    def compute(x):
        if parsed.activation:
            parts = numerics.quantize_activation(x, parsed.activation)
            return found.scaled_linear(parts, tensors, None, parsed, OUT, dtype)
        return found.linear(x, tensors, None, parsed, OUT)

    return compute


@each_case
def test_kernels_are_traceable_with_symbolic_shapes(scheme, kernel, dtype):
    compute = kernel_call(scheme, kernel, dtype)
    graph = make_fx(compute, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(4, 5, IN, dtype=dtype))
    assert not any("qcompile" in str(node.target) for node in graph.graph.nodes)
    x = torch.randn(6, 3, IN, dtype=dtype)
    assert torch.equal(graph(x), compute(x))


@each_case
def test_kernels_compute_the_same_when_inductor_compiles_them(scheme, kernel, dtype, fresh_dynamo):
    """One token above all: Inductor gives its views strides that ATen's kernels never see in eager mode."""
    compute = kernel_call(scheme, kernel, dtype)
    compiled = torch.compile(compute)
    for shape in ((1, 1, IN), (IN,), (2, 3, IN), (3, 5, IN)):
        x = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), compute(x), atol=0.1, rtol=0.02)
