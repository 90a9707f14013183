"""How good and how fast a language model is: perplexity, divergence from a reference, tokens per second."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .progress import progress_bar

_LOGITS_AT_ONCE = 2**24  # 64 MB in float32: many windows of a small vocabulary at once, one of a large vocabulary


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, sequence: int = 256, progress: bool | None = None) -> float:
    """Perplexity of ``model`` on token ``ids``: non-overlapping windows, the last partial one dropped.

    The first token of every window is context only. Log-probabilities are computed in float32. progress: show a bar
    (default: when stderr is a terminal).
    """
    total, count = 0.0, 0
    windows = _windows(ids, sequence)
    batch = 1
    with progress_bar("measuring perplexity", len(windows), progress) as advance:
        while len(windows):
            chosen, windows = windows[:batch], windows[batch:]
            logits = _logits(model, chosen)
            targets = chosen[:, 1:].to(logits.device)
            losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets)
            total, count = total + losses.item() * len(chosen), count + len(chosen)
            batch = _batch_size(logits)
            advance("", count)
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def divergence(
    model: nn.Module, reference: nn.Module, ids: Tensor, sequence: int = 256, progress: bool | None = None
) -> float:
    """Mean Kullback-Leibler divergence KL(reference ‖ model) per token, in nats; 0.0 for equal predictions.

    More sensitive than a difference of perplexities: gains on some tokens do not cancel losses on others.
    progress: show a bar (default: when stderr is a terminal).
    """
    total, count = 0.0, 0
    windows = _windows(ids, sequence)
    batch = 1
    with progress_bar("comparing with the reference", len(windows), progress) as advance:
        while len(windows):
            chosen, windows = windows[:batch], windows[batch:]
            expected = _logits(reference, chosen).float().log_softmax(-1)
            logits = _logits(model, chosen)
            if logits.shape != expected.shape:
                raise ConfigError(
                    f"the reference predicts {expected.shape[-1]} tokens and the model {logits.shape[-1]}; "
                    "a divergence needs two models with one vocabulary"
                )
            actual = logits.float().log_softmax(-1).to(expected.device)
            total += nn.functional.kl_div(actual, expected, reduction="sum", log_target=True).item()
            count += len(chosen)
            batch = _batch_size(logits)
            advance("", count)
    return total / (count * sequence)


class _Clock:
    """A streamer for ``generate`` that notes when each token came (the prompt arrives first), and tells ``advance``."""

    def __init__(self, advance: Callable[[str], None]) -> None:
        self.times: list[float] = []
        self.advance = advance

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        self.advance("")

    def end(self) -> None:
        """Nothing to flush."""


def _generate(model: Any, prompt: Tensor, new_tokens: int, **options: Any) -> Any:
    """Exactly ``new_tokens`` greedy tokens after token ids [1, n]; ``options`` go to ``generate``."""
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        **options,
    )


def tokens_per_second(
    model: Any, prompt_ids: Tensor, new_tokens: int, *, progress: bool | None = None, **options: Any
) -> float:
    """Speed of greedy decoding by ``model.generate``, without the prompt: one over the median time of a token.

    Runs once before, so that compilation is not counted; the median forgives a neighbour's burst of load. progress:
    show a bar (default: when stderr is a terminal). ``options`` go to ``generate``.
    """
    if new_tokens < 2:
        raise ConfigError(f"new_tokens must be at least 2 to measure the time between tokens, not {new_tokens}")
    with progress_bar("generating", 2 * (new_tokens + 1), progress) as advance:
        warm, clock = _Clock(advance), _Clock(advance)
        for streamer in (warm, clock):
            _generate(model, prompt_ids.reshape(1, -1), new_tokens, streamer=streamer, **options)
    times = clock.times[1:]
    return 1.0 / statistics.median(b - a for a, b in itertools.pairwise(times))


def deviation(model: Any, compiled: Any, prompt_ids: Tensor, new_tokens: int, **options: Any) -> float:
    """Largest difference of logits between two ways to run a model while it generates, over the largest logit.

    Greedy continuations of ``prompt_ids`` are compared step by step, prompt and decoding alike, for as long as both
    chose the same tokens (they may part at a tie). ``options`` go to ``generate``.
    """
    prompt = prompt_ids.reshape(1, -1)
    options |= {"output_logits": True, "return_dict_in_generate": True}
    first, second = (_generate(each, prompt, new_tokens, **options) for each in (model, compiled))
    worst = 0.0
    chosen = zip(*(run.sequences[0, prompt.shape[1] :].tolist() for run in (first, second)), strict=True)
    for expected, got, (token, other) in zip(first.logits, second.logits, chosen, strict=True):
        scale = expected.abs().max().item() or 1.0
        worst = max(worst, (expected.float() - got.float()).abs().max().item() / scale)
        if token != other:
            break
    return worst


def _windows(ids: Tensor, sequence: int) -> Tensor:
    if sequence < 2:
        raise ConfigError(f"sequence must be at least 2 tokens, not {sequence}")
    flat = ids.reshape(-1).long()
    if len(flat) < sequence:
        raise ConfigError(f"{len(flat)} tokens are less than one window of {sequence}; give a longer text")
    return flat[: len(flat) // sequence * sequence].view(-1, sequence)


def _logits(model: nn.Module, windows: Tensor) -> Tensor:
    device = next((p.device for p in model.parameters()), windows.device)
    output = model(windows.to(device))
    return getattr(output, "logits", output)


def _batch_size(logits: Tensor) -> int:
    return max(1, _LOGITS_AT_ONCE // logits[0].numel())
