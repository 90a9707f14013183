"""Quantizations join what they quantize, and keep the float result for whoever else reads it."""

import pytest
import torch
from qcompile.passes.base import semantic_name
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fuse_gated_act_quant import FuseGatedActQuant
from qcompile.passes.fuse_norm_quant import FuseNormQuant
from qcompile.passes.lower import Lower
from qcompile.passes.share_activation_quant import ShareActivationQuant
from test_passes_canonicalize import SIZE, aot_graph, found, gemma, llama
from torch import nn
from torch.nn import functional as F

from qcompile import plugins
from qcompile.verify import no_semantic_ops_left, run_pass

QUANTIZE = torch.ops.qcompile.quantize.default
STATIC = {"8_static": 2, "8_static_sym": 1, "8_clip": 1}
PARAMS = (torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32))


def params_of(activation: str) -> tuple[torch.Tensor, ...]:
    return PARAMS[: STATIC.get(activation, 0)]


def through_all(function, *inputs):
    """The graph and the records of all passes up to lower, each checked on the inputs and run twice."""
    module, records = aot_graph(function, *inputs), {}
    for pass_ in (Canonicalize(), ShareActivationQuant(), FuseNormQuant(), FuseGatedActQuant()):
        records[pass_.name] = run_pass(pass_, module, inputs)
        assert run_pass(type(pass_)(), module, inputs).matches == 0
    return module, records


def lowered(module, *inputs):
    from torch._inductor.decomposition import select_decomp_table

    lower = Lower(select_decomp_table(), numerics="exact")
    record = run_pass(lower, module, inputs)
    no_semantic_ops_left(module, record.rejected)
    return record


