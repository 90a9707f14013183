"""Linears of one input become one product, of the same bits, without a copy of any weight."""

import functools
import re

import pytest
import torch
from qcompile.passes.base import semantic_name
from qcompile.passes.merge_linears import MergeLinears
from test_passes_canonicalize import aot_graph
from torch import nn
from torch.nn import functional as F

import qcompile
from qcompile.backends.cpu import native
from qcompile.kernels import Kernel
from qcompile.numerics import quantize_weight
from qcompile.ops import find_kernel
from qcompile.types import Scheme
from qcompile.verify import run_pass

built = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())
OUTS = (100, 64, 48)
IN = 96
SCHEMES = ("w4a16_g32", "w4a16_g32_asym", "w8a16", "w8a8", "w4a8_g32_asym", "w8a8_dynamic_asym")


@functools.cache
def weights_of(scheme: str, kernel: str, outs: tuple[int, ...] = OUTS) -> list[list[torch.Tensor]]:
    """Prepared weights of Linears from IN features to ``outs``."""
    torch.manual_seed(1)
    packed = [quantize_weight(torch.randn(out, IN), Scheme.parse(scheme)) for out in outs]
    return [find_kernel(kernel).prepare(weight) for weight in packed]


def product(x, weight, bias, scheme: str, kernel: str, out: int):
    activation = Scheme.parse(scheme).activation
    if activation is None:
        return torch.ops.qcompile.linear.default(x, weight, bias, scheme, kernel, out)
    return torch.ops.qcompile.scaled_linear.default(x, weight, bias, scheme, kernel, out, torch.float32)


def block(scheme: str, kernel: str = "cpu.native", biases=(True, False, True)):
    """(function, inputs): x through three Linears, as a graph would hold them after sharing the quantization."""
    weights = weights_of(scheme, kernel)
    each = len(weights[0])
    added = [torch.randn(out) for out, wanted in zip(OUTS, biases, strict=True) if wanted]

    def function(x, *tensors):
        parts, rest = [tensors[i * each : i * each + each] for i in range(3)], iter(tensors[3 * each :])
        activation = Scheme.parse(scheme).activation
        inputs = x if activation is None else torch.ops.qcompile.quantize.default(x, [], str(activation))
        return [
            product(inputs, list(weight), next(rest) if wanted else None, scheme, kernel, out)
            for weight, wanted, out in zip(parts, biases, OUTS, strict=True)
        ]

    return function, (torch.randn(5, IN), *[t for weight in weights for t in weight], *added)


@built
@pytest.mark.parametrize("scheme", SCHEMES)
def test_they_become_one_call_with_the_same_bits(scheme):
    function, inputs = block(scheme)
    module = aot_graph(function, *inputs)
    record = run_pass(MergeLinears(), module, inputs)
    assert (record.matches, record.rejected) == (1, ())
    names = [semantic_name(node) for node in module.graph.nodes if semantic_name(node)]
    assert names == (["quantize", "linears"] if Scheme.parse(scheme).activation else ["linears"])
    (wide,) = [node for node in module.graph.nodes if semantic_name(node) == "linears"]
    assert all(node.op == "placeholder" for node in wide.args[1])  # the weights as they are
    assert run_pass(MergeLinears(), module, inputs).matches == 0


