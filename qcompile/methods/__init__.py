"""Algorithms that choose the codes of a weight, one module each; its ``METHOD`` is an object of this kind."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..observers import Needs, Statistics
from ..types import PackedWeight, Scheme


class Method(Protocol):
    """What ``QuantConfig(method=...)`` names."""

    name: str

    def check(self, options: dict[str, object]) -> None:
        """Raise ConfigError for an option that does not exist or has a wrong value."""
        ...

    def refuses(self, scheme: Scheme, options: dict[str, object]) -> str:
        """Why this method cannot make such weights with such options; "" when it can."""
        ...

    def needs(self, scheme: Scheme, options: dict[str, object]) -> Needs:
        """What must be known of a site's inputs; ``Needs()`` when the weight is enough."""
        ...

    def quantize(
        self, weight: Tensor, scheme: Scheme, options: dict[str, object], statistics: Statistics | None = None
    ) -> PackedWeight:
        """Quantize a float weight [out, in], or [experts, out, in] if this method needs nothing.

        statistics: of the site's inputs, with what was asked for; of one expert where there are several (the method is
        called once for each), and None if nothing was asked for. What belongs to the activations, such as their static
        scale, is not the method's: ``scheme`` then leaves them float, and the result is completed by the caller.
        """
        ...
