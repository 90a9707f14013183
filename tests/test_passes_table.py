"""How often each pass matches in each family: a release of transformers that breaks a pattern fails here, loudly."""

import pytest
import torch
from helpers import logits, relative_error, tiny_model
from moe_models import tiny_moe
from torch import nn

import qcompile
from qcompile import compile as compiler
from qcompile.backends.cpu import native
from qcompile.verify import close

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# Two layers each. canonicalize: norms, sums before them that go on (one fewer than norms that follow a sum), gates.
# Experts are one op: their activation is no node. share: quantizations merged or moved before a view.
#             canonicalize  share  merge  norm+quantize  gate+quantize
DENSE = {
    "qwen3": (14, 6, 4, 4, 2),
    "qwen2": (10, 6, 4, 4, 2),
    "llama": (10, 6, 4, 4, 2),
    "mistral": (10, 6, 4, 4, 2),
    "gemma2": (14, 6, 4, 4, 2),
    "gemma3_text": (18, 6, 4, 4, 2),
    "phi3": (10, 0, 0, 4, 2),
    "glm4": (14, 4, 2, 4, 2),
}
MOE = {
    "qwen3_moe": (12, 6, 2, 4, 0),
    "qwen2_moe": (10, 18, 4, 4, 2),
    "mixtral": (8, 6, 2, 4, 0),
    "glm4_moe": (10, 8, 4, 4, 2),
    "gpt_oss": (8, 6, 2, 4, 0),
    "deepseek_v2": (14, 8, 4, 8, 2),
    "deepseek_v3": (14, 8, 4, 8, 2),
    "llama4_text": (14, 12, 4, 4, 2),
}
PASSES = ("canonicalize", "share_activation_quant", "merge_linears", "fuse_norm_quant", "fuse_gated_act_quant")


def merging(row: tuple[int, ...]) -> tuple[int, ...]:
    """``row`` on this machine: without a C++ compiler, other kernels run that do not merge."""
    return (*row[:2], 0, *row[3:]) if native.unavailable() else row


@pytest.fixture
def passes_only(monkeypatch):
    """Compile no code: the lowered graph is run as it is."""
    monkeypatch.setattr(compiler._Inner, "_compile", lambda self, module, inputs, kwargs: (module.forward, 1, 1))


def records(model: nn.Module, **options) -> dict[str, tuple[int, tuple]]:
    """(matches, near-misses) of each pass in the one graph of a forward, whose numbers are those of the model."""
    compiled = torch.compile(model, backend="qcompile", fullgraph=True, options={"verify": "numbers", **options})
    assert relative_error(logits(compiled), logits(model)) < 1e-5
    (graph,) = qcompile.report(compiled).graphs
    return {record.name: (record.matches, record.rejected) for record in graph.passes}


ALONE = ("qwen3_moe", "mixtral", "gpt_oss")  # where experts are all that reads the norm before them, quantized


def expected(family: str, scheme: str) -> tuple[int, ...]:
    """What is not that of w8a8: experts quantize with a static scale of their own each, so that nothing is shared with
    them or fused before them; the kernel of fp8 does not merge; float activations are never quantized.
    """
    row = merging(DENSE[family] if family in DENSE else MOE[family])
    if scheme == "w8a8_static" and family in MOE:
        shared = 4 if family == "qwen2_moe" else 2
        return row[0], row[1] - shared, row[2], row[3] - (2 if family in ALONE else 0), row[4]
    return {"wfp8afp8": (*row[:2], 0, *row[3:]), "w4a16_g32": (row[0], 0, row[2], 0, 0)}.get(scheme, row)


CASES = [
    *((family, scheme) for family in (*DENSE, *MOE) for scheme in ("w8a8", "w8a8_static", "wfp8afp8", "w4a16_g32")),
    *((family, scheme) for family in ("qwen3", "qwen3_moe") for scheme in ("w4a8", "w4a4")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_matches(family, scheme, passes_only):
    model = (tiny_model if family in DENSE else tiny_moe)(family, dtype=torch.float32)
    data = torch.randint(3, 50, (4, 16)) if scheme == "w8a8_static" else None
    model = qcompile.quantize(model, scheme, data=data, sequence=16, rare_experts="all_tokens")
    # attention in another order of summation may make other codes of the activations after it
    found = records(model, passes=["-attend_shared_heads"])
    assert tuple(found[name][0] for name in PASSES) == expected(family, scheme)
    assert [found[name][1] for name in PASSES] == [()] * len(PASSES)


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_half_precision_and_settings_that_are_inputs_of_the_graph(dynamic, passes_only):
    """With dynamic=True Dynamo makes eps an input of the graph: a scalar is bound as a value, whatever it is."""
    model = qcompile.quantize(tiny_model("qwen3", dtype=torch.bfloat16), "w8a8")
    compiled = torch.compile(model, backend="qcompile", dynamic=dynamic, options={"verify": "numbers"})
    assert close(logits(compiled), logits(model), factor=4)
    graph = qcompile.report(compiled).graphs[0]
    matches = {record.name: record.matches for record in graph.passes}
    assert tuple(matches[name] for name in PASSES) == merging(DENSE["qwen3"])


def test_norms_of_torch_itself(passes_only):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.RMSNorm(32), nn.Linear(32, 32)

        def forward(self, x):
            return x + self.linear(self.norm(x))

    x = torch.randn(3, 32)
    model = qcompile.quantize(nn.Sequential(Block(), Block()), "w8a8", example_inputs=(x,))
    compiled = torch.compile(model, backend="qcompile", options={"verify": "numbers"})
    with torch.no_grad():
        assert close(compiled(x), model(x))
    matches = {record.name: record.matches for record in qcompile.report(compiled).graphs[0].passes}
    assert tuple(matches[name] for name in PASSES) == (3, 0, 0, 2, 0)
