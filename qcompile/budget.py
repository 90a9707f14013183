"""Mixed precision: bits go where they matter most, until a budget is spent.

How much a site matters is measured: it alone is rounded to the fewest bits, and what the model then predicts is
compared with what it predicts without. For more bits that divergence shrinks as the squared error of the weight does.
Divergences of sites add up, as small ones nearly do, so that one step after the other can buy the most divergence for
a byte: the way from the smallest to the largest plan is the frontier, and the budget says where to stop on it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CalibrationError, ConfigError
from .numerics import dequantize_packed, quantize_weight
from .progress import progress_bar
from .types import FrontierPoint, Plan, PlannedSite, Scheme, Sensitivity

BITS = (2, 3, 4, 5, 6, 8)
_UNITS = {"kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_TOKENS = 4096  # on which divergences are measured


@dataclass(frozen=True)
class Budget:
    """Bits per quantized weight, scales and zero points included; or bytes of the whole model."""

    bits: float | None = None
    nbytes: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """ "4.5 bits" or "1.2 GB"; ConfigError for anything else."""
        match = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*(bits?|{'|'.join(_UNITS)})\s*", text)
        if not match or float(match[1]) == 0:
            raise ConfigError(f"a budget is bits per weight or bytes in all, as '4.5 bits' or '1.2 GB', not {text!r}")
        value = float(match[1])
        return cls(bits=value) if match[2].startswith("bit") else cls(nbytes=value * _UNITS[match[2]])

    def room(self, plan: Plan) -> float:
        """Bytes, as ``size`` counts them, that the quantized sites of a plan may have in all."""
        if self.nbytes is not None:
            return self.nbytes - (plan.bytes_after - sum(p.bytes_after for p in plan.quantized))
        assert self.bits is not None
        return self.bits * _weights(plan) / 8

    def size(self, planned: PlannedSite) -> float:
        """Bytes of a site: in the layout of its kernel where memory is the budget, else as a checkpoint stores it."""
        return planned.bytes_after if self.nbytes is not None else stored_bytes(planned)

    def __str__(self) -> str:
        return f"{self.bits:g} bits" if self.nbytes is None else f"{self.nbytes / 1000**2:g} MB"


def stored_bytes(planned: PlannedSite) -> int:
    """Bytes of codes, scales and zero points of a site in the canonical layout."""
    site, scheme = planned.site, planned.scheme
    assert scheme is not None
    weight, (*experts, out, inn) = scheme.weight, site.shape
    groups = weight.groups(inn) * (site.dtype.itemsize + (not weight.symmetric))
    return math.prod(experts) * out * (math.ceil(inn * weight.bits / 8) + groups)


def bits_of(plan: Plan) -> float:
    """Mean bits of the weights that a plan quantizes, with the scales and zero points that are stored beside them."""
    return 8 * sum(map(stored_bytes, plan.quantized)) / max(1, _weights(plan))


def _weights(plan: Plan) -> int:
    return sum(math.prod(p.site.shape) for p in plan.quantized)


def ladder(scheme: str) -> list[str]:
    """The schemes among which a budget chooses: that of the config with fewer and more bits."""
    parsed = Scheme.parse(scheme)
    if parsed.weight.number != "int":
        raise ConfigError(f"a budget is spent on integers of 2 to 8 bits; {scheme} has {parsed.weight.number} weights")
    return [str(dataclasses.replace(parsed, weight=dataclasses.replace(parsed.weight, bits=bits))) for bits in BITS]


def alternatives(plans: Sequence[Plan]) -> dict[str, list[PlannedSite]]:
    """Of every site that ``plans``, from fewest to most bits, plan differently: what it can be, in that order."""
    found: dict[str, list[PlannedSite]] = {}
    for places in zip(*plans, strict=True):
        choices = {str(p.scheme): p for p in places if p.scheme is not None}
        if len(choices) > 1:
            found[places[0].site.name] = list(choices.values())
    return found


def check(budget: Budget, smallest: Plan) -> None:
    """ConfigError when even the smallest plan is above the budget."""
    if sum(map(budget.size, smallest.quantized)) > budget.room(smallest):
        raise ConfigError(
            f"the budget of {budget} is below the smallest plan: {bits_of(smallest):.2f} bits per weight, "
            f"{smallest.bytes_after / 1000**2:.1f} MB with all that stays float"
        )


def measure(
    call: nn.Module,
    choices: Mapping[str, Sequence[PlannedSite]],
    weight_of: Callable[[PlannedSite], Tensor],
    inputs: Sequence[tuple[Any, ...]],
    is_language_model: bool,
    progress: bool | None = None,
) -> dict[str, list[float]]:
    """Divergence that each choice of each site causes: KL in nats per token, or the relative squared error of outputs.

    call: the model as a function of positional inputs. Its weights are as they were afterwards.
    """
    used, count = [], 0
    for given in inputs:
        used.append(given)
        count += next((x[..., 0].numel() if x.is_floating_point() else x.numel() for x in given), 0)
        if count >= _TOKENS:
            break
    with torch.no_grad(), _evaluating(call):
        exact = [_outputs(call(*given), is_language_model) for given in used]
        found: dict[str, list[float]] = {}
        with progress_bar("measuring", len(choices), progress) as advance:
            for name, planned in choices.items():
                weight = weight_of(planned[0])
                kept = weight.clone()
                errors = []
                for choice in planned[::-1]:
                    assert choice.scheme is not None
                    packed = quantize_weight(kept, Scheme(choice.scheme.weight))
                    restored = dequantize_packed(packed, torch.float32)
                    errors.append((restored - kept.float()).square().sum().item())
                errors.reverse()
                try:
                    weight.copy_(restored)  # of the fewest bits
                    divergence = sum(
                        _divergence(_outputs(call(*given), is_language_model), wanted, is_language_model)
                        for given, wanted in zip(used, exact, strict=True)
                    ) / len(used)
                finally:
                    weight.copy_(kept)
                if not math.isfinite(divergence):
                    raise CalibrationError(
                        f"the model computes NaN or infinite values on the calibration data, with {name} as "
                        f"{planned[0].scheme}: load it in bfloat16 or float32"
                    )
                found[name] = [divergence * error / errors[0] if errors[0] else 0.0 for error in errors]
                advance(name)
    return found


def sensitivities(
    choices: Mapping[str, Sequence[PlannedSite]], divergences: Mapping[str, Sequence[float]]
) -> tuple[Sensitivity, ...]:
    """What ``measure`` found, for the report."""
    return tuple(
        Sensitivity(name, tuple((str(p.scheme), cost) for p, cost in zip(own, divergences[name], strict=True)))
        for name, own in choices.items()
    )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while, without any module forgetting its own."""
    training = {inner: inner.training for inner in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for inner, mode in training.items():
            inner.training = mode


def _outputs(value: Tensor, is_language_model: bool) -> Tensor:
    return value.float().log_softmax(-1) if is_language_model else value.float()


def _divergence(found: Tensor, exact: Tensor, is_language_model: bool) -> float:
    if is_language_model:
        total = nn.functional.kl_div(found, exact, reduction="sum", log_target=True).item()
        return total / exact[..., 0].numel()
    return ((found - exact).square().sum() / exact.square().sum().clamp(min=1e-12)).item()


def spend(
    smallest: Plan,
    choices: Mapping[str, Sequence[PlannedSite]],
    divergences: Mapping[str, Sequence[float]],
    budget: Budget,
) -> tuple[Plan, tuple[FrontierPoint, ...]]:
    """The plan within ``budget`` of least divergence, and the frontier from the smallest plan to the largest.

    smallest: the first choice of every site, within the budget.
    """
    at = dict.fromkeys(choices, 0)
    room = budget.room(smallest) - sum(map(budget.size, smallest.quantized))
    frontier: list[FrontierPoint] = []
    plan = chosen = smallest
    for unlimited in (False, True):
        while True:
            total = sum(divergences[name][place] for name, place in at.items())
            frontier.append(FrontierPoint(plan.bytes_after, bits_of(plan), total))
            step = _best_step(choices, divergences, at, budget, math.inf if unlimited else room)
            if step is None:
                break
            name, place = step
            room -= budget.size(choices[name][place]) - budget.size(choices[name][at[name]])
            at[name] = place
            sites = tuple(choices[name][place] if p.site.name == name else p for p in plan)
            plan = dataclasses.replace(plan, sites=sites)
        if not unlimited:
            chosen, end = plan, len(frontier) - 1
            frontier.pop()  # the second round begins with it
    return chosen, tuple(dataclasses.replace(point, chosen=index == end) for index, point in enumerate(frontier))


def _best_step(
    choices: Mapping[str, Sequence[PlannedSite]],
    divergences: Mapping[str, Sequence[float]],
    at: Mapping[str, int],
    budget: Budget,
    room: float,
) -> tuple[str, int] | None:
    """The site, and its choice, that takes away the most divergence for a byte; None if none is within ``room``."""
    best, gain = None, 0.0
    for name, own in choices.items():
        now = at[name]
        for place in range(now + 1, len(own)):
            cost = budget.size(own[place]) - budget.size(own[now])
            rate = (divergences[name][now] - divergences[name][place]) / max(1, cost)
            if rate > gain and cost <= room:
                best, gain = (name, place), rate
    return best
