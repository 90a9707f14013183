"""Peak memory of reading a mixture of experts: ``python tests/stream_moe.py FOLDER [small|large] [stream|load]``.

A checkpoint of random bfloat16 shards is made in FOLDER, then quantized while it is read ("stream"), or quantized once
and the result loaded ("load"). Prints JSON: bytes of the float and the quantized model, and how far the resident memory
rose above what it was with everything imported.
"""

import gc
import json
import re
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import qcompile
from qcompile.memory import return_memory
from qcompile.skeleton import slots, write_config
from qcompile.storage import ShardWriter

SIZES = {
    "small": {"hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 6, "num_experts": 32},
    "large": {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 13, "num_experts": 32},
}


def make(folder: Path, size: str) -> int:
    """Write a float checkpoint tensor by tensor, with random weights of every expert; its bytes."""
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=8000, num_attention_heads=16, num_key_value_heads=4, head_dim=64, num_experts_per_tok=4,
        decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=False, **SIZES[size],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, 500_000_000, 1 << 20)
    for slot in slots(model):
        (name, *_), shape = slot.names, slot.tensor.shape
        if len(shape) < 3:
            writer.add(name, torch.randn(shape).mul_(0.02).bfloat16())
            continue
        experts, _, leaf = name.rpartition(".")
        for expert in range(shape[0]):
            weight = torch.randn(shape[1:]).mul_(0.02).bfloat16()
            projections = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
            for part, rows in zip(projections, weight.chunk(len(projections)), strict=True):
                writer.add(f"{experts}.{expert}.{part}.weight", rows)
    writer.finish()
    write_config(model, folder, None, untied=True)
    return writer.total_bytes


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measure(folder: Path, size: str = "large", what: str = "stream") -> dict:
    """Make the checkpoint, then read it while another thread watches the memory."""
    float_bytes = make(folder / "float", size)
    warm = SIZES["small"] | {"num_hidden_layers": 1, "hidden_size": 64, "moe_intermediate_size": 64}
    SIZES["warm"] = warm
    make(folder / "warm", "warm")
    if what == "load":
        for name in ("warm", "float"):
            qcompile.save(qcompile.load(folder / name, config="w4a16_g128"), folder / f"{name}_w4")
        names, options = ("warm_w4", "float_w4"), {}
    else:
        names, options = ("warm", "float"), {"config": "w4a16_g128"}
    qcompile.load(folder / names[0], **options)  # imports code, starts threads, compiles kernels
    gc.collect()
    return_memory()
    before, samples, done = resident(), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            samples.append(resident())

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    model = qcompile.load(folder / names[1], **options)
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    held = [*model.parameters(), *model.buffers()]
    quantized = sum(t.numel() * t.element_size() for t in held)
    return {
        "parameters": float_bytes // 2, "float_bytes": float_bytes, "quantized_bytes": quantized,
        "peak_bytes": max(samples) - before, "seconds": round(seconds, 1), "samples": len(samples),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), *sys.argv[2:])))
