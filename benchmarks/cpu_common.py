"""What the benchmarks of whole models on a CPU share: shapes, variants, and interleaved runs with a static cache.

Every variant runs in one process. Rounds are interleaved (A B C, A B C ...), so that whatever else the machine does
hits all of them; medians are reported. There are two baselines in bfloat16: ``torch.compile(model)``, what a user gets
at first, and "tuned", the same with Inductor's ``freezing`` and ``max_autotune``, which is the fair one. llama.cpp is
loaded after these rounds, for rounds of its own with the quantized variants: with its threads in a process OpenMP lets
all threads sleep after each short part, and bfloat16 decodes a token in 114 ms instead of 83.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import qcompile
from qcompile.backends.cpu import native

SHAPES = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4},
}
BASELINES = ("bfloat16", "bfloat16 tuned")
TUNED = {"freezing": True, "max_autotune": True}


def options(description: str, schemes: list[str]) -> argparse.Namespace:
    """What every benchmark of a whole model takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--schemes", nargs="+", default=schemes)
    parser.add_argument("--lm-head", default="same", help="scheme of the lm_head where it is quantized; same; float")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32, help="decoded tokens per variant and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--no-tuned", action="store_true", help="without the tuned baseline, which takes long to compile"
    )
    parser.add_argument("--llama", action="store_true", help="also llama.cpp (cpu_llama.py says how to install it)")
    parser.add_argument("--both", action="store_true", help="prompts and decoding, of variants that are compiled once")
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


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
        self._allocate(model.config)
        self.bytes = sum(
            {id(t): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}.values()
        )
        started = time.perf_counter()
        self.prefill()
        self.step()
        self.compile_seconds = time.perf_counter() - started

    def _allocate(self, config) -> None:
        """Memory of the cache before the first call, which would be another graph otherwise."""
        heads, size = config.num_key_value_heads, config.head_dim
        self.cache.early_initialization(1, heads, size, self.model.dtype, torch.device("cpu"))

    @torch.no_grad()
    def prefill(self) -> float:
        """Seconds to run the prompt through an empty cache."""
        self.cache.reset()
        return self._timed(self.prompt)

    @torch.no_grad()
    def step(self) -> float:
        """Seconds to decode one token."""
        return self._timed(self.token)

    def _timed(self, tokens: torch.Tensor) -> float:
        """Seconds of the model, for tokens [1, n]; choosing the next one, which no model does, is not part of them."""
        started = time.perf_counter()
        output = self.compiled(input_ids=tokens, past_key_values=self.cache, logits_to_keep=1)
        seconds = time.perf_counter() - started
        self.token = output.logits[:, -1:].argmax(-1)
        return seconds


def runners(chosen: argparse.Namespace) -> list[Any]:
    """All variants, compiled; baselines first."""
    # all variants are one class: past the limit of one function, they would silently run uncompiled
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
    compile_from_nothing()
    prompt = torch.randint(0, chosen.vocabulary, (1, chosen.prompt))
    made = []
    for name in [*BASELINES[: 1 if chosen.no_tuned else 2], *chosen.schemes]:
        model = build(chosen.shape, chosen.vocabulary)
        if name == BASELINES[0]:
            compiled = torch.compile(model, dynamic=True)
        elif name == BASELINES[1]:
            compiled = torch.compile(model, dynamic=False, options=TUNED)
        else:
            head = name if chosen.lm_head == "same" else chosen.lm_head
            rules = [] if head == "float" else [{"match": "lm_head", "scheme": head}]
            qcompile.quantize(model, {"scheme": name, "rules": rules})
            compiled = torch.compile(model, backend="qcompile")
        made.append(Runner(name, model, compiled, prompt, chosen.tokens + 8))
        print(f"{name}: compiled in {made[-1].compile_seconds:.1f} s", flush=True)
    return made


def against_llama(chosen: argparse.Namespace, variants: list[Any]) -> tuple[Any, list[dict[str, float]]]:
    """llama.cpp, and the medians of rounds with it and the quantized variants: of a prompt, of a token."""
    from cpu_llama import LlamaRunner

    llama = LlamaRunner(SHAPES[chosen.shape], chosen.vocabulary, variants[0].prompt, chosen.tokens + 8)
    return llama, list(measure(chosen, [*(v for v in variants if v.name in chosen.schemes), llama]))


