"""Layers of experts on a GPU: which calls its kernels take, what a graph then holds, and the same on a CPU."""

import re

import pytest
import torch
from cuda_cases import error, expert_layer
from torch import nn

from qcompile.backends.cpu import BACKEND as CPU
from qcompile.backends.cuda import BACKEND, tiles
from qcompile.backends.cuda.targets import parse
from qcompile.ops import compute_experts

OPERATION = BACKEND.operations["quant_experts"]
SIZES = (8, 2, 128, 64)  # experts, chosen, hidden and intermediate size
SCHEMES = ("w4a16_g64", "w8a16_asym", "w8a8", "w4a8_g64", "wfp8afp8")


def call(scheme: str, tokens: int, activation: str = "silu", sizes=SIZES) -> list:
    layer = expert_layer(scheme, sizes, torch.bfloat16, "sm_90")
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, sizes[0], generator=generator).topk(sizes[1]).indices
    routing = torch.rand(tokens, sizes[1], generator=generator)
    x = torch.randn(tokens, sizes[2], generator=generator).bfloat16()
    return list(layer.arguments(x, ids, routing, activation))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_on_a_cpu_the_ops_compute_what_the_definition_does(scheme, tokens):
    for activation in ("silu", "gelu_tanh", "silu:alpha=1.702:limit=7.0:shift=1.0"):
        arguments = call(scheme, tokens, activation)
        assert OPERATION.refuses(*arguments) == ""
        result, expected = OPERATION.compute(*arguments), compute_experts(*arguments)
        assert result.shape == expected.shape
        assert result.dtype == expected.dtype
        assert not tokens or error(result, expected.double()) < 1e-3


def test_activations_that_are_quantized_already_are_taken():
    arguments = call("w8a8", 3)
    codes = torch.ops.qcompile.quantize(arguments[0][0], [], "8")
    assert torch.equal(OPERATION.compute(codes, *arguments[1:]), OPERATION.compute(*arguments))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({11: "relu2:ungated"}, "relu2:ungated has none"),
        ({4: torch.zeros(8, 128)}, "add no biases"),
        ({7: torch.zeros(8, 128)}, "add no biases"),
        ({12: (8, 128, 48)}, "48 is no multiple of 32"),
        ({0: [torch.zeros(1), torch.zeros(1), torch.zeros(1)]}, "zero points of activations"),
        ({9: "w8a8|float"}, "no float projections"),
        ({10: "cuda.w8a8|cuda.reference"}, "cuda.reference is no kernel"),
        ({8: [torch.ones(8)]}, "for each expert"),
        ({9: "w8a8_asym|w8a8"}, "zero points of w8a8_asym"),
        ({9: "w8a8|w8a8_dynamic_asym"}, "zero points of w8a8_dynamic_asym"),
        ({3: [torch.zeros(1)] * 3}, "an order of each expert"),
    ],
)
def test_what_they_cannot_do_is_a_reason(change, reason):
    arguments = call("w8a8", 1)
    for place, value in change.items():
        arguments[place] = value
    found = OPERATION.refuses(*arguments)
    assert found
    assert re.search(reason, found)


class Layer(nn.Module):
    def __init__(self, scheme: str) -> None:
        super().__init__()
        self.rest = call(scheme, 1)[3:]

    def forward(self, x, ids, routing):
        return torch.ops.qcompile.quant_experts([x], ids, routing, *self.rest)


@pytest.mark.parametrize("scheme", ["w4a16_g64", "w8a8"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_lowered_graph_holds_them(scheme, dynamic, monkeypatch, fresh_dynamo):
    """A CPU in the place of a GPU. One graph for any number of tokens; a known, small one leaves a sum to Inductor."""
    monkeypatch.setattr(CPU, "operations", {"quant_experts": OPERATION}, raising=False)
    graphs: list = []
    options = {"regions": False, "post_grad_custom_post_pass": graphs.append}
    compiled = torch.compile(Layer(scheme), backend="qcompile", options=options, dynamic=dynamic)
    with torch.no_grad():
        for tokens in (3, 9) if dynamic else (2,):
            arguments = call(scheme, tokens)
            (x,), ids, routing = arguments[:3]
            assert error(compiled(x, ids, routing), compute_experts(*arguments).double()) < 1e-3
    (graph,) = graphs
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    ops = torch.ops.qcompile_cuda
    assert [c for c in calls if str(c).startswith("qcompile")] == [
        ops.expert_order.default, ops.gate_up.default, ops.down.default
    ]  # fmt: skip
    assert calls.count(torch.ops.aten.sum.dim_IntList) == (0 if dynamic else 1)
    assert torch.ops.aten.index.Tensor not in calls  # no row is moved to be sorted


def test_fake_calls_have_the_shapes_of_real_ones():
    (x,), ids, routing, up, *_ = arguments = call("w8a16_asym", 3)
    ops, (kernel, _), down = torch.ops.qcompile_cuda, arguments[10].split("|"), arguments[6]
    order, ends = ops.expert_order(ids, 8)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.expert_order.default, (ids, 8), test_utils=tests)
    given = ([x], ids, order, ends, up, "w8a16_asym", kernel, 64, "silu", x.dtype)
    torch.library.opcheck(ops.gate_up.default, given, test_utils=tests)
    for splits in (0, 2):
        given = ([ops.gate_up(*given)] if splits == 0 else given[0], ids, routing, order, ends, down)
        given = (*given, "w8a16_asym", kernel, 128, splits, x.dtype)
        torch.library.opcheck(ops.down.default, given, test_utils=tests)


def test_programs_share_the_experts_of_few_tokens():
    gpu = parse("sm_90")
    assert tiles.expert_splits(1, 8, 2048, gpu) == 8
    assert tiles.expert_splits(8, 8, 2048, gpu) == 2
    assert tiles.expert_splits(1, 6, 2048, gpu) == 2  # whole parts
    assert tiles.expert_splits(64, 8, 7168, gpu) == 1
