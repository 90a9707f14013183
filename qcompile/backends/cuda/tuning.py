"""Measuring tiles: those of the rule, then what lies one step away from the best, until nothing is better.

``torch.compile(..., mode="max-autotune")`` asks for it, as does whatever else sets Inductor's ``max_autotune``: while a
graph is lowered on a GPU, each product whose number of rows is known and that no table has is measured, before its
splits become part of the graph. Its tiles are kept (``tables.py``) and used by every later process. Without it nothing
is measured: the first call is as quick as the table or the rules make it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import tables, tiles
from .targets import Target, attached
from .tiles import Tiles, Weight

Call = Callable[[], Tensor]
Timer = Callable[[Sequence[Call]], float]

DEVICE = "cuda"
BETTER = 0.97  # of the best time so far: less is noise
SAME = 0.01  # relative error between results of different tiles: sums in another order, rounded to bfloat16
VENDOR_ROWS = 512  # of float activations, from the next bucket on: the vendor's product takes over at 1024


def microseconds(calls: Sequence[Call]) -> float:
    """Of one call: the median over replays of a CUDA graph that makes each in turn (the same work, other weights)."""
    from triton.testing import do_bench_cudagraph

    def every() -> None:
        for call in calls:
            call()

    return do_bench_cudagraph(every, rep=10, return_mode="median") * 1e3 / len(calls)


def is_measured(weight: Weight, rows: int) -> bool:
    """Whether such a product has tiles to be measured; a float one of many rows is the vendor's."""
    return weight.x_bits == 8 or bool(weight.experts) or tiles.bucket(rows) <= VENDOR_ROWS


def neighbours(around: Tiles, weight: Weight, rows: int, target: Target) -> Iterator[Tiles]:
    """Tiles that differ in one size by one step, or have half as many programs with twice the splits, and are fit."""
    found = []
    for name, steps in tiles.SIZES.items():
        place = steps.index(getattr(around, name))
        for other in (place - 1, place + 1):
            if 0 <= other < len(steps):
                found.append(dataclasses.replace(around, **{name: steps[other]}))
    found += [dataclasses.replace(around, bn=128, splits=2 * around.splits)] * (around.bn == 64)
    found += [dataclasses.replace(around, bn=64, splits=around.splits // 2)] * (around.bn == 128)
    for one in found:
        wasteful = one.bm > max(16, tiles.bucket(rows)) or (one.bm <= tiles.FEW_ROWS and one.warps > 4)
        if not wasteful and not tiles.unfit(one, weight, rows, target):
            yield one


@dataclass
class Measured:
    """Times of tiles in microseconds, the rule's first; and why others were dropped."""

    rule: Tiles
    times: dict[Tiles, float] = field(default_factory=dict)
    dropped: dict[Tiles, str] = field(default_factory=dict)

    @property
    def best(self) -> Tiles:
        """The fastest; the rule's unless another one is faster by more than noise."""
        fastest = min(self.times, key=lambda one: self.times[one])
        return fastest if self.times[fastest] < BETTER * self.times[self.rule] else self.rule

    def entry(self) -> tables.Entry:
        """What a table keeps."""
        sizes = {name: getattr(self.best, name) for name in tiles.SIZES}
        return tables.Entry(**sizes, us=round(self.times[self.best], 3), rule_us=round(self.times[self.rule], 3))

    def __str__(self) -> str:
        shown = {name: getattr(self.best, name) for name in tiles.SIZES}
        words = " ".join(f"{name} {value}" for name, value in shown.items())
        text = f"{words}: {self.times[self.best]:.1f} us, {self.times[self.rule]:.1f} by rule, {len(self.times)} tried"
        dropped = [f"; dropped {dataclasses.astuple(one)[1:]}: {why}" for one, why in self.dropped.items()]
        return text + "".join(dropped)


def measure(weight: Weight, rows: int, target: Target, device: str, timer: Timer = microseconds) -> Measured:
    """Time tiles for as many ``rows`` as have the same key, of random numbers, with as many weights as no cache holds.

    Tiles that do not compile or run, or whose result is not that of the rule's, are dropped. Raises whatever the rule's
    raise, and torch.OutOfMemoryError where there is no room for the weights.
    """
    from .samples import products

    rows = weight.most(rows)
    calls = products(weight, rows, target, device)
    found = Measured(tiles.rule(weight, rows, target))
    expected, around = None, found.rule
    waiting = [found.rule]
    while waiting:
        for one in waiting:
            with tiles.decided_by(lambda *_, one=one: one):
                try:
                    result = calls[0]()
                    if expected is None:
                        expected = result
                    if wrong := _difference(result, expected):
                        found.dropped[one] = wrong
                        continue
                    found.times[one] = timer(calls)
                except Exception as error:  # of Triton's compiler, of ptxas, of the driver
                    if one == found.rule:
                        raise
                    found.dropped[one] = f"{type(error).__name__}: {_first_line(error)}"
        best = min(found.times, key=lambda one: found.times[one])
        if found.times[best] >= BETTER * found.times[around] and len(found.times) > 1:
            break
        around = best
        seen = {*found.times, *found.dropped}
        waiting = [one for one in dict.fromkeys(neighbours(around, weight, rows, target)) if one not in seen]
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160]


def _difference(result: Tensor, expected: Tensor) -> str:
    error = ((result.float() - expected.float()).norm() / expected.float().norm()).item()
    return "" if error < SAME else f"its result is off by {error:.2g}"


# ----------------------------------------------------------------------------------------------- while graphs are made


def while_lowering() -> AbstractContextManager[None]:
    """The context in which a graph is lowered: with Inductor's ``max_autotune``, and a GPU, one that measures."""
    from torch._inductor import config

    return tiles.decided_by(_measured_now) if config.max_autotune and attached().device else nullcontext()


_FAILED: set[tuple[Weight, int, Target]] = set()


def _measured_now(weight: Weight, rows: int, target: Target) -> Tiles:
    """What a table has, after measuring it where none had it."""
    from torch.utils._python_dispatch import _disable_current_modes

    key, failed = weight.key(rows), (weight, weight.most(rows), target)
    wanted = target == attached() and failed not in _FAILED and is_measured(weight, rows)
    if wanted and tiles.tuned(weight, rows, target) is None:
        try:
            with _disable_current_modes(), torch.no_grad():  # real tensors and calls, in the midst of a trace
                found = measure(weight, rows, target, DEVICE, microseconds)
        except Exception as error:
            _FAILED.add(failed)
            tables.report(f"tiles for {key!r} were not tuned: {type(error).__name__}: {_first_line(error)}")
        else:
            tables.report(f"tuned {key!r} on {target.device}: {found}")
            tables.remember(target, {key: found.entry()})
    return tiles.known(weight, rows, target)
