"""Round to nearest: no calibration data, the scales come from the weights alone."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..errors import ConfigError
from ..numerics import quantize_weight
from ..observers import Needs, Statistics
from ..types import PackedWeight, Scheme


class RoundToNearest:
    """``observer="mse"`` searches, per group, the shrunk range with the least squared error (slower, a little better).

    The scale rules are those of ``numerics.quantize_weight``.
    """

    name = "rtn"
    options: ClassVar[dict[str, tuple[str, ...]]] = {"observer": ("minmax", "mse")}

    def check(self, options: dict[str, object]) -> None:
        """Raise ConfigError for an option that does not exist or has a wrong value."""
        for key, value in options.items():
            if key not in self.options:
                raise ConfigError(f"method 'rtn' has no option {key!r}. Known: {', '.join(self.options)}.")
            if value not in self.options[key]:
                raise ConfigError(f"option {key!r} of method 'rtn' must be one of {self.options[key]}, not {value!r}")

    def refuses(self, scheme: Scheme) -> str:
        """Everything can be rounded to."""
        return ""

    def needs(self, scheme: Scheme, options: dict[str, object]) -> Needs:
        """Nothing."""
        return Needs()

    def quantize(
        self, weight: Tensor, scheme: Scheme, options: dict[str, object], statistics: Statistics | None = None
    ) -> PackedWeight:
        """Quantize a float weight [out, in] or [experts, out, in]."""
        return quantize_weight(weight, scheme, observer=str(options.get("observer", "minmax")))


METHOD = RoundToNearest()
