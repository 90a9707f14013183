"""What calibration collects of a site's inputs, and the parameters of activations that follow from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .numerics import dequantize_activation, dequantize_packed, quantize_activation
from .small_floats import E4M3_MAX, nvfp4_outer
from .types import ActivationType, PackedWeight, Scheme


@dataclass(frozen=True)
class Needs:
    """What somebody must know of a site's inputs; ``a | b`` is what satisfies both, ``Needs()`` is nothing.

    ranges      count of tokens, minimum and maximum per channel (collected with everything else, too)
    hessian     X.T @ X of all inputs X [tokens, in], in float32
    rows        at least so many of the inputs themselves, evenly spaced (all of them if there are fewer)
    sequential  the inputs come from what is quantized already, not from the float model
    drift       also how far the inputs of a Linear, or of the up projections of experts, are from those of the float
                model (with ``sequential``)
    blocks      the method quantizes the sites of a decoder block together (``methods.BlockMethod``)
    smoothing   the method scales what the site reads first, where that can be (``methods.SmoothingMethod``)
    """

    ranges: bool = False
    hessian: bool = False
    rows: int = 0
    sequential: bool = False
    drift: bool = False
    blocks: bool = False
    smoothing: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.ranges or other.ranges,
            self.hessian or other.hessian,
            max(self.rows, other.rows),
            self.sequential or other.sequential,
            self.drift or other.drift,
            self.blocks or other.blocks,
            self.smoothing or other.smoothing,
        )

    def __bool__(self) -> bool:
        return self != Needs()


CLIP_ROWS = 256
"""Inputs per site, or per expert, on which an activation clip is searched."""


def activation_needs(scheme: Scheme | None) -> Needs:
    """What the stored parameters of a scheme's activations are made from."""
    activation = scheme.activation if scheme else None
    if activation is None:
        return Needs()
    return Needs(ranges="input_scale" in activation.params, rows=CLIP_ROWS if activation.clip else 0)


def shared_rounding(schemes: Iterable[Scheme | None]) -> ActivationType | None:
    """What sites of these schemes round the one value that they read to; None if not alike, or by stored parameters."""
    found = {scheme.activation if scheme else None for scheme in schemes}
    activation = found.pop()
    return activation if activation is not None and not found and not activation.params else None


