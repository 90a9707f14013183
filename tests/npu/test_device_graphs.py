"""Lowered Linears and experts as graphs: exported through torch_npu's shape functions, captured, and converted."""

import pytest
import torch
from npu_cases import routed
from npu_modules import LoweredExperts, LoweredLinear, traced
from torch.export import Dim, export

from qcompile.backends.npu import graphs

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LINEARS = ("w4a16_g32_asym", "w8a16", "w8a8", "w8a8_static", "w4a8", "w4a8_clip", "w4a4")
EXPERTS = ("w4a16_g32", "w8a16", "w8a8", "w8a8_static", "w4a8", "w4a8_g256", "w4a8_clip", "w4a4")
CASES = [("linear", scheme) for scheme in LINEARS] + [("experts", scheme) for scheme in EXPERTS]


ENGINE = {  # what operations are called in the graph engine
    "npu_weight_quant_batchmatmul": "WeightQuantBatchMatmulV2", "npu_quant_matmul": "QuantBatchMatmulV3",
    "npu_quantize": "Quantize", "npu_dynamic_quant": "DynamicQuant", "npu_grouped_matmul": "GroupedMatmul",
    "npu_grouped_matmul_swiglu_quant_v2": "GroupedMatmulSwigluQuantV2", "npu_swiglu": "SwiGlu",
    "npu_grouped_matmul_finalize_routing": "GroupedMatmulFinalizeRouting",
    "npu_moe_init_routing_v2": "MoeInitRoutingV3", "_npu_moe_token_unpermute": "GatherV2",
}  # fmt: skip


def made(kind, scheme, device="cpu"):
    return (LoweredLinear if kind == "linear" else LoweredExperts)(scheme, device=device)


def inputs(kind, tokens, device="cpu"):
    x = torch.randn(tokens, 256).bfloat16()
    given = (x,) if kind == "linear" else (x, *routed(tokens))
    return tuple(t.to(device) for t in given)


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_one_exported_program_serves_any_number_of_tokens(kind, scheme, compare):
    """Traced with torch_npu's own shape functions; computed by the goldens under its schemas, and by the device."""

    def traced(device):
        given = inputs(kind, 6, device)
        dynamic = tuple({0: Dim("tokens", min=2, max=4096)} for _ in given)
        return export(made(kind, scheme, device), given, dynamic_shapes=dynamic)

    here, there = traced("cpu"), traced("npu")
    assert [str(n.target) for n in here.graph.nodes] == [str(n.target) for n in there.graph.nodes]
    assert any(str(node.target).startswith("npu.") for node in here.graph.nodes)
    for count in (6, 3, 11):
        given = inputs(kind, count)
        compare(there.module()(*(t.npu() for t in given)), here.module()(*given), f"{count} tokens")


@pytest.mark.parametrize(
    ("kind", "scheme"), [("linear", s) for s in ("w4a16_g32_asym", "w8a8")] + [("experts", "w4a8")]
)
@pytest.mark.parametrize("mode", ["eager", "aclgraph"])
def test_a_graph_is_captured_and_gives_the_same(mode, kind, scheme, compare):
    module, given = made(kind, scheme, "npu"), inputs(kind, 5, "npu")
    expected = module(*given).cpu()
    graph, tensors = traced(module, given)
    fakes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    run = graphs.finish(graph, fakes, list(range(len(given), len(tensors))), mode)
    for _ in range(2):  # the first call warms up, the second one captures
        (result,) = run(list(tensors))
    compare(result, expected)


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_every_operation_becomes_one_of_the_graph_engine(kind, scheme, monkeypatch):
    """torchair converts the whole graph; on the pretend device the engine then compiles nothing."""
    graphs._set_up("torchair")
    import torchair.core._torchair as core
    import torchair.npu_fx_compiler as compiler

    monkeypatch.setattr(core, "check_cann_compat", lambda *_: "")  # it asks CANN's registry of operations
    made_graphs, convert = [], compiler._NpuGraphConverter.run
    monkeypatch.setattr(
        compiler._NpuGraphConverter,
        "run",
        lambda self, *args: made_graphs.append(convert(self, *args)) or made_graphs[-1],
    )
    graph, _ = traced(made(kind, scheme, "npu"), inputs(kind, 5, "npu"))
    called = {str(node.target).split(".")[1] for node in graph.graph.nodes if str(node.target).startswith("npu.")}
    graphs.finish(graph, [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"], [], "torchair")
    engine = {op.type for made_graph in made_graphs for op in made_graph.graph.op}
    assert {ENGINE[name] for name in called} <= engine, sorted(engine)


class Block(torch.nn.Module):
    """Inputs without names of their own, which would meet those that torchair gives."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def forward(self, *tensors):
        return self.graph(*tensors)


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_every_block_is_exported_for_the_graph_engine(kind, scheme, tmp_path, monkeypatch):
    """By torchair's own way to a file, through Dynamo and with any number of tokens."""
    graphs._set_up("torchair")
    import torchair
    import torchair.core._torchair as core

    monkeypatch.setattr(core, "check_cann_compat", lambda *_: "")  # it asks CANN's registry of operations
    graph, tensors = traced(made(kind, scheme, "npu"), inputs(kind, 5, "npu"))
    called = {str(node.target).split(".")[1] for node in graph.graph.nodes if str(node.target).startswith("npu.")}
    block = Block(graphs.convertible(graph))
    torchair.dynamo_export(*tensors, model=block, export_path=str(tmp_path), export_name="block", dynamic=True)
    written = (tmp_path / "dynamo.pbtxt").read_text()
    missing = [ENGINE[name] for name in called if f'op: "{ENGINE[name]}"' not in written]
    assert not missing
