"""Experts are found by what they compute; a traced graph holds one node for them and equals the model."""

import copy
import functools

import pytest
import torch
from helpers import logits
from moe_models import FAMILIES, IDS, MLP, Decoder, Looping, Sorting, tiny_moe
from torch import nn
from torch.nn import functional as F

from qcompile.errors import TraceError, UnsupportedError
from qcompile.experts import find_experts
from qcompile.float_experts import read
from qcompile.trace import bind, trace, walk

SHAPES = ((2, 16), (1, 1), (3, 9))


@functools.cache
def traced_family(family: str):
    """A model of that family and its trace; nobody changes them."""
    model = tiny_moe(family)
    return model, trace(model)


class TestFamilies:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_one_node_per_layer_computes_what_the_model_does(self, family):
        model, traced = traced_family(family)
        assert not any("forward" in vars(module) for module in model.modules())
        marked = [n for n in traced.graph.graph.nodes if str(n.target) == "qcompile.experts.default"]
        layers = [i for i, layer in enumerate(model.model.layers) if len(list(layer.modules())) and _is_sparse(layer)]
        assert len(marked) == len(layers) == len(traced.experts)
        runnable = bind(traced.graph, model)
        for shape in SHAPES:
            ids = torch.randint(3, 150, shape)
            with torch.no_grad():
                torch.testing.assert_close(runnable(ids), logits(model, ids), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_both_projections_are_sites_and_the_router_is_one_too(self, family):
        sites = [site for site in traced_family(family)[1].sites if site.block == "model.layers.1"]
        up, down = [site for site in sites if site.role == "experts"]
        assert up.name.endswith("experts.gate_up_proj")
        assert down.name.endswith("experts.down_proj")
        assert up.shape == (8, 128, 128)
        assert down.shape == (8, 128, 64)
        assert up.kind == down.kind == "experts"
        assert up.has_bias == down.has_bias == (family == "gpt_oss")
        assert up.producer.endswith("feed_forward" if family == "llama4_text" else "post_attention_layernorm")
        assert down.producer == up.name.removesuffix(".gate_up_proj")
        assert [(site.out_features, site.in_features) for site in sites if site.role == "router"] == [(8, 128)]
        shared = [site for site in sites if "shared" in site.name]
        expected = {"qwen2_moe": 4, "deepseek_v2": 3, "deepseek_v3": 3, "glm4_moe": 3, "llama4_text": 3}
        assert len(shared) == expected.get(family, 0)
        assert {site.role for site in shared} <= {"linear"}
        if family not in ("llama4_text",):
            assert all(site.inputs == up.inputs for site in shared if site.in_features == 128)

    def test_settings_of_the_activation_and_the_layout_are_measured(self):
        (first, _) = find_experts(tiny_moe("gpt_oss", swiglu_limit=3.5))
        form = first.arithmetic
        assert form.activation == "silu:alpha=1.702:limit=3.5:shift=1.0"
        assert (form.transposed, form.interleaved, len(form.biases)) == (True, True, 2)
        (second, _) = find_experts(tiny_moe("mixtral", hidden_act="gelu_pytorch_tanh"))
        assert second.arithmetic.activation == "gelu_tanh"
        assert (second.arithmetic.transposed, second.arithmetic.interleaved) == (False, False)

    @pytest.mark.parametrize(("family", "top_k"), [("qwen3_moe", 1), ("qwen3_moe", 8), ("llama4_text", 3)])
    def test_any_number_of_chosen_experts(self, family, top_k):
        model = tiny_moe(family, num_experts_per_tok=top_k)
        runnable, ids = bind(trace(model).graph, model), torch.randint(3, 150, (2, 5))
        with torch.no_grad():
            torch.testing.assert_close(runnable(ids), logits(model, ids), rtol=1e-5, atol=1e-5)

    def test_sizes_that_coincide_are_told_apart(self):
        """hidden = 2 * intermediate: the shape of a weight does not say which of its sides is which."""
        for family in ("mixtral", "gpt_oss"):
            (layout, _) = find_experts(tiny_moe(family, intermediate_size=64, num_local_experts=64))
            assert layout.arithmetic.transposed == (family == "gpt_oss")
            (layout, _) = find_experts(tiny_moe(family, intermediate_size=128))
            assert (layout.arithmetic.hidden, layout.arithmetic.intermediate) == (128, 128)

    def test_a_model_without_weights_gives_the_same(self):
        from transformers import AutoModelForCausalLM

        model, traced = traced_family("deepseek_v3")
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(model.config)
        assert trace(empty).sites == traced.sites

    def test_a_walk_lists_the_same_experts(self):
        for family in ("qwen3_moe", "llama4_text"):
            model, traced = traced_family(family)
            walked = {site.name: site.shape for site in walk(model) if site.kind == "experts"}
            assert walked == {site.name: site.shape for site in traced.sites if site.kind == "experts"}

    def test_canonical_weights_put_the_gate_first(self):
        model = tiny_moe("gpt_oss")
        layout = find_experts(model)[0]
        experts = model.model.layers[0].mlp.experts
        up = read(experts, layout, 0)
        assert up.shape == (8, 128, 128)
        assert torch.equal(up[:, :64], experts.gate_up_proj[..., ::2].transpose(1, 2))
        assert torch.equal(up[:, 64:], experts.gate_up_proj[..., 1::2].transpose(1, 2))
        assert torch.equal(read(experts, layout, 1), experts.down_proj.transpose(1, 2))
        assert torch.equal(read(experts, layout, 0, "bias")[:, 64:], experts.gate_up_proj_bias[:, 1::2])


def _is_sparse(layer: nn.Module) -> bool:
    return any(name.endswith("experts") for name, _ in layer.named_modules())


LISTED = {
    "mixtral": lambda: Looping(),
    "unnormalized": lambda: Looping(normalized=False),
    "qwen2": lambda: Looping(shared="gated", logits=False),
    "shared": lambda: Looping(shared="plain", top_k=3),
    "topk-softmax": lambda: Looping(order="topk-softmax", normalized=False),
    "sigmoid": lambda: Looping(order="sigmoid-topk", scale=2.5),
    "sigmoid-unnormalized": lambda: Looping(order="sigmoid-topk", normalized=False, top_k=1),
    "at-input": lambda: Looping(normalized=False, early=True),
    "all": lambda: Looping(top_k=6),
    "biased": lambda: Looping(bias=True, activation=F.gelu),
    "deepseek": lambda: Sorting(),
}


class TestLists:
    @pytest.mark.parametrize("block", LISTED)
    def test_a_loop_becomes_one_node_and_the_results_stay(self, block):
        model = Decoder(LISTED[block](), LISTED[block]()).eval()
        (layout, _) = find_experts(model)
        traced = trace(model, IDS)
        marked = [node for node in traced.graph.graph.nodes if str(node.target) == "qcompile.experts.default"]
        assert len(marked) == 2
        tensors = model.state_dict()
        for found in traced.experts:
            for i, projection in enumerate(found.projections):
                experts = model.get_submodule(found.name)
                tensors[f"{found.name}.{projection}"] = read(experts, found, i)
                if (bias := read(experts, found, i, "bias")) is not None:
                    tensors[f"{found.name}.{projection}_bias"] = bias
        runnable = bind(traced.graph, _Tensors(tensors))
        for shape in SHAPES:
            ids = torch.randint(0, 50, shape)
            with torch.no_grad():
                torch.testing.assert_close(runnable(ids), model(ids), rtol=1e-5, atol=1e-5)
        sites = {site.name.removeprefix("layers.0.mlp."): site for site in traced.sites}
        leaf = layout.name.rpartition(".")[2]
        assert sites[f"{leaf}.gate_up_proj"].shape == (layout.experts, 192, 64)
        assert sites[f"{leaf}.down_proj"].shape == (layout.experts, 64, 96)
        assert sites[f"{leaf}.gate_up_proj"].has_bias == (block == "biased")
        routers = [site.name for site in traced.sites if site.role == "router"]
        assert len(routers) == 2
        assert not any(f"{leaf}.0." in site.name for site in traced.sites)

    def test_routing_is_as_precise_as_the_block_has_it(self):
        """In bfloat16 a softmax of bfloat16 logits has ties that one in float32 does not have."""

        class Imprecise(Looping):
            def forward(self, hidden_states):
                x = hidden_states.reshape(-1, hidden_states.shape[-1])
                weights, ids = torch.topk(self.router(x).softmax(-1), self.top_k, dim=-1)
                rows = torch.stack([expert(x) for expert in self.feed], 1)
                picked = rows.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
                return (picked * weights[..., None]).sum(1).view(hidden_states.shape)

        (layout,) = find_experts(Decoder(Imprecise(experts=128, top_k=8, logits=False)).bfloat16())
        assert (layout.block.precise, layout.block.weights) == (False, "none")
        (layout,) = find_experts(Decoder(Looping(experts=128, top_k=8)).bfloat16())
        assert (layout.block.precise, layout.block.weights) == (True, "sum")

    def test_settings_in_a_config_are_found(self):
        class Config:
            def __init__(self):
                self.routed_scaling_factor = 1.75

            def to_dict(self):
                return vars(self)

        block = Looping(scale=1.75)
        block.config, block.factor = Config(), 1.75
        (layout,) = find_experts(Decoder(block))
        assert layout.block.scale == 1.75

    def test_a_list_that_nothing_routes_is_no_mixture(self):
        class Stack(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.ModuleList([MLP(64, 96) for _ in range(3)])

            def forward(self, x):
                for layer in self.layers:
                    x = x + layer(x)
                return x

        assert find_experts(Stack()) == ()
        assert len(trace(Stack(), (torch.randn(2, 3, 64),)).sites) == 9


class _Tensors(nn.Module):
    """Tensors by their qualified names, for a graph whose lists of experts are stacked."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def named_parameters(self, *args, **kwargs):
        return iter(self.tensors.items())


class TestRefused:
    def refused(self, block: nn.Module, reason: str) -> None:
        with pytest.raises(UnsupportedError, match=rf"layers\.0\.mlp\.\w+ \(\w+\) is a mixture of experts .*{reason}"):
            find_experts(Decoder(block))

    def test_experts_of_different_shapes(self):
        block = Looping()
        block.feed[4] = MLP(64, 48)
        self.refused(block, r"experts 0 and 4 have weights \[\[96, 64\].* and \[\[48, 64\]")

    def test_experts_with_different_settings(self):
        block = Looping()
        block.feed[3].activation = F.gelu
        self.refused(block, "experts 0 and 3 differ in their settings")

    def test_more_chosen_than_there_are(self):
        self.refused(
            Looping(experts=4, top_k=5), r"does not run on a probe: RuntimeError: selected index k out of range"
        )
        with pytest.raises(TraceError, match=r"topk chooses more than there are .*modeling_qwen3_moe"):
            trace(tiny_moe("qwen3_moe", num_experts_per_tok=9))

    def test_an_activation_that_nobody_knows(self):
        self.refused(Looping(activation=F.mish), r"an activation of silu, gelu, .*\(nearest: \w+, which deviates by")
        model = tiny_moe("mixtral", hidden_act="mish")
        with pytest.raises(UnsupportedError, match=r"mlp\.experts \(MixtralExperts\) .* an activation of silu"):
            trace(model)

    def test_a_forward_that_does_something_else(self):
        class Squared(Looping):
            def forward(self, hidden_states):
                result, logits = super().forward(hidden_states)
                return result * logits.mean(-1).view(*result.shape[:-1], 1), logits

        self.refused(Squared(), "agrees with no known form of routing")

        class Doubled(MLP):
            def forward(self, x):
                return super().forward(x) + x

        block = Looping()
        block.feed = nn.ModuleList([Doubled(64, 96) for _ in range(6)])
        self.refused(block, r"what it computes is not down\(activation\(up\(x\)\)\)")

    def test_fused_experts_with_a_forward_of_their_own(self):
        model = tiny_moe("qwen3_moe")

        class Normed(type(model.model.layers[0].mlp.experts)):
            def forward(self, hidden_states, top_k_index, top_k_weights):
                return F.normalize(super().forward(hidden_states, top_k_index, top_k_weights), dim=-1)

        for layer in model.model.layers:
            layer.mlp.experts.__class__ = Normed
        with pytest.raises(
            UnsupportedError, match=r"layers\.0\.mlp\.experts \(Normed\) .* what it computes is not down"
        ):
            trace(model)

    def test_fused_experts_with_weights_that_do_not_fit(self):
        model = tiny_moe("qwen3_moe")
        experts = model.model.layers[1].mlp.experts
        experts.down_proj = nn.Parameter(experts.down_proj[:6].clone())
        with pytest.raises(UnsupportedError, match=r"layers\.1.* not an up and a down projection of equally many"):
            trace(model)
        experts.down_proj = nn.Parameter(torch.randn(8, 128, 60))
        with pytest.raises(UnsupportedError, match=r"layers\.1.* do not fit each other as up and down projection"):
            trace(model)

    def test_a_router_that_is_no_part_of_the_block(self):
        block = Looping()
        block.second = nn.Linear(64, 6, bias=False)
        self.refused(block, r"has 2 routers \(router, second\) with one row per expert")

    def test_hooks_and_replaced_forwards(self):
        block = Looping()
        block.register_forward_hook(lambda *_: None)
        self.refused(block, "the block around it cannot be changed: it has forward hooks")
        model = tiny_moe("qwen3_moe")
        experts = model.model.layers[0].mlp.experts
        experts.forward = copy.copy(experts.forward)
        with pytest.raises(UnsupportedError, match="its forward was replaced"):
            trace(model)

    def test_stacked_weights_beside_a_router_are_never_left_float_in_silence(self):
        class Dense(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate = nn.Linear(64, 6, bias=False)
                self.up, self.down = nn.Parameter(torch.randn(6, 64, 96)), nn.Parameter(torch.randn(6, 96, 64))

            def forward(self, x):
                weights, ids = self.gate(x).softmax(-1).topk(2)
                dense = torch.zeros_like(self.gate(x)).scatter_(-1, ids, weights)
                rows = torch.einsum("bsh,ehi->bsei", x, self.up).relu()
                return torch.einsum("bsei,eih,bse->bsh", rows, self.down, dense)

        with pytest.raises(
            UnsupportedError, match=r"layers\.0\.mlp\.up is a weight of 6 experts that cannot be quantized"
        ):
            trace(Decoder(Dense()), IDS)
