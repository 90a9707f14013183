"""Scales are folded into whatever makes a Linear's input, found by dataflow, and the model computes what it did."""

import copy

import pytest
import torch
from helpers import logits, relative_error, tiny_model
from moe_models import tiny_moe
from qcompile.passes.fold_scales import FoldScales, foldings
from torch import nn

from qcompile.errors import CalibrationError, PassError
from qcompile.trace import trace
from qcompile.verify import run_pass

# Two layers each: values that can be scaled, that cannot, and that could if the experts were fused.
DENSE = dict.fromkeys(["qwen3", "qwen2", "llama", "mistral", "gemma2", "gemma3_text", "phi3", "glm4"], (9, 0, 0))
MOE = {
    "qwen3_moe": (5, 0, 4), "qwen2_moe": (7, 0, 4), "mixtral": (5, 0, 4), "glm4_moe": (8, 0, 2), "gpt_oss": (5, 2, 2),
    "deepseek_v2": (12, 0, 2), "deepseek_v3": (12, 0, 2),
}  # fmt: skip


def float_model(family: str) -> nn.Module:
    torch.manual_seed(2)
    model = (tiny_model if family in DENSE else tiny_moe)(family, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros would not show whether they are scaled
            nn.init.normal_(parameter, std=0.1)
    return model


def scales_for(found) -> dict[str, torch.Tensor]:
    """A scale for every value, by the name of the last site that reads it."""
    random = torch.Generator().manual_seed(3)
    return {f.sites[-1]: f.shared(torch.rand(len(f.source.rows), generator=random) + 0.5) for f in found}


@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_every_scale_that_can_be_folded_changes_weights_and_no_result(family):
    model = float_model(family)
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    graph = trace(model).graph
    found, refused = foldings(graph)
    unfused = [f for f in found if f.missing(model)]  # what experts read; see test_fold_scales
    found = [f for f in found if not f.missing(model)]
    assert (len(found), len(refused), len(unfused)) == (DENSE | MOE)[family]
    pass_ = FoldScales(model, scales_for(found))
    assert run_pass(pass_, graph).matches == len(found)
    assert relative_error(logits(model), expected) < 1e-5
    touched = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert touched == {name for f in found for name in (f.source.weight, *f.source.biases, *f.weights)}
    assert run_pass(pass_, graph).matches == 0  # they are folded already
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} == touched


Q, K, O = (f"model.layers.0.self_attn.{name}_proj" for name in "qko")
GOOD = torch.full((128,), 2.0)


@pytest.mark.parametrize(
    ("scales", "error", "message"),
    [
        ({Q: GOOD.index_fill(0, torch.tensor([5]), 0.0)}, CalibrationError, "q_proj must be positive and finite"),
        ({Q: -GOOD}, CalibrationError, "q_proj must be positive and finite"),
        ({Q: GOOD * torch.nan}, CalibrationError, "q_proj must be positive and finite"),
        ({Q: GOOD * torch.inf}, CalibrationError, "q_proj must be positive and finite"),
        ({Q: GOOD[:64]}, CalibrationError, r"q_proj must have shape \[128\], not \[64\]"),
        ({Q: GOOD, K: GOOD}, CalibrationError, "several read the same value: give its scale once"),
        ({O: torch.arange(1.0, 129.0)}, CalibrationError, "come from the same channel of .*v_proj.weight must have"),
        ({Q: GOOD, "model.layers.7.up": GOOD}, PassError, "matched 0 of 2: model.layers.7.up: no Linear of the graph"),
    ],
)
def test_what_cannot_be_folded_is_an_error_before_anything_is(scales, error, message):
    model = tiny_model(dtype=torch.float32, num_hidden_layers=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        run_pass(FoldScales(model, scales), trace(model).graph)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_value_that_experts_read_says_what_they_lack():
    model = float_model("qwen3_moe")
    with pytest.raises(PassError, match=r"matched 0 of 1: model\.layers\.0\.mlp\.gate: .* its experts are not fused"):
        run_pass(FoldScales(model, {"model.layers.0.mlp.gate": GOOD}), trace(model).graph)
