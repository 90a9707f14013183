"""Whole models on the device: a checkpoint is loaded onto it, compiled, and generates the tokens of the CPU."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import ON_CHIP

import qcompile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


CHECKPOINTS = {  # two layers of the trained example models: scheme, format, and the kernels that it comes to
    "tiny_lm": ("w4a16_g64_asym", "awq", {"npu.weight_int4"}),
    "tiny_moe": ("w4a16_g64_asym", "awq", {"npu.weight_int4"}),
    "tiny_moe w8a8": ("w8a8", "compressed-tensors", {"npu.int8_nz"}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Name: (the folder of the checkpoint, that of the float model)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, found = tmp_path_factory.mktemp("checkpoints"), {}
    for name, (scheme, file_format, _) in CHECKPOINTS.items():
        source = EXAMPLES / name.partition(" ")[0]
        config = AutoConfig.from_pretrained(source)
        config.num_hidden_layers = 2
        if hasattr(config, "layer_types"):
            config.layer_types = config.layer_types[:2]
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.float16)
        quantized = qcompile.quantize(model, scheme, progress=False)
        found[name] = qcompile.save(quantized, folder / name.replace(" ", "_"), format=file_format), source
    return found


def decoded(model, ids: torch.Tensor, steps: int, forced: Sequence[int] = ()) -> list[torch.Tensor]:
    """Logits after a prompt and after each token, greedy or given, with the cache of keys and values."""
    cache, found = None, []
    with torch.no_grad():
        for step in range(steps):
            result = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            found.append(result.logits[0, -1].float().cpu())
            token = forced[step] if forced else int(found[-1].argmax())
            ids = torch.tensor([[token]], device=ids.device)
    return found


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_generates_the_tokens_of_the_cpu(name, checkpoints):
    """From the file to the tokens: loading, packing, tracing, lowering, a prompt, and six steps of decoding."""
    from transformers import AutoTokenizer

    path, source = checkpoints[name]
    tokenizer = AutoTokenizer.from_pretrained(source)
    prompt = tokenizer("import os\n\ndef main(", return_tensors="pt").input_ids
    expected = decoded(qcompile.load(path), prompt, 7)

    model = qcompile.load(path, device="npu")
    kernels = {planned.kernel for planned in qcompile.report(model).plan.quantized}
    assert kernels == CHECKPOINTS[name][2]
    # a captured graph that is run again computes nothing on the pretend device
    compiled = torch.compile(model, backend="qcompile", options={} if ON_CHIP else {"npu_graph": "eager"})
    tokens = [int(logits.argmax()) for logits in expected]
    for token, ours, wanted in zip(tokens, decoded(compiled, prompt.npu(), 7, tokens), expected, strict=True):
        assert ((ours - wanted).norm() / wanted.norm()).item() < (5e-2 if "w8a8" in name else 1e-2)
        tied = wanted.max() - wanted[ours.argmax()] < 1e-2 * wanted.abs().max()  # what another CPU may choose as well
        assert int(ours.argmax()) == token or tied


def test_loading_never_holds_a_model_twice(checkpoints):
    """The device's memory at its fullest: the packed model, and what one layer takes on the way to its layout."""
    torch.npu.empty_cache()
    torch.npu.reset_peak_memory_stats()
    before = torch.npu.memory_allocated()
    model = qcompile.load(checkpoints["tiny_moe"][0], device="npu")
    stored, fullest = torch.npu.memory_allocated() - before, torch.npu.max_memory_allocated() - before
    largest = max(planned.bytes_after for planned in qcompile.report(model).plan.quantized)
    assert stored > 4 * largest  # so that holding it twice would be noticed
    assert fullest <= stored + 2 * largest
