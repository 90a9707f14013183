"""Passes and the contracts they are held to."""

import copy
import operator

import pytest
import torch
from helpers import tiny_model
from qcompile.passes.base import Result, replace, semantic_name
from qcompile.passes.lower import Lower
from qcompile.passes.quantize_linear import QuantizeLinear
from qcompile.passes.share_activation_quant import ShareActivationQuant
from torch import nn
from torch.fx import GraphModule

import qcompile
from qcompile.errors import PassError
from qcompile.numerics import quantize_weight
from qcompile.trace import attribute, bind, trace
from qcompile.types import Scheme
from qcompile.verify import close, no_semantic_ops_left, run_pass


def QUANTIZE(x):
    return torch.ops.qcompile.quantize.default(x, [], "8")


def traced(function, *inputs) -> GraphModule:
    """A graph with fake values, as AOTAutograd would give it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="symbolic")(*inputs)


def two_quantized_readers(x, w):
    codes, scale = QUANTIZE(x)
    again, other = QUANTIZE(x)
    return codes.float() @ w * scale, again.float() @ w * other


def targets(module: GraphModule) -> list[str]:
    return [semantic_name(node) for node in module.graph.nodes if semantic_name(node)]


class TestShareActivationQuant:
    def test_merges_equal_calls_exactly_and_only_once(self):
        probe = torch.randn(3, 8), torch.randn(8, 4)
        module = traced(two_quantized_readers, *probe)
        record = run_pass(ShareActivationQuant(), module, probe)
        assert (record.matches, targets(module)) == (1, ["quantize"])
        assert record.nodes_after < record.nodes_before
        assert run_pass(ShareActivationQuant(), module, probe).matches == 0

    def test_leaves_different_activations_apart(self):
        def different(x, y):
            return QUANTIZE(x)[0], QUANTIZE(y)[0], QUANTIZE(x + 1)[0]

        module = traced(different, torch.randn(2, 8), torch.randn(2, 8))
        assert run_pass(ShareActivationQuant(), module).matches == 0


class TestLower:
    @pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "w8a16", "w3a16_g32", "w8a8"])
    def test_leaves_no_semantic_op_and_keeps_the_numbers(self, scheme):
        model = nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 16))
        qcompile.quantize(model, scheme, example_inputs=(torch.randn(2, 64),))
        x = torch.randn(5, 64)
        module = bind(model._qcompile.graph, model)
        assert targets(module)
        record = run_pass(Lower(), module, (x,))
        no_semantic_ops_left(module)
        assert record.matches == (4 if scheme == "w8a8" else 2)
        assert close(module(x[:3]), model(x[:3]))
        assert run_pass(Lower(), module, (x,)).matches == 0

    def test_an_op_without_a_lowering_is_named(self):
        library = torch.library.Library("qcompile", "FRAGMENT")
        library.define("mystery(Tensor x) -> Tensor")
        library.impl("mystery", lambda x: x.clone(), "CompositeExplicitAutograd")
        module = traced(lambda x: torch.ops.qcompile.mystery.default(x), torch.ones(2))
        record = run_pass(Lower(), module)
        assert record.rejected[0][1] == "no lowering of qcompile::mystery"
        with pytest.raises(PassError, match=r"left: mystery at mystery.*no lowering of qcompile::mystery"):
            no_semantic_ops_left(module, record.rejected)


class TestQuantizeLinear:
    def graph(self):
        model = tiny_model(dtype=torch.float32)
        return model, trace(model).graph

    def test_a_planned_site_that_is_not_in_the_graph_is_named(self):
        model, graph = self.graph()
        planned = qcompile.plan(model, "w4a16_g32")["model.layers.1.mlp.up_proj"]
        rewrite = QuantizeLinear(lambda node: "", {planned.site.name: planned}, lambda *_: [])
        with pytest.raises(PassError, match=r"matched 0 of 1: model\.layers\.1\.mlp\.up_proj: no linear node"):
            run_pass(rewrite, graph)

    @pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a8"])
    def test_the_rewritten_graph_computes_what_the_model_computes(self, scheme):
        model = qcompile.quantize(tiny_model(dtype=torch.float32), scheme)
        graph = bind(model._qcompile.graph, model)
        tokens = torch.randint(3, 150, (3, 9))
        with torch.no_grad():
            assert close(graph(tokens), model(tokens).logits)
        assert not any(
            node.target is torch.ops.aten.linear.default
            for node in graph.graph.nodes
            if "lm_head" not in str(node.args)
        )

    def test_the_graph_that_is_kept_holds_no_weight(self):
        model = qcompile.quantize(tiny_model(dtype=torch.float32), "w4a16_g32")
        for tensor in [*model._qcompile.graph.parameters(), *model._qcompile.graph.buffers()]:
            assert hasattr(tensor, "fake_mode") or hasattr(tensor.data, "fake_mode")


class _Faulty:
    name, level, numerics, expected = "faulty", "aot", "exact", None

    def __init__(self, change):
        self.change = change

    def __call__(self, module):
        self.change(module)
        return Result(1)


def _double_last(module: GraphModule) -> None:
    node = next(n for n in reversed(module.graph.nodes) if n.op == "call_function")
    with module.graph.inserting_after(node):
        doubled = module.graph.call_function(torch.ops.aten.mul.Tensor, (node, 2))
    doubled.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)


def _to_double(module: GraphModule) -> None:
    node = next(n for n in reversed(module.graph.nodes) if n.op == "call_function")
    with module.graph.inserting_before(node):
        new = module.graph.call_function(torch.ops.aten.relu.default, (node.args[0],))
    new.meta["val"] = node.meta["val"].double()
    replace(node, new, "faulty")


class TestContracts:
    def test_an_exact_pass_that_changes_numbers_is_caught_on_the_probe(self):
        x = torch.randn(4)
        message = "faulty promises numerics 'exact', but the output mul_tensor changed on the probe, by 1"
        with pytest.raises(PassError, match=message):
            run_pass(_Faulty(_double_last), traced(torch.sin, x), (x,))

    def test_a_changed_dtype_is_caught_without_a_probe(self):
        with pytest.raises(PassError, match=r"faulty would replace .* shape, dtype and device must stay"):
            run_pass(_Faulty(_to_double), traced(torch.sin, torch.randn(4)))

    def test_a_broken_graph_is_caught(self):
        def use_before_definition(module):
            nodes = [n for n in module.graph.nodes if n.op == "call_function"]
            nodes[0].args = (nodes[1],)

        with pytest.raises(RuntimeError, match="used before it has been defined"):
            run_pass(_Faulty(use_before_definition), traced(lambda x: torch.sin(torch.cos(x)), torch.ones(2)))

    def test_a_pass_must_match_as_often_as_it_expects(self):
        pass_ = _Faulty(lambda module: None)
        pass_.expected = 3
        with pytest.raises(PassError, match="faulty matched 1 of 3: nothing came close"):
            run_pass(pass_, traced(torch.sin, torch.ones(2)))


def test_weights_of_a_traced_graph_are_fake_and_found_by_name():
    model = tiny_model(dtype=torch.float32)
    graph = copy.copy(trace(model).graph)
    packed = quantize_weight(torch.randn(8, 32), Scheme.parse("w4a16_g32"))
    output = graph.graph.output_node()
    with graph.graph.inserting_before(output):
        node = attribute(graph, graph.graph, "model.norm.codes", packed.codes)
        again = attribute(graph, graph.graph, "model.norm.codes", packed.codes)
    assert node.target == again.target
    assert operator.attrgetter(node.target)(graph).shape == packed.codes.shape
    with pytest.raises(qcompile.TraceError, match=r"reads 'model\.norm\.codes', which is no parameter or buffer"):
        bind(graph, model)
