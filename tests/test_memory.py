"""Float weights are freed one by one, so that quantizing needs no more than the float model and one decoder block."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TinyMLP, tiny_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import qcompile
from qcompile import numerics
from qcompile.backends.cpu.kernels import Int4Pack
from qcompile.methods.rtn import RoundToNearest
from qcompile.types import Scheme


def storages(model: nn.Module) -> dict[str, StorageWeakRef]:
    """The memory of every parameter, whoever else may hold a view of it."""
    return {name: StorageWeakRef(parameter.untyped_storage()) for name, parameter in model.named_parameters()}


def alive(references: dict[str, StorageWeakRef]) -> set[str]:
    return {name for name, reference in references.items() if not reference.expired()}


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a8"])
def test_no_float_weight_of_a_quantized_site_is_alive(scheme):
    model = tiny_model("qwen2", tie_word_embeddings=True)
    references = storages(model)
    qcompile.quantize(model, scheme, progress=False)
    quantized = {f"{planned.site.name}.weight" for planned in qcompile.report(model).plan.quantized}
    assert len(quantized) == 14
    assert alive(references) == references.keys() - quantized


def test_each_is_freed_before_the_next_is_quantized(monkeypatch):
    model = tiny_model("llama")
    references = storages(model)
    original, seen = RoundToNearest.quantize, []

    def observed(self, weight, scheme, options):
        seen.append(len(alive(references)))
        return original(self, weight, scheme, options)

    monkeypatch.setattr(RoundToNearest, "quantize", observed)
    qcompile.quantize(model, "w4a16_g32", progress=False)
    assert seen == [len(references) - done for done in range(14)]


def test_a_failed_quantize_holds_nothing():
    model = TinyMLP()
    references = storages(model)
    with torch.no_grad():
        model.last.weight[0, 0] = torch.nan
    with pytest.raises(qcompile.CalibrationError):
        qcompile.quantize(model, example_inputs=(torch.randn(3, 64),))
    del model
    assert alive(references) == set()


@pytest.mark.parametrize("chunk", [1, 64 * 96, 100 * 96])
def test_chunks_of_rows_change_no_result(chunk, monkeypatch):
    scheme, weight = Scheme.parse("w4a16_g32_asym"), torch.randn(300, 96).bfloat16()
    whole = numerics.quantize_weight(weight, scheme)
    tensors = Int4Pack().prepare(whole)
    noise = numerics.signal_to_noise(weight, whole)
    monkeypatch.setattr(numerics, "CHUNK", chunk)
    parts = numerics.quantize_weight(weight, scheme)
    assert all(torch.equal(tensor, parts.tensors()[name]) for name, tensor in whole.tensors().items())
    assert all(torch.equal(a, b) for a, b in zip(tensors, Int4Pack().prepare(whole), strict=True))
    assert numerics.signal_to_noise(weight, whole) == pytest.approx(noise)


PEAK = """
import gc, json, pathlib, re, sys, threading, torch
sys.path.insert(0, sys.argv[1])
from helpers import tiny_config, tiny_model
from transformers import AutoModelForCausalLM
import qcompile

def now(field="VmRSS"):
    return int(re.search(field + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

qcompile.quantize(tiny_model("llama"), sys.argv[2], progress=False)  # what loads code and starts threads does so here
config = tiny_config(
    "llama", hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=16, head_dim=128,
    num_key_value_heads=16, vocab_size=8000,
)
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.to_empty(device="cpu")
with torch.no_grad():
    for parameter in model.parameters():
        parameter.fill_(0.02)
        parameter.view(-1)[::7] = -0.01
size = sum(p.numel() for p in model.parameters()) * 2
block = sum(p.numel() for p in model.model.layers[0].parameters()) * 2
gc.collect()
before, samples, done = now(), [], threading.Event()

def sample():
    while not done.wait(0.001):
        samples.append(now())

thread = threading.Thread(target=sample)
thread.start()
qcompile.quantize(model, sys.argv[2], progress=False)
done.set()
thread.join()
after = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
print(json.dumps({"size": size, "block": block, "peak": max(samples) - before, "freed": before - now(),
                  "saved": size - after, "samples": len(samples)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident memory of Linux's /proc")
@pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "w8a8"])
def test_the_peak_is_the_float_model_and_one_decoder_block(scheme):
    command = [sys.executable, "-c", PEAK, str(Path(__file__).parent), scheme]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["size"] > 450e6
    assert facts["samples"] > 100
    assert facts["peak"] < facts["block"]
    assert facts["freed"] > 0.9 * facts["saved"]