class Statistics:
    """What was seen of the inputs [tokens, features] of one Linear, or of one expert.

    count       tokens; low, high: float32 [features], infinite before the first token; mean: of |x|, float32 [features]
    hessian     float32 [features, features], the sum of x.T @ x, or None if nobody asked
    drift       float32 [features, features], the sum of (f - x).T @ x where f are the inputs of the float model; None
                if nobody asked, or they are not known
    memo        what methods derived from it, for the next weight that reads the same

    activation: what the site rounds its inputs to, by rules that need no stored parameters. Then x is what was rounded,
    everywhere but in the ranges and the mean: a weight can make up for some of that error, too.
    """

    def __init__(
        self,
        needs: Needs,
        features: int,
        device: torch.device | str = "cpu",
        activation: ActivationType | None = None,
    ) -> None:
        self.needs, self.count, self.activation = needs, 0, activation
        self.low = torch.full((features,), torch.inf, device=device)
        self.high = torch.full((features,), -torch.inf, device=device)
        self.hessian = torch.zeros((features, features), device=device) if needs.hessian else None
        self.drift: Tensor | None = None
        self.memo: dict[Any, Any] = {}
        self._total = torch.zeros(features, dtype=torch.float64, device=device)
        self._kept: list[Tensor] = []
        self._stride = 1

    def update(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Count the inputs ``x`` [..., features]; a NaN stays visible in the range.

        exact: the inputs of the float model for the same tokens, in the shape of ``x``.
        """
        x = x.reshape(-1, x.shape[-1])
        if not len(x):
            return
        low, high = torch.aminmax(x, dim=0)
        self.low = torch.minimum(self.low, low.float())
        self.high = torch.maximum(self.high, high.float())
        self._total += x.abs().sum(0, dtype=torch.float32)
        if self.activation is not None:
            x = dequantize_activation(quantize_activation(x, self.activation), self.activation).to(x.dtype)
        if self.hessian is not None:
            values = x.float()
            self.hessian.addmm_(values.T, values)
        if self.needs.drift and exact is not None:
            self.drift = torch.zeros(x.shape[1], x.shape[1], device=x.device) if self.drift is None else self.drift
            self.drift.addmm_((exact.reshape(x.shape).float() - x.float()).T, x.float())
        if self.needs.rows:
            self._keep(x)
        self.count += len(x)

    def _keep(self, x: Tensor) -> None:
        """Keep each ``stride``-th input since the first one; double the stride when that is twice the number asked."""
        self._kept.append(x[-self.count % self._stride :: self._stride].clone())
        while sum(map(len, self._kept)) >= 2 * self.needs.rows:
            self._kept = [torch.cat(self._kept)[::2].clone()]
            self._stride *= 2

    @property
    def mean(self) -> Tensor:
        """Mean magnitude of each feature, float32 [features]."""
        return (self._total / max(1, self.count)).float()

    @property
    def rows(self) -> Tensor:
        """The inputs that were kept: [rows, features], in the dtype of the inputs."""
        return torch.cat(self._kept) if self._kept else self.low.new_empty(0, len(self.low))

    @property
    def is_finite(self) -> bool:
        """Whether at least one input was seen, and none of them was NaN or infinite."""
        return bool(torch.isfinite(self.low).all() and torch.isfinite(self.high).all())


def static_parameters(low: Tensor, high: Tensor, activation: ActivationType) -> dict[str, Tensor]:
    """The stored parameters of activations seen between ``low`` and ``high``: ``input_scale`` float32 [1] and, where
    they have a zero point, ``input_zero`` int32 [1].

    With ``top`` = 127 for 8 bits, and a range that is extended to include 0, as Ascend's static W8A8 has it:

    with a zero point    scale = (high - low) / (2 top + 1), zero = round(-top - 1 - low / scale)
    symmetric integers   scale = max(-low, high) / top
    fp8                  scale = max(-low, high) / 448, the largest e4m3 number
    nvfp4                448 * 6 / max(-low, high), by which the scales of its groups are divided

    Integer codes are ``clamp(round(x / scale) + zero, -top - 1, top)`` and stand for ``(code - zero) * scale``.
    """
    low, high = low.float().min().clamp(max=0), high.float().max().clamp(min=0)
    top = 2 ** (activation.bits - 1) - 1
    if activation.number == "nvfp4":
        return {"input_scale": nvfp4_outer(torch.maximum(-low, high)).reshape(1)}
    if activation.symmetric:
        largest = E4M3_MAX if activation.number == "fp8" else float(top)
        return {"input_scale": _positive(torch.maximum(-low, high) / largest)}
    scale = _positive((high - low) / (2 * top + 1))
    zero = torch.round(-top - 1 - low / scale).clamp(-top - 1, top)
    return {"input_scale": scale, "input_zero": zero.to(torch.int32).reshape(1)}


def _positive(scale: Tensor) -> Tensor:
    """[1]; one where nothing but zeros was seen, and never so small that its inverse is infinite."""
    smallest = torch.finfo(torch.float32).tiny
    return torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=smallest)).reshape(1)


def search_clip(rows: Tensor, weight: Tensor, packed: PackedWeight, activation: ActivationType) -> float:
    """The clip ``alpha`` in (0, 1] with the least squared error of the product with inputs ``rows`` [rows, in].

    A row x is clamped to ``alpha * max|x|`` before it is quantized, as ``numerics.quantize_activation`` has it; its
    product with the quantized weight is compared with that of the float ``weight`` [out, in]. Tried: 1, 0.95 ... 0.2.
    """
    exact = rows.float() @ weight.float().T
    restored = dequantize_packed(packed, torch.float32).T
    best, least = 1.0, float("inf")
    for step in range(20, 3, -1):
        clipped = quantize_activation(rows, activation, [torch.tensor([step / 20], device=rows.device)])
        product = dequantize_activation(clipped, activation).float() @ restored
        error = (product - exact).square().sum().item()
        if error < least:
            best, least = step / 20, error
    return best
