"""Gated activations by name: what stands between the two products of an MLP or of an expert.

    silu    gelu_tanh    relu2:ungated    silu:alpha=1.702:limit=7.0:shift=1.0

A name is a function, then settings. ``ungated``: the function alone, without a second half that it multiplies.
``alpha``: silu is ``x * sigmoid(alpha * x)``. ``limit``: gate is clamped from above, up from both sides. ``shift`` is
added to up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ConfigError, did_you_mean

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class Gate:
    """A parsed name. ``limit`` None: no clamp."""

    function: str
    is_gated: bool = True
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0

    def __str__(self) -> str:
        settings = [] if self.is_gated else ["ungated"]
        settings += [f"alpha={self.alpha}"] if self.alpha != 1.0 else []
        settings += [f"limit={self.limit}"] if self.limit is not None else []
        settings += [f"shift={self.shift}"] if self.shift else []
        return ":".join([self.function, *settings])


@functools.cache
def parse(name: str) -> Gate:
    """ConfigError for a function or a setting that does not exist."""
    function, *settings = name.split(":")
    if function not in FUNCTIONS:
        raise ConfigError(f"unknown activation {function!r}.{did_you_mean(function, FUNCTIONS)}")
    values: dict[str, float] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in ("alpha", "limit", "shift", "ungated"):
            raise ConfigError(f"activation {name!r} has an unknown setting {key!r}")
        if key != "ungated":
            values[key] = float(value)
    return Gate(function, "ungated" not in settings, **values)


def up_rows(activation: str, intermediate: int) -> int:
    """Output features of the first product: gate and up together, or up alone."""
    return 2 * intermediate if parse(activation).is_gated else intermediate


def gated(hidden: Tensor, activation: str) -> Tensor:
    """The activation of rows [..., 2 * intermediate], gate first, or (ungated) [..., intermediate], in their dtype."""
    gate = parse(activation)
    if not gate.is_gated:
        return _function(gate, hidden)
    first, up = hidden.chunk(2, dim=-1)
    return gated_pair(first, up, activation)


def gated_pair(first: Tensor, up: Tensor, activation: str) -> Tensor:
    """``f(first) * up`` of a gated activation: gate and up projection [..., intermediate] each, in their dtype."""
    gate = parse(activation)
    if gate.limit is not None:
        first, up = first.clamp(max=gate.limit), up.clamp(-gate.limit, gate.limit)
    return _function(gate, first) * (up + gate.shift if gate.shift else up)


def _function(gate: Gate, x: Tensor) -> Tensor:
    if gate.alpha != 1.0:
        if gate.function != "silu":
            raise ConfigError(f"alpha goes with silu, not with {gate.function}")
        return x * torch.sigmoid(x * gate.alpha)
    return FUNCTIONS[gate.function](x)
