"""Scales folded into what makes a value change nothing, whatever the architecture; what cannot be scaled says why."""

import pytest
import torch
from helpers import logits, tiny_model
from moe_models import tiny_moe
from qcompile.passes.fold_scales import FoldScales, fold, foldings

from qcompile.errors import CalibrationError
from qcompile.float_experts import fuse
from qcompile.trace import trace

FAMILIES = ("qwen3", "gemma3_text", "phi3", "cohere", "qwen3_moe")  # of cohere, attention and MLP read one norm


def made(family: str):
    torch.manual_seed(0)
    model = tiny_model(family, torch.float32) if "moe" not in family else tiny_moe(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    traced = trace(model)
    fuse(model, traced.experts)
    return model, traced


def a_scale(folding) -> torch.Tensor:
    return folding.shared(torch.rand(folding.shape) * 3 + 0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_values_that_can_be_scaled_are_and_nothing_changes(family):
    model, traced = made(family)
    found, refused = foldings(traced.graph)
    scaled = {site.rpartition(".")[2] for folding in found for site in folding.sites}
    expected = {"o_proj", "down_proj"} | ({"qkv_proj", "gate_up_proj"} if family == "phi3" else {"q_proj", "v_proj"})
    assert expected <= scaled
    assert not [sites for sites, _ in refused if any("layers" in site for site in sites)]
    before = logits(model)
    for folding in found:
        fold(model, folding, a_scale(folding))
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)


def test_experts_have_scales_of_their_own():
    model, traced = made("qwen3_moe")
    inside = [folding for folding in foldings(traced.graph)[0] if folding.experts]
    assert [folding.shape for folding in inside] == [(8, 64)] * 2
    before, weight = logits(model), model.model.layers[0].mlp.experts.gate_up_proj.weight.clone()
    scale = a_scale(inside[0])
    fold(model, inside[0], scale)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)
    after = model.model.layers[0].mlp.experts.gate_up_proj.weight
    assert torch.equal(after[:, :64], weight[:, :64])  # gate stays
    torch.testing.assert_close(after[:, 64:] * scale[..., None], weight[:, 64:])


def test_experts_that_are_not_linear_in_up_are_refused():
    refused = dict(foldings(trace(tiny_moe("gpt_oss")).graph)[1])
    assert "not linear in the up projection" in refused[("model.layers.0.mlp.experts.down_proj",)]


def test_a_scale_near_the_asked_one_divides_a_norm_exactly():
    model = tiny_model()
    norm = model.model.layers[0].input_layernorm.weight
    with torch.no_grad():
        norm.copy_(torch.rand_like(norm) + 0.5)
    (folding,) = [f for f in foldings(trace(model).graph)[0] if "model.layers.0.self_attn.q_proj" in f.sites]
    asked = torch.rand(128) * 3 + 0.3
    scale = folding.storable(model, asked)
    torch.testing.assert_close(scale, asked, rtol=2**-7, atol=0)
    quotient = norm.float() / scale
    torch.testing.assert_close(quotient.bfloat16().float(), quotient, rtol=1e-6, atol=0)


class TestPass:
    def test_scales_by_the_name_of_any_reader(self):
        model, traced = made("qwen3")
        before = logits(model)
        fold_scales = FoldScales(model, {"model.layers.0.self_attn.k_proj": torch.rand(128) + 0.5})
        result = fold_scales(traced.graph)
        assert result.matches == 1
        torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize(
        ("scales", "message"),
        [
            ({"self_attn.k_proj": torch.ones(7)}, r"k_proj must have shape \[128\], not \[7\]"),
            ({"self_attn.k_proj": torch.zeros(128)}, "must be positive and finite"),
            ({"self_attn.k_proj": torch.ones(128), "self_attn.q_proj": torch.ones(128)}, "give its scale once"),
            ({"self_attn.o_proj": torch.rand(128) + 1}, r"same channel of .*v_proj.weight must have the same scale"),
        ],
    )
    def test_wrong_scales_change_nothing(self, scales, message):
        model, traced = made("qwen3")
        before = logits(model)
        with pytest.raises(CalibrationError, match=message):
            FoldScales(model, {f"model.layers.0.{site}": scale for site, scale in scales.items()})(traced.graph)
        assert torch.equal(logits(model), before)

    def test_unknown_and_unfused_sites_are_rejected_with_the_reason(self):
        model = tiny_moe("qwen3_moe")
        names = ("model.layers.0.mlp.experts.down_proj", "model.layers.7.mlp")
        result = FoldScales(model, {names[0]: torch.ones(8, 64), names[1]: torch.ones(3)})(trace(model).graph)
        assert result.matches == 0
        assert "not fused" in dict(result.rejected)[names[0]]
        assert "no Linear" in dict(result.rejected)[names[1]]
