"""One file per checkpoint format. Each holds ``FORMAT``, and is the only place that knows that format's disk layout.

A format reads its tensors into the one canonical ``PackedWeight`` and writes them back. It sees names, headers and
tensors, never files: ``qcompile.checkpoint`` opens, streams, checks and renames those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ..types import PackedWeight, Scheme

Shape = tuple[int, int]


@dataclass(frozen=True)
class TensorHeader:
    """Name, safetensors dtype ("BF16", "I32" ...), shape and file of one stored tensor; its data is not read."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class StoredSite:
    """One quantized module as it lies on disk.

    ``tensors`` are the full names of what ``Format.read`` consumes (or ``Format.write`` gave), the bias excluded.
    ``layout`` holds what else the format must remember to read them; of a written one, whether it is "permuted".
    """

    name: str
    scheme: Scheme
    shape: Shape  # (out_features, in_features)
    tensors: tuple[str, ...]
    layout: Mapping[str, Any] = field(default_factory=dict)


class Format(Protocol):
    """How one format is recognised, read, written and described.

    side_files: JSON files with a copy of the quantization section. ``save`` writes the first; ``load`` looks for all of
    them where config.json has no such section, and takes the format's name for a missing quant_method.
    """

    name: str
    side_files: tuple[str, ...]

    def detect(self, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> bool:
        """Whether a checkpoint with this config.json and these tensors is in this format."""
        ...

    def sites(
        self, config: Mapping[str, Any], headers: Mapping[str, TensorHeader], linears: Mapping[str, Shape]
    ) -> tuple[StoredSite, ...]:
        """Every quantized module, from config and headers alone.

        linears: shape [out, in] of every Linear of the float model, by module name. It says what a target such as
        "Linear" means, and the number of input features, which packed tensors only bound. FormatError names file and
        tensor of a contradiction between config, headers and model; UnsupportedError names module and reason.
        """
        ...

    def read(self, site: StoredSite, get: Callable[[str], Tensor]) -> PackedWeight:
        """The canonical weight of ``site``; ``get`` loads a tensor by its stored name."""
        ...

    def refuses(self, scheme: Scheme, shape: Shape, packed: PackedWeight | None = None) -> str:
        """Why this format cannot express a scheme of such a shape (or this weight); "" when it can."""
        ...

    def write(self, name: str, packed: PackedWeight) -> dict[str, Tensor]:
        """The tensors that store ``packed`` for the module ``name``, by full name."""
        ...

    def quantization_config(self, sites: Sequence[StoredSite], float_modules: Sequence[str]) -> dict[str, Any]:
        """What goes into config.json under "quantization_config", for the sites that were written.

        float_modules: names of the Linears that were left float. Called before anything is written as well, without
        tensors: UnsupportedError for schemes that cannot be described together.
        """
        ...
