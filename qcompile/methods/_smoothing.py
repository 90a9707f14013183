"""The search of a smoothing scale: which of some candidates leaves the least error in what its readers compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..activations import dequantize_activation, quantize_activation
from ..observers import static_parameters
from . import Reader
from ._ranges import rounded

_ROWS = 512  # of a weight, evenly spaced, stand for all when scales are compared


def best_scale(
    readers: Sequence[Reader], kinds: Sequence[Callable[[float], Tensor]], shared: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """The scale [in] with the least squared error of the readers' products, weighted by their tokens.

    kinds: functions of a share from 0 to 1 whose values are tried, coarsely and then near the best of them. Weights are
    rounded to nearest for the comparison, activations as the readers' schemes say. None if no scale is better than
    none. Each scale is divided by the root of its extremes first, so that its middle is 1.
    """
    losses = [_loss(reader) for reader in readers]
    none = torch.ones_like(readers[0].weight[0])
    best, least = None, sum(loss(none) for loss in losses)
    chosen, places = (0, 0.5), [(kind, 0.2 * step) for kind in range(len(kinds)) for step in range(6)]
    for width in (0.1, 0.05, 0.0):
        for kind, share in places:
            scale = kinds[kind](share)
            scale = shared((scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4))
            error = sum(loss(scale) for loss in losses)
            if error < least:  # NaN never is
                best, least, chosen = scale, error, (kind, share)
        kind, share = chosen
        places = [(kind, near) for near in (share - width, share + width) if 0 <= near <= 1]
    return best


def _loss(reader: Reader) -> Callable[[Tensor], float]:
    """The error of one reader as a function of the scale: of all tokens that it saw, by those that were kept."""
    step = -(-len(reader.weight) // _ROWS)
    weight, x = reader.weight[::step], reader.statistics.rows.float()
    weight_type, activation = reader.scheme.weight, reader.scheme.activation
    tokens = reader.statistics.count / len(x) * (len(reader.weight) / len(weight))
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
