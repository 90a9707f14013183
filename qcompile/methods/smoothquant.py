"""SmoothQuant: move what makes activations hard to quantize into the weights (arXiv 2211.10438).

For a value x that some weights W read: ``x / s`` and ``W * s`` with ``s = max|x| ** a / max|W| ** (1 - a)``. a is
searched for the least error of the products of quantized activations and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..observers import Needs, Statistics
from ..types import PackedWeight, Scheme
from . import Reader, check_options
from ._aim import aimed
from ._smoothing import best_scale
from .awq import ROWS, round_in_ranges
from .gptq import METHOD as GPTQ


class SmoothQuant:
    """Options, the default first:

    rounding  "nearest", in the best range of each group; "gptq" rounds what was scaled by method gptq
    """

    name = "smoothquant"
    choices: ClassVar = {"rounding": ("nearest", "gptq")}

    def check(self, options: dict[str, object]) -> None:
        """Raise ConfigError for an option that does not exist or has a wrong value."""
        check_options(self.name, options, self.choices)

    def refuses(self, scheme: Scheme, options: dict[str, object]) -> str:
        """Weights and activations must be integers."""
        if scheme.activation is None:
            return "its activations are float: there is nothing to smooth (method 'awq' scales for the weights' sake)"
        return "" if scheme.weight.number == "int" else f"it is for integers, not for {scheme.weight.number}"

    def needs(self, scheme: Scheme, options: dict[str, object]) -> Needs:
        """Some inputs, that come from what is quantized already."""
        return Needs(rows=ROWS, hessian=True, sequential=True, drift=True, smoothing=True)

    def smooth(
        self, readers: Sequence[Reader], shared: Callable[[Tensor], Tensor], options: dict[str, object]
    ) -> Tensor | None:
        """The scale [in] with the least error; None where none helps."""
        inputs = torch.stack([torch.maximum(r.statistics.high, -r.statistics.low) for r in readers]).amax(0)
        weights = torch.stack([reader.weight.abs().amax(0) for reader in readers]).amax(0)
        inputs, weights = inputs.clamp(min=1e-5), weights.clamp(min=1e-5)
        return best_scale(readers, [lambda share: inputs.pow(share) / weights.pow(1 - share)], shared)

    def quantize(
        self,
        weight: Tensor,
        scheme: Scheme,
        options: dict[str, object],
        statistics: Statistics | None = None,
        dtype: torch.dtype | None = None,
    ) -> PackedWeight:
        """Round a float weight [out, in], scaled already."""
        assert statistics is not None
        if options.get("rounding") == "gptq":
            return GPTQ.quantize(weight, scheme, {}, statistics, dtype)
        return round_in_ranges(aimed(weight, statistics), scheme, statistics, dtype or weight.dtype, True)


METHOD = SmoothQuant()