@built
@pytest.mark.parametrize("rows", [0, 1, 3, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_one_product_is_each_of_them(rows, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for scheme in SCHEMES:
            parsed, x = Scheme.parse(scheme), torch.randn(rows, IN, dtype=dtype)
            activation = parsed.activation
            parts = [x] if activation is None else torch.ops.qcompile.quantize.default(x, [], str(activation))
            weights, biases = weights_of(scheme, "cpu.native"), [torch.randn(OUTS[0]), None, torch.randn(OUTS[2])]
            flat = [tensor for weight in weights for tensor in weight]
            merged = torch.ops.qcompile.linears(parts, flat, biases, scheme, "cpu.native", list(OUTS), dtype)
            alone = Kernel.linears(find_kernel("cpu.native"), parts, weights, biases, parsed, OUTS, dtype)
            assert all(torch.equal(*pair) for pair in zip(merged, alone, strict=True))
    finally:
        torch.set_num_threads(before)


@built
def test_weights_that_do_not_belong_together_are_refused_by_the_kernel():
    weights = [weights_of("w8a8", "cpu.native")[0], find_kernel("cpu.native").prepare(
        quantize_weight(torch.randn(64, 2 * IN), Scheme.parse("w8a8"))
    )]  # fmt: skip
    parts = torch.ops.qcompile.quantize.default(torch.randn(2, IN), [], "8")
    flat = [tensor for weight in weights for tensor in weight]
    with pytest.raises(RuntimeError, match="must have the same input features and groups"):
        torch.ops.qcompile.linears(parts, flat, [None, None], "w8a8", "cpu.native", [OUTS[0], 64], torch.float32)


class TestApart:
    def matches(self, function, *inputs):
        record = run_pass(MergeLinears(), aot_graph(function, *inputs), inputs)
        return record.matches, [why for _, why in record.rejected]

    def test_where_the_kernel_does_not_merge(self):
        function, inputs = block("w8a8", "cpu.reference")
        assert self.matches(function, *inputs) == (0, [])

    @built
    def test_where_inputs_or_schemes_differ(self):
        weights = {s: weights_of(s, "cpu.native")[0] for s in ("w8a16", "w4a16_g32")}

        def function(x, *tensors):
            first, other = tensors[:2], tensors[2:]
            return (
                product(x, list(first), None, "w8a16", "cpu.native", OUTS[0]),
                product(x * 2, list(first), None, "w8a16", "cpu.native", OUTS[0]),
                product(x, list(other), None, "w4a16_g32", "cpu.native", OUTS[0]),
            )

        assert self.matches(function, torch.randn(2, IN), *weights["w8a16"], *weights["w4a16_g32"]) == (0, [])

    @built
    def test_where_each_has_an_order_of_columns(self):
        weight = weights_of("w4a16_g32", "cpu.native")[0]
        order = torch.randperm(IN, dtype=torch.int32)

        def function(x, order, *tensors):
            same = "w4a16_g32", "cpu.native", OUTS[0]
            return product(x, [*tensors, order], None, *same), product(x, [*tensors, order], None, *same)

        assert self.matches(function, torch.randn(2, IN), order, *weight) == (
            0, ["each of them has an order of input features of its own"],
        )  # fmt: skip

    @built
    def test_where_one_needs_what_is_made_later(self):
        weight = weights_of("w8a16", "cpu.native")[0]

        def function(x, *tensors):
            first = product(x, list(tensors), None, "w8a16", "cpu.native", OUTS[0])
            return first, product(x, list(tensors), first.sum(0), "w8a16", "cpu.native", OUTS[0])

        matches, (why,) = self.matches(function, torch.randn(2, IN), *weight)
        assert matches == 0
        assert re.fullmatch(r"sum\w*, which linear_\w* reads, is made after linear\w*", why)


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96, bias=False), nn.Linear(96, 64)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@built
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a8"])
def test_compiled_modules_keep_their_weights_to_themselves(scheme, fresh_dynamo):
    """Compiled by Inductor, one bias missing; weights that are replaced afterwards are those that count."""
    x = torch.randn(3, 64)
    model = qcompile.quantize(GatedMLP(), scheme, example_inputs=(x,))
    compiled = torch.compile(model, backend="qcompile", dynamic=True)
    with torch.no_grad():
        for rows in (3, 1, 9):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(compiled(x), model(x), atol=2e-2 if scheme == "w8a8" else 1e-5, rtol=0)
        (merged,) = {r.matches for g in qcompile.report(compiled).graphs for r in g.passes if r.name == "merge_linears"}
        assert merged == 1
        other = qcompile.quantize(GatedMLP(), scheme, example_inputs=(x,))
        model.load_state_dict(other.state_dict(), assign=True)
        torch.testing.assert_close(compiled(x), other(x), atol=2e-2 if scheme == "w8a8" else 1e-5, rtol=0)
