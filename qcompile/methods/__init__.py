"""Algorithms that choose the codes of a weight, one module each; its ``METHOD`` is an object of this kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
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
        self,
        weight: Tensor,
        scheme: Scheme,
        options: dict[str, object],
        statistics: Statistics | None = None,
        dtype: torch.dtype | None = None,
    ) -> PackedWeight:
        """Quantize a float weight [out, in], or [experts, out, in] if this method needs nothing.

        statistics: of the site's inputs, with what was asked for; of one expert where there are several (the method is
        called once for each), and None if nothing was asked for. dtype: of the scales (default: the weight's). What
        belongs to the activations, such as their static scale, is not the method's: ``scheme`` then leaves them float,
        and the result is completed by the caller.
        """
        ...


@dataclass(frozen=True)
class Reader:
    """A weight float32 [out, in], of a Linear or of one expert, that is to be quantized, and what it reads."""

    weight: Tensor
    scheme: Scheme
    statistics: Statistics


class SmoothingMethod(Method, Protocol):
    """A method that scales what weights read before they are quantized: ``x / s`` and ``W * s``.

    Its needs say ``smoothing=True`` (and rows). Where ``s`` can go is found elsewhere, in the graph.
    """

    def smooth(
        self, readers: Sequence[Reader], shared: Callable[[Tensor], Tensor], options: dict[str, object]
    ) -> Tensor | None:
        """The scale float32 [in], positive, of a value that ``readers`` read; None leaves it as it is.

        ``shared`` makes columns equal that must be. All readers are quantized by this method.
        """
        ...


class Block(Protocol):
    """A decoder block whose sites are to be quantized together, by what the block as a whole computes.

    weights   of each site: float [out, in], or [experts, out, in]; schemes: theirs; dtypes: of their scales
    batches   how many sets of inputs there are
    """

    weights: Mapping[str, Tensor]
    schemes: Mapping[str, Scheme]
    dtypes: Mapping[str, torch.dtype]
    batches: int

    def loss(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Mean squared error of what the block computes from quantized inputs with other ``weights``, against the float
        model; as a share of the mean square. Gradients reach the weights.
        """
        ...


class BlockMethod(Method, Protocol):
    """A method that quantizes the sites of a block together; its needs say ``blocks=True``, and ``drift``."""

    def tune(self, block: Block, options: dict[str, object]) -> dict[str, PackedWeight]:
        """The quantized weights of all sites of ``block``, with float activations."""
        ...


def check_options(name: str, options: Mapping[str, Any], choices: Mapping[str, tuple[Any, ...]]) -> None:
    """ConfigError for an option of the method ``name`` that is not among ``choices``, or has no such value."""
    from ..errors import ConfigError

    for key, value in options.items():
        if key not in choices:
            raise ConfigError(f"method {name!r} has no option {key!r}. Known: {', '.join(choices)}.")
        if value not in choices[key] or isinstance(value, bool) != isinstance(choices[key][0], bool):
            raise ConfigError(f"option {key!r} of method {name!r} must be one of {choices[key]}, not {value!r}")
