"""The search of a smoothing scale: which of some candidates leaves the least error in what its readers compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..activations import dequantize_activation, quantize_activation
from ..observers import static_parameters
from . import Reader
from ._ranges import rounded


def best_scale(
    readers: Sequence[Reader], candidates: Sequence[Tensor], shared: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """The candidate [in] with the least squared error of the readers' products, weighted by their tokens.

    Weights are rounded to nearest for the comparison, activations as the readers' schemes say. None if no candidate is
    better than no scale. Each candidate is divided by the root of its extremes first, so that its middle is 1.
    """
    scales = [shared((s / (s.max() * s.min()).sqrt()).clamp(1e-4, 1e4)) for s in candidates]
    losses = torch.zeros(len(scales) + 1, dtype=torch.float64)
    for reader in readers:
        loss = _loss(reader)
        losses += torch.tensor([loss(scale) for scale in [torch.ones_like(scales[0]), *scales]], dtype=torch.float64)
    best = int(torch.nan_to_num(losses, nan=torch.inf).argmin())
    return scales[best - 1] if best else None


def _loss(reader: Reader) -> Callable[[Tensor], float]:
    """The error of one reader as a function of the scale: of all tokens that it saw, by those that were kept."""
    weight, x = reader.weight, reader.statistics.rows.float()
    weight_type, activation = reader.scheme.weight, reader.scheme.activation
    tokens = reader.statistics.count / len(x)
    if activation is None:
        hessian = x.T @ x if len(x) > x.shape[1] else None

        def of_weight(scale: Tensor) -> float:
            error = rounded(weight * scale, weight_type) / scale - weight
            product = (error @ hessian * error) if hessian is not None else (x @ error.T).square()
            return product.sum().item() * tokens

        return of_weight
    exact = x @ weight.T

    def of_product(scale: Tensor) -> float:
        parameters: list[Tensor] = []
        if "input_scale" in activation.params:
            low, high = reader.statistics.low / scale, reader.statistics.high / scale
            parameters = list(static_parameters(low, high, activation).values())
        elif activation.clip:
            parameters = [torch.ones(1, device=x.device)]
        parts = quantize_activation(x / scale, activation, parameters)
        parts = parts if activation.dynamic else [*parts, *parameters]
        inputs = dequantize_activation(parts, activation).float()
        return (inputs @ rounded(weight * scale, weight_type).T - exact).square().sum().item() * tokens

    return of_product


def pooled_mean(readers: Sequence[Reader]) -> Tensor:
    """Mean magnitude of each input feature over all tokens that the readers saw."""
    total = sum(reader.statistics.count for reader in readers)
    return sum((r.statistics.mean * (r.statistics.count / total) for r in readers), torch.zeros(()))
