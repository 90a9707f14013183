"""Decode speed on the CPU: quantized models against the same model in bfloat16, all compiled.

    python benchmarks/cpu_decode.py                         # Qwen3-0.6B shape, random weights
    python benchmarks/cpu_decode.py --lm-head w8a16 --json

Every variant runs in one process. Rounds are interleaved (A B C, A B C ...), so that whatever else the machine does
hits all of them; medians and ratios of single decode steps are reported. The baseline is what a user gets from
``torch.compile(model)`` on the float model.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import qcompile

SHAPES = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4},
}


def build(shape: str, vocabulary: int) -> torch.nn.Module:
    """A Qwen3 of the given shape with random bfloat16 weights and tied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = SHAPES[shape]
    config = Qwen3Config(
        **sizes,
        num_key_value_heads=sizes["num_attention_heads"] // 2,
        head_dim=128,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Qwen3ForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


class Runner:
    """One compiled variant with a static cache: ``prefill`` fills it, ``step`` decodes one token."""

    def __init__(self, name: str, model: torch.nn.Module, compiled: Callable, prompt: torch.Tensor, room: int) -> None:
        from transformers import StaticCache

        self.name, self.model, self.compiled, self.prompt = name, model, compiled, prompt
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + room)
        self.bytes = sum(
            {id(t): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}.values()
        )
        started = time.perf_counter()
        self.prefill()
        self.step()
        self.compile_seconds = time.perf_counter() - started

    @torch.no_grad()
    def prefill(self) -> float:
        """Seconds to run the prompt through an empty cache."""
        self.cache.reset()
        started = time.perf_counter()
        output = self.compiled(input_ids=self.prompt, past_key_values=self.cache, logits_to_keep=1)
        self.token = output.logits[:, -1:].argmax(-1)
        return time.perf_counter() - started

    @torch.no_grad()
    def step(self) -> float:
        """Seconds to decode one token."""
        started = time.perf_counter()
        output = self.compiled(input_ids=self.token, past_key_values=self.cache, logits_to_keep=1)
        self.token = output.logits[:, -1:].argmax(-1)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--schemes", nargs="+", default=["w4a16_g128", "w8a16"])
    parser.add_argument("--lm-head", default="float", help="scheme of the lm_head in the quantized variants")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8, help="decoded tokens per variant and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prompt = torch.randint(0, arguments.vocabulary, (1, arguments.prompt))

    variants = ["bfloat16", *arguments.schemes]
    runners = []
    for name in variants:
        model = build(arguments.shape, arguments.vocabulary)
        if name == "bfloat16":
            compiled = torch.compile(model, dynamic=True)
        else:
            rules = [] if arguments.lm_head == "float" else [{"match": "lm_head", "scheme": arguments.lm_head}]
            qcompile.quantize(model, {"scheme": name, "rules": rules})
            compiled = torch.compile(model, backend="qcompile")
        runners.append(Runner(name, model, compiled, prompt, arguments.tokens + 8))
        print(f"{name}: compiled in {runners[-1].compile_seconds:.1f} s", flush=True)

    steps: dict[str, list[float]] = {name: [] for name in variants}
    prefills: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for runner in runners:
            prefills[runner.name].append(runner.prefill())
            steps[runner.name] += [runner.step() for _ in range(arguments.tokens)]

    report(arguments, runners, steps, prefills)


def report(
    arguments: argparse.Namespace,
    runners: list[Runner],
    steps: dict[str, list[float]],
    prefills: dict[str, list[float]],
) -> None:
    """Print the table, and the JSON line when asked."""
    decode = {name: statistics.median(values) for name, values in steps.items()}
    prefill = {name: statistics.median(values) for name, values in prefills.items()}
    base = runners[0].name
    table = Table(title=f"Qwen3 {arguments.shape}, lm_head {arguments.lm_head}, {arguments.threads} threads")
    for column in ("variant", "MB", "compile s", "decode ms", "tok/s", "× bfloat16", "prefill ms", "× bfloat16"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for runner in runners:
        name = runner.name
        table.add_row(
            name,
            f"{runner.bytes / 1e6:.0f}",
            f"{runner.compile_seconds:.1f}",
            f"{decode[name] * 1e3:.1f}",
            f"{1 / decode[name]:.1f}",
            f"{decode[base] / decode[name]:.2f}",
            f"{prefill[name] * 1e3:.0f}",
            f"{prefill[base] / prefill[name]:.2f}",
        )
    Console().print(table)
    if arguments.json:
        ratios = {f"decode_{r.name}": decode[base] / decode[r.name] for r in runners[1:]}
        ratios |= {f"prefill_{r.name}": prefill[base] / prefill[r.name] for r in runners[1:]}
        facts = {
            "shape": arguments.shape,
            "lm_head": arguments.lm_head,
            "threads": arguments.threads,
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
            "compile_seconds": {r.name: r.compile_seconds for r in runners},
            "decode_ms": {name: value * 1e3 for name, value in decode.items()},
            "prefill_ms": {name: value * 1e3 for name, value in prefill.items()},
            "ratios": ratios,
        }
        print(json.dumps(facts))


if __name__ == "__main__":
    main()
