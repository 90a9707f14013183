"""Round to nearest: no calibration data, the scales come from the weights alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..numerics import quantize_weight
from ..observers import Needs, Statistics
from ..types import PackedWeight, Scheme


class RoundToNearest:
    """Options, the default first:

    observer  "minmax" takes the range of each group, "mse" searches the scale with the least squared error (slower, a
              little better)
    codes     "full" uses all codes of symmetric integers (-8 .. 7), "narrow" leaves out the lowest (-7 .. 7)

    The rules are those of ``numerics.quantize_weight``.
    """

    name = "rtn"
    options: ClassVar[dict[str, tuple[str, ...]]] = {"observer": ("minmax", "mse"), "codes": ("full", "narrow")}

    def check(self, options: dict[str, object]) -> None:
        """Raise ConfigError for an option that does not exist or has a wrong value."""
        for key, value in options.items():
            if key not in self.options:
                raise ConfigError(f"method 'rtn' has no option {key!r}. Known: {', '.join(self.options)}.")
            if value not in self.options[key]:
                raise ConfigError(f"option {key!r} of method 'rtn' must be one of {self.options[key]}, not {value!r}")

    def refuses(self, scheme: Scheme, options: dict[str, object]) -> str:
        """Narrow codes are for symmetric integers; a scale of the whole tensor is not searched."""
        weight = scheme.weight
        if options.get("codes") == "narrow" and (weight.number != "int" or not weight.symmetric):
            return "codes='narrow' leaves out the lowest code of symmetric integers, and it has none"
        if options.get("observer") == "mse" and weight.per_tensor:
            return "observer='mse' searches the scales of groups, not one for a whole tensor"
        return ""

    def needs(self, scheme: Scheme, options: dict[str, object]) -> Needs:
        """Nothing."""
        return Needs()

    def quantize(
        self,
        weight: Tensor,
        scheme: Scheme,
        options: dict[str, object],
        statistics: Statistics | None = None,
        dtype: torch.dtype | None = None,
    ) -> PackedWeight:
        """Quantize a float weight [out, in] or [experts, out, in]."""
        observer, codes = (str(options.get(name, values[0])) for name, values in self.options.items())
        return quantize_weight(weight, scheme, scale_dtype=dtype, observer=observer, codes=codes)


METHOD = RoundToNearest()