@pytest.mark.parametrize("activation", ["8", "8_dynamic_asym", "4", "8_static", "8_static_sym", "8_clip", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", [False, True], ids=["alone", "with a router"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "after a sum"])
def test_a_norm_and_its_quantization(activation, dtype, router, residual):
    def block(x, other, w, *params):
        total = x + other if residual else x
        normal = llama(total, w)
        parts = QUANTIZE(normal, list(params), activation)
        return *parts, *([normal.mean(-1)] if router else []), *([total * 2] if residual else [])

    x, other, w = (torch.randn(*shape, SIZE).to(dtype) for shape in ((2, 3), (2, 3), ()))
    inputs = (x, other, w, *params_of(activation))
    module, records = through_all(block, *inputs)
    assert records["fuse_norm_quant"].matches == 1
    (name,) = found(module)
    assert name == ("add_rms_norm_quantize" if residual else "rms_norm_quantize")
    (fused,) = [node for node in module.graph.nodes if semantic_name(node)]
    assert fused.args[-1] is router
    assert lowered(module, *inputs).matches == 1


def test_a_gated_activation_and_its_quantization():
    def mlp(gate, up):
        hidden = F.silu(gate) * up
        return *QUANTIZE(hidden, [], "8"), hidden.amax()

    inputs = torch.randn(3, SIZE).bfloat16(), torch.randn(3, SIZE).bfloat16()
    module, records = through_all(mlp, *inputs)
    assert (records["fuse_gated_act_quant"].matches, found(module)) == (1, ["gated_act_quantize"])
    lowered(module, *inputs)


def test_tokens_that_an_expert_flattens_are_quantized_once_with_their_norm():
    def block(x, w):
        normal = gemma(x, w)
        flat = normal.view(-1, SIZE)
        one, two = QUANTIZE(flat, [], "8"), QUANTIZE(normal, [], "8")
        return *one, *two, flat @ flat.T

    inputs = torch.randn(2, 3, SIZE).bfloat16(), torch.randn(SIZE).bfloat16()
    module, records = through_all(block, *inputs)
    assert records["share_activation_quant"].matches == 2  # moved before the view, then merged
    assert (records["fuse_norm_quant"].matches, found(module)) == (1, ["rms_norm_quantize"])
    lowered(module, *inputs)


def test_a_view_that_splits_heads_keeps_its_own_quantization():
    def heads(x):
        return QUANTIZE(x.view(2, 3, 4, SIZE // 4), [], "8")[0], QUANTIZE(x, [], "8")[0]

    module, records = through_all(heads, torch.randn(2, 3, SIZE))
    assert records["share_activation_quant"].matches == 0
    assert found(module) == ["quantize", "quantize"]


def test_one_norm_joins_one_quantization_and_says_so_of_the_next():
    def block(x, w):
        normal = llama(x, w)
        return QUANTIZE(normal, [], "8")[0], QUANTIZE(normal, [], "4")[0]

    inputs = torch.randn(2, SIZE), torch.randn(SIZE)
    module, records = through_all(block, *inputs)
    record = records["fuse_norm_quant"]
    assert (record.matches, found(module)) == (1, ["rms_norm_quantize", "quantize"])
    assert "is joined with another quantization" in record.rejected[0][1]
    lowered(module, *inputs)


def test_a_scale_that_is_made_after_the_norm_keeps_them_apart():
    def block(x, w):
        normal = llama(x, w)
        return QUANTIZE(normal, [normal.abs().amax().view(1) / 127], "8_static_sym")[0]

    _, records = through_all(block, torch.randn(2, SIZE), torch.randn(SIZE))
    assert records["fuse_norm_quant"].matches == 0
    assert "which it needs, is made after" in records["fuse_norm_quant"].rejected[0][1]


def test_a_sum_stays_in_the_block_that_made_it():
    def block(x, other, w):
        total = x + other
        return *QUANTIZE(llama(total, w), [], "8"), total * 2

    inputs = torch.randn(2, SIZE), torch.randn(2, SIZE), torch.randn(SIZE)
    module = aot_graph(block, *inputs)
    stacks = {"add": "layers.0", "mul": "layers.1.norm"}
    for node in module.graph.nodes:
        if node.op == "call_function":
            is_quantize = semantic_name(node) or node.name.startswith("getitem")
            owner = stacks.get(node.name, "layers.1.q_proj" if is_quantize else "layers.1.norm")
            node.meta["nn_module_stack"] = {"key": (owner, nn.Module)}
    for pass_ in (Canonicalize(), ShareActivationQuant(), FuseNormQuant()):
        run_pass(pass_, module, inputs)
    assert found(module) == ["add_rms_norm_quantize"]
    lowered(module, *inputs)
    owners = [
        (str(node.target), list(node.meta["nn_module_stack"].values())[-1][0])
        for node in module.graph.nodes
        if node.op == "call_function"
    ]
    assert owners[0] == ("aten.add.Tensor", "layers.0")
    assert all(owner.startswith("layers.1") for _, owner in owners[1:])


def test_arguments_that_share_a_fake_value_stay_apart_when_lowered():
    inputs = torch.randn(2, SIZE), torch.randn(2, SIZE)
    module = aot_graph(lambda gate, up: F.silu(gate) * up, *inputs)
    run_pass(Canonicalize(), module, inputs)
    gate, up = (node for node in module.graph.nodes if node.op == "placeholder")
    up.meta["val"] = gate.meta["val"]
    lowered(module, *inputs)
    assert torch.equal(module(*inputs), F.silu(inputs[0]) * inputs[1])


class Doubling:
    """An operation of a device that computes something else, so that it can be told."""

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal

    def refuses(self, gate, up, function):
        return self.refusal

    def compute(self, gate, up, function):
        return 2 * gate * up


@pytest.mark.parametrize("refusal", ["", "it takes float16 only"])
def test_a_device_has_its_own_operation_unless_that_refuses(refusal, monkeypatch):
    cpu = plugins.find("backends", "cpu")
    monkeypatch.setattr(cpu, "operations", {"gated_act": Doubling(refusal)}, raising=False)
    inputs = torch.randn(2, SIZE), torch.randn(2, SIZE)

    def mlp(gate, up):
        return QUANTIZE(F.silu(gate) * up, [], "8")[1]

    module, _ = through_all(mlp, *inputs)
    assert found(module) == ["gated_act_quantize"]  # made of two ops, of which the device has one
    record = run_pass(Lower(), module)
    gate, up = inputs
    expected = F.silu(gate) * up if refusal else 2 * gate * up
    assert torch.allclose(module(*inputs), expected.abs().amax(-1, keepdim=True) / 127)
    assert [reason for _, reason in record.rejected] == (
        [f"cpu has an operation for it, but {refusal}"] if refusal else []
    )
