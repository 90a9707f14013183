"""The demo: one small language model, float and under every scheme, eager and compiled, in one table."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import evaluation, models
from .api import quantize, report
from .checkpoint import load
from .errors import ConfigError, PassError
from .tables import size
from .types import Report

SCHEMES = ("w4a16_g128", "w4a16_g32_asym", "w8a16", "w8a8")
PROMPT = "import os\nimport sys\n\ndef main("
NEW_TOKENS = 48
SAMPLE_TOKENS = 24
LARGEST_DEVIATION = 0.1  # bfloat16 rounding through six layers stays near 0.01; wrong kernels are far above
CACHE = {"cache_implementation": "static"}  # fixed shapes: two graphs, the prompt's and the next token's


STEPS = {"load and quantize": 1.0, "perplexity": 8.0, "generate eagerly": 2.0, "compile": 10.0, "generate": 1.0}
"""What is done per scheme, and about how many seconds each takes: the weights of the progress bar."""


@dataclass(frozen=True)
class Row:
    """What was measured of one scheme; speeds are greedy decoding in tokens per second."""

    scheme: str
    nbytes: int
    perplexity: float
    eager: float
    compiled: float
    compile_seconds: float
    deviation: float  # of compiled from eager logits
    sample: str
    report: Report | None = None

    def cells(self) -> dict[str, str]:
        """Column title → text, for the terminal and the HTML page."""
        return {
            "scheme": self.scheme,
            "size": size(self.nbytes),
            "perplexity": f"{self.perplexity:.2f}",
            "eager tok/s": f"{self.eager:.0f}",
            "compiled tok/s": f"{self.compiled:.0f}",
            "compile time": f"{self.compile_seconds:.0f} s",
            "compiled − eager": f"{self.deviation:.1%}",
        }


def find_model(path: Path | None, moe: bool = False) -> Path:
    """The folder of the demo's model: ``path``, or one of ``examples`` in the repository that qcompile runs from."""
    shipped = Path(__file__).resolve().parent.parent / "examples" / ("tiny_moe" if moe else "tiny_lm")
    folder = path or shipped
    if not (folder / "config.json").is_file():
        hint = (
            "give the folder of a checkpoint with config.json"
            if path
            else "it comes with the repository: install with 'pip install -e .' from a clone, or pass --model FOLDER"
        )
        raise ConfigError(f"no model in {folder}: {hint}")
    return folder


def run(folder: Path, step: Callable[[str, str], None]) -> list[Row]:
    """Measure float and every scheme; ``step(scheme, what)`` is told before each of STEPS.

    On one thread: a model this small gains nothing from a second one, and two that wait for each other on a busy
    machine measure the neighbours.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure_all(folder, step)
    finally:
        torch.set_num_threads(threads)


def _measure_all(folder: Path, step: Callable[[str, str], None]) -> list[Row]:
    ids = models.held_out_ids(folder)
    tokenizer = models.load_tokenizer(folder)
    return [_measure(scheme, folder, ids, tokenizer, partial(step, scheme)) for scheme in ("float", *SCHEMES)]


def _measure(scheme: str, folder: Path, ids: Tensor, tokenizer: Any, step: Callable[[str], None]) -> Row:
    torch.compiler.reset()  # every scheme is a new model of one class: without this, Dynamo's cache limit is reached
    step("load and quantize")
    model = load(folder, progress=False)
    if scheme != "float":
        quantize(model, scheme, progress=False)
    step("perplexity")
    perplexity = evaluation.perplexity(model, ids, progress=False)
    step("generate eagerly")
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    eager = evaluation.tokens_per_second(model, prompt, NEW_TOKENS, progress=False, **CACHE)
    step("compile")
    started = time.perf_counter()
    # the same backend for all: a float model is plain Inductor, cut into blocks like the others
    compiled: Any = torch.compile(model, backend="qcompile", dynamic=False, options={"allow_float": scheme == "float"})
    tokens = models.greedy(compiled, prompt, NEW_TOKENS, **CACHE)
    compile_seconds = time.perf_counter() - started
    step("generate")
    speed = evaluation.tokens_per_second(compiled, prompt, NEW_TOKENS, progress=False, **CACHE)
    sample = tokenizer.decode(tokens[0, prompt.shape[1] :][:SAMPLE_TOKENS], skip_special_tokens=True)
    facts = report(model) if scheme != "float" else None
    deviation = evaluation.deviation(model, compiled, prompt, NEW_TOKENS, **CACHE)
    if not deviation < LARGEST_DEVIATION:
        raise PassError(f"{scheme}: compiled logits differ from eager ones by {deviation:.0%} of the largest")
    return Row(scheme, models.nbytes(model), perplexity, eager, speed, compile_seconds, deviation, sample, facts)


def machine() -> str:
    """One line about where the numbers come from."""
    return f"one thread of {os.cpu_count()} cores, torch {torch.__version__}"
