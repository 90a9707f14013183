"""4-bit activations stay words between their quantization and the products that read words."""

import pytest
import torch
from npu_cases import packed_weight
from npu_library import define
from qcompile.passes.base import semantic_name
from qcompile.passes.pack_activations import PackActivations
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.backends.npu import BACKEND
from qcompile.kernels import Kernel
from qcompile.types import Scheme
from qcompile.verify import run_pass

define()


class Linears:
    """Linears of the same quantized input, each by a kernel of its own; weights are inputs of their graph."""

    def __init__(self, *kernels: str, inn: int = 64, scheme: str = "w4a4") -> None:
        self.scheme, self.kernels = Scheme.parse(scheme), kernels
        weight = packed_weight((16, inn), self.scheme)
        self.weights = [(BACKEND.kernel("int4") if k == "npu.int4" else Kernel()).prepare(weight) for k in kernels]

    def __call__(self, x, *tensors):
        remaining, scheme = iter(tensors), str(self.scheme)
        codes, scale = torch.ops.qcompile.quantize(x, [], str(self.scheme.activation))
        flat = [codes.view(-1, codes.shape[-1]), scale.view(-1, 1)]
        return [
            torch.ops.qcompile.scaled_linear(
                flat if i % 2 else [codes, scale], [next(remaining) for _ in own], None, scheme, kernel, 16, x.dtype
            )
            for i, (kernel, own) in enumerate(zip(self.kernels, self.weights, strict=True))
        ]


def packed(model, x, matches):
    """The graph of ``model`` after the pass, which run_pass holds to the same bits on ``x``."""
    inputs = [x, *(tensor for own in model.weights for tensor in own)]
    graph = make_fx(model, tracing_mode="fake")(*inputs)
    record = run_pass(PackActivations(), graph, inputs)
    assert record.matches == matches
    return graph, [reason for _, reason in record.rejected]


def names(graph):
    return [semantic_name(node) for node in graph.graph.nodes if semantic_name(node)]


def test_every_reader_gets_words_also_in_other_rows():
    graph, rejected = packed(Linears("npu.int4", "npu.int4", "npu.int4"), torch.randn(2, 3, 64).bfloat16(), 1)
    assert names(graph) == ["quantize_words", *["scaled_linear"] * 3]
    read = [node.args[0][0].meta["val"] for node in graph.graph.nodes if semantic_name(node) == "scaled_linear"]
    assert [tuple(value.shape) for value in read] == [(2, 3, 8), (6, 8), (2, 3, 8)]
    assert {value.dtype for value in read} == {torch.int32}
    assert not rejected


def test_a_reader_of_single_codes_keeps_them_for_all():
    graph, rejected = packed(Linears("npu.int4", "npu.int4", "cpu.reference"), torch.randn(5, 64).bfloat16(), 0)
    assert names(graph)[0] == "quantize"
    assert rejected == ["scaled_linear_2 reads single codes"]


def test_odd_columns_are_no_whole_words(monkeypatch):
    monkeypatch.setattr(Kernel, "takes_words", True)
    _, rejected = packed(Linears("cpu.reference", inn=60), torch.randn(5, 60).bfloat16(), 0)
    assert rejected == ["60 codes are no whole words of eight"]


@pytest.mark.parametrize(("scheme", "kernel"), [("w8a8", "cpu.reference"), ("w4a4", "cpu.reference")])
def test_what_no_kernel_would_read_as_words_is_no_near_miss(scheme, kernel):
    _, rejected = packed(Linears(kernel, scheme=scheme), torch.randn(5, 64).bfloat16(), 0)
    assert not rejected