def compile_from_nothing() -> None:
    """Nothing that an earlier run compiled shortens the times of compiling; what all share is compiled before them."""
    folder = tempfile.TemporaryDirectory(prefix="inductor_")
    atexit.register(folder.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
    torch.compile(lambda x: (x + 1).sum(-1))(torch.ones(2, 2))  # PyTorch's headers
    native.unavailable()  # our kernels


def measure(chosen: argparse.Namespace, all_runners: list[Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a prompt and of a decoded token, by variant."""
    prefills: dict[str, list[float]] = {runner.name: [] for runner in all_runners}
    steps: dict[str, list[float]] = {runner.name: [] for runner in all_runners}
    for _ in range(chosen.rounds):
        for runner in all_runners:
            prefills[runner.name].append(runner.prefill())
            steps[runner.name] += [runner.step() for _ in range(chosen.tokens)]
    return _medians(prefills), _medians(steps)


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items() if values}


def facts(chosen: argparse.Namespace, all_runners: list[Any]) -> dict:
    """What the numbers hold for."""
    return {
        "shape": chosen.shape,
        "lm_head": chosen.lm_head,
        "prompt": chosen.prompt,
        "threads": chosen.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": cpu_name(),
        "instruction_set": native.instruction_set(),
        "compile_seconds": {runner.name: round(runner.compile_seconds, 1) for runner in all_runners},
        "megabytes": {runner.name: round(runner.bytes / 1e6) for runner in all_runners},
    }


def cpu_name() -> str:
    """What the system calls its CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run(description: str, schemes: list[str], what: str) -> None:
    """Build, compile, measure and report ``what``: "decode" or "prefill"."""
    chosen = options(description, schemes)
    if what == "prefill" and not chosen.both:
        chosen.tokens = 1
        chosen.rounds *= 4
    variants = runners(chosen)
    prefills, steps = measure(chosen, variants)
    result: dict[str, Any] = facts(chosen, variants) | {"ratios": {}}
    llama, beside = against_llama(chosen, variants) if chosen.llama else (None, [{}, {}])
    if llama is not None:
        result["megabytes"][llama.name] = round(llama.bytes / 1e6)
    found = {"decode": (steps, beside[1], 1), "prefill": (prefills, beside[0], chosen.prompt)}
    for name, (seconds, rivals, count) in found.items() if chosen.both else [(what, found[what])]:
        result["ratios"] |= table_of(chosen, variants, name, seconds, count)
        result[f"{name}_ms"] = {variant: value * 1e3 for variant, value in seconds.items()}
        if llama is not None:
            result["ratios"] |= table_against(llama, name, rivals)
            result[f"{name}_beside_llama_ms"] = {variant: value * 1e3 for variant, value in rivals.items()}
    compiled = result["compile_seconds"]
    for name in compiled.keys() & set(chosen.schemes):
        result["ratios"][f"compile_{name}"] = compiled[BASELINES[0]] / compiled[name]
    if chosen.json:
        print(json.dumps(result))


def table_of(
    chosen: argparse.Namespace, all_runners: list[Any], what: str, seconds: dict[str, float], count: int
) -> dict[str, float]:
    """Print a table of ``seconds`` for ``count`` tokens against both baselines; returns the ratios."""
    table = Table(title=f"Qwen3 {chosen.shape}, {what}, lm_head {chosen.lm_head}, {chosen.threads} threads")
    baselines = [name for name in BASELINES if name in seconds]
    columns = ("variant", "MB", "compile s", "ms", "tok/s", *(f"× {name}" for name in baselines))
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right")
    ratios = {}
    for runner in all_runners:
        own = seconds[runner.name]
        against = {name: seconds[name] / own for name in baselines}
        row = (f"{runner.bytes / 1e6:.0f}", f"{runner.compile_seconds:.1f}", f"{own * 1e3:.1f}", f"{count / own:.1f}")
        table.add_row(runner.name, *row, *(f"{ratio:.2f}" for ratio in against.values()))
        if runner.name not in baselines:
            keys = {"bfloat16": "", "bfloat16 tuned": "_tuned"}
            ratios |= {f"{what}_{runner.name}{keys[name]}": ratio for name, ratio in against.items()}
    Console(width=120).print(table)
    return ratios


def table_against(llama: Any, what: str, seconds: dict[str, float]) -> dict[str, float]:
    """Print a table of the rounds with llama.cpp; returns the ratios."""
    table = Table(title=f"{what}, in rounds with llama.cpp ({llama.bytes / 1e6:.0f} MB)")
    for column in ("variant", "ms", "× llama.cpp"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, own in seconds.items():
        table.add_row(name, f"{own * 1e3:.1f}", f"{seconds[llama.name] / own:.2f}")
    Console(width=120).print(table)
    return {f"{what}_{name}_llama": seconds[llama.name] / own for name, own in seconds.items() if name != llama.name}
