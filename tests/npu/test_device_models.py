"""Whole models on the device: a checkpoint is loaded onto it, compiled, and generates the tokens of the CPU."""

from pathlib import Path

import pytest
import torch

import qcompile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """AWQ checkpoints of two layers of each of the trained example models."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, found = tmp_path_factory.mktemp("awq"), {}
    for name in ("tiny_lm", "tiny_moe"):
        config = AutoConfig.from_pretrained(EXAMPLES / name)
        config.num_hidden_layers = 2
        if hasattr(config, "layer_types"):
            config.layer_types = config.layer_types[:2]
        model = AutoModelForCausalLM.from_pretrained(EXAMPLES / name, config=config, dtype=torch.float16)
        quantized = qcompile.quantize(model, "w4a16_g64_asym", progress=False)
        found[name] = qcompile.save(quantized, folder / name, format="awq")
    return found


def greedy(model, ids: torch.Tensor, steps: int) -> tuple[list[int], torch.Tensor]:
    """The tokens after a prompt, with the cache of keys and values; and the logits of the last one."""
    cache, tokens = None, []
    with torch.no_grad():
        for _ in range(steps):
            result = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, logits = result.past_key_values, result.logits[:, -1].float().cpu()
            tokens.append(int(logits.argmax()))
            ids = torch.tensor([[tokens[-1]]], device=ids.device)
    return tokens, logits


@pytest.mark.parametrize("name", ["tiny_lm", "tiny_moe"])
def test_an_awq_checkpoint_generates_the_tokens_of_the_cpu(name, checkpoints):
    """From the file to the tokens: loading, packing, tracing, lowering, a prompt, and six steps of decoding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / name)
    prompt = tokenizer("import os\n\ndef main(", return_tensors="pt").input_ids
    expected, logits = greedy(qcompile.load(checkpoints[name]), prompt, 7)

    model = qcompile.load(checkpoints[name], device="npu")
    kernels = {planned.kernel for planned in qcompile.report(model).plan.quantized}
    assert kernels == {"npu.weight_int4"}
    compiled = torch.compile(model, backend="qcompile", options={"npu_graph": "eager"})
    tokens, actual = greedy(compiled, prompt.npu(), 7)
    assert tokens == expected
    assert ((actual - logits).norm() / logits.norm()).item() < 1e-2
