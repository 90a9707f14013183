"""Cutting and chaining on hand-made graphs; whole models are in test_compile."""

import operator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from qcompile import regions

aten = torch.ops.aten


def call(graph: Graph, target, args, value, block: str = "") -> Node:
    node = graph.call_function(target, args)
    node.meta = {"val": value, "nn_module_stack": {"k": (block, nn.Module)} if block else {}}
    return node


def sines(blocks: list[str]) -> GraphModule:
    """A sine for each of ``blocks``, one after the other; the graph returns the last one and its input."""
    graph = Graph()
    x = node = graph.placeholder("x")
    node.meta["val"] = torch.ones(2)
    for block in blocks:
        node = call(graph, aten.sin.default, (node,), torch.ones(2), block)
    graph.output((node, x))
    return GraphModule({}, graph)


def chained(module: GraphModule):
    """The pieces of ``module`` as one function, interpreted, and how many of them are distinct."""
    compiled = []

    def compile_one(piece, inputs):
        compiled.append(piece)
        return lambda arguments: piece.module(*arguments)

    function, distinct = regions.compile_pieces(regions.cut(module), module, compile_one)
    assert distinct == len(compiled)
    return function, distinct


def test_blocks_become_pieces_and_equal_ones_share_code():
    names = ["", "layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b", "layers.2.a", "layers.2.b", "norm"]
    module = sines(names)
    assert len(regions.cut(module)) == 5
    function, distinct = chained(module)
    assert distinct == 2  # prologue and epilogue are one sine each, every block two
    arguments = [torch.tensor([0.1, 0.2])]
    expected = module(*arguments)
    result = function(arguments)
    assert arguments == []
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_a_graph_without_blocks_is_one_piece():
    assert len(regions.cut(sines(["", "norm", "head"]))) == 1


def test_a_block_that_returns_after_another_is_still_correct():
    module = sines(["layers.0.a", "layers.1.a", "layers.0.a", "layers.2.a"])
    function, _ = chained(module)
    x = torch.tensor([0.3, 0.4])
    assert torch.equal(function([x])[0], module(x)[0])


def test_an_input_is_written_back_after_its_last_reader():
    graph = Graph()
    cache, x = graph.placeholder("cache"), graph.placeholder("x")
    for node in (cache, x):
        node.meta["val"] = torch.ones(2)
    first = call(graph, aten.add.Tensor, (cache, x), torch.ones(2), "layers.0.a")
    second = call(graph, aten.mul.Tensor, (first, cache), torch.ones(2), "layers.1.a")
    third = call(graph, aten.add.Tensor, (second, 1.0), torch.ones(2), "layers.2.a")
    call(graph, aten.copy_.default, (cache, first), torch.ones(2))
    graph.output((third,))
    function, _ = chained(GraphModule({}, graph))
    old, x = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    expected = (old + x) * old + 1
    state = old.clone()
    assert torch.equal(function([state, x])[0], expected)
    assert torch.equal(state, old + x)


class TestSizes:
    """Sizes with two names: a cache's length as a number that a module keeps, and as a dimension of its tensor."""

    @pytest.fixture
    def environment(self) -> ShapeEnv:
        return ShapeEnv()

    def number(self, environment: ShapeEnv, name: str, value: int):
        source = ConstantSource(name)
        return environment.create_unspecified_symint_and_symbol(value, source, DimDynamic.DYNAMIC)

    def cache(self, mode: FakeTensorMode, name: str, length: int) -> Tensor:
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC, DimDynamic.DYNAMIC])
        return mode.from_tensor(torch.ones(2, length), source=ConstantSource(name), symbolic_context=context)

    def test_a_piece_gets_an_input_whose_own_name_is_the_one_in_use(self, environment):
        """Inductor defines a number that is passed in by its own name, but writes sizes by the name they were given."""
        from torch._inductor.compile_fx import compile_fx_inner

        mode = FakeTensorMode(shape_env=environment)
        length, cache = self.number(environment, "seen", 5), self.cache(mode, "keys", 5)
        assert length + 1 == cache.shape[1] + 1
        assert length.node._expr != length.node.expr == cache.shape[1].node.expr
        graph = Graph()
        placeholders = [graph.placeholder(name) for name in ("seen", "x", "keys")]
        with mode:
            x = torch.ones(1, 1)
            for node, value in zip(placeholders, (length, x, cache), strict=True):
                node.meta["val"] = value
            size = call(graph, operator.add, (placeholders[0], 1), length + 1)
            mask = call(graph, aten.expand.default, (placeholders[1], [1, size]), x.expand(1, length + 1))
            mask = call(graph, aten.clone.default, (mask,), torch.empty(1, length + 1))
            sums = [call(graph, aten.sum.dim_IntList, (placeholders[2], [0]), cache.sum(0), "layers.0")]
            sums += [call(graph, aten.sin.default, (mask,), mask.meta["val"].sin(), f"layers.{i}") for i in (0, 1)]
        graph.output(tuple(sums))
        module = GraphModule({}, graph)
        assert len(regions.cut(module)) == 3

        def compile_one(piece, inputs):
            with torch._guards.tracing(torch._guards.TracingContext(mode)):
                return compile_fx_inner(piece.module, inputs)

        function, _ = regions.compile_pieces(regions.cut(module), module, compile_one)
        for n in (5, 9):
            inputs = [n, torch.full((1, 1), 0.5), torch.randn(2, n)]
            for got, wanted in zip(function(list(inputs)), module(*inputs), strict=True):
                torch.testing.assert_close(got, wanted)
