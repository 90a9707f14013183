"""Decoding on a GPU, end to end: quantized models beside the same model in bfloat16, compiled, in CUDA graphs.

    python benchmarks/cuda_decode.py                        # Qwen3-8B's shape, random weights, batch 1
    python benchmarks/cuda_decode.py --device cpu           # a dry run without a GPU: a tiny model

Both sides have a static cache and ``mode="reduce-overhead"``; torchao's int4 is a third where it is installed.
TORCHINDUCTOR_ENABLE_PDL=1 lets launches of Inductor's kernels overlap on Hopper, on all sides, as those of ours do.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from cuda_common import Table, arguments

import qcompile

QWEN3_8B = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 160, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "w4a16_g128, lm_head w8a16": {"scheme": "w4a16_g128", "rules": [{"match": "lm_head", "scheme": "w8a16"}]},
    "w8a8": {"scheme": "w8a8"},
}


def build(device: str) -> torch.nn.Module:
    """A Qwen3 with random weights, made where it is needed."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Qwen3ForCausalLM(Qwen3Config(**(TINY if device == "cpu" else QWEN3_8B))).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def step_seconds(model: torch.nn.Module, compiled: Callable, device: str, context: int, tokens: int) -> list[float]:
    """Times of single steps, each waited for, after a prompt of ``context`` tokens."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=context + tokens + 8)
    ids = torch.randint(0, 150, (1, context), device=device)
    times = []
    with torch.no_grad():
        token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(tokens):
            started = time.perf_counter()
            token = compiled(token, past_key_values=cache).logits[:, -1:].argmax(-1).clone()
            token.cpu()
            times.append(time.perf_counter() - started)
    return times[5:]  # the first ones compile and record


def variants(device: str):
    """(name, model, compiled) one after the other; each model is gone before the next one is made."""
    mode = None if device == "cpu" else "reduce-overhead"
    model = build(device)
    yield "bfloat16", model, torch.compile(model, mode=mode, dynamic=False)
    for name, config in CONFIGS.items():
        model = qcompile.quantize(build(device), config, device=device)
        yield name, model, torch.compile(model, backend="qcompile", mode=mode, dynamic=False)
    try:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        model = build(device)
        quantize_(model, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    except Exception as reason:
        print(f"torchao: {str(reason)[:200]}", file=sys.stderr)
        return
    yield "torchao int4", model, torch.compile(model, mode=mode, dynamic=False)


def main() -> None:
    chosen = arguments(__doc__.splitlines()[0])
    table = Table("cuda_decode", chosen, {"shape": "tiny" if chosen.device == "cpu" else "Qwen3-8B"})
    context, tokens = (16, 10) if chosen.device == "cpu" else (512, 128)
    end, first = time.monotonic() + chosen.seconds, 0.0
    for name, model, compiled in variants(chosen.device):
        steps = step_seconds(model, compiled, chosen.device, context, tokens)
        rate = 1 / statistics.median(steps)
        first = first or rate
        nbytes = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
        table.add(name=name, tokens_per_second=rate, against_bfloat16=rate / first, gigabytes=nbytes / 1e9)
        torch._dynamo.reset()
        if time.monotonic() > end:
            return


if __name__ == "__main__":
    main()
