"""One file per checkpoint format. Each holds ``FORMAT``, and is the only place that knows that format's disk layout.

A format reads its tensors into the one canonical ``PackedWeight`` and writes them back. It sees names, headers and
tensors, never files: ``qcompile.checkpoint`` opens, streams, checks and renames those. It sees Linears, never experts:
on disk every expert has its own, which ``qcompile.parts`` puts together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..types import PackedWeight, Scheme

Shape = tuple[int, ...]  # [out, in]
Get = Callable[..., Tensor]  # of a stored name, and maybe an index of its first dimension


@dataclass(frozen=True)
class TensorHeader:
    """Name, safetensors dtype ("BF16", "I32" ...), shape and file of one stored tensor; its data is not read."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class StoredSite:
    """One quantized Linear as it lies on disk; one of the Linears of an expert is such a one as well.

    ``tensors`` are the full names of what the format reads (or wrote); ``owns_bias`` says that the bias is among them,
    else ``<name>.bias`` is a plain tensor. ``layout`` holds what else the format must remember to read them; of a
    written one, whether it is "permuted". ``note`` tells the user what is not as the file has it.
    """

    name: str
    scheme: Scheme
    shape: Shape  # (out_features, in_features)
    tensors: tuple[str, ...]
    layout: Mapping[str, Any] = field(default_factory=dict)
    owns_bias: bool = False
    note: str = ""


class Format:
    """How one format is recognised, read, written and described.

    side_files: names (or patterns) of JSON files with the quantization section. ``save`` writes the first, ``load``
    looks for all of them where config.json has no such section, and takes the format's name for a missing
    quant_method. in_config: whether config.json holds the section too. stem: how tensor files are called.
    stores_norm_biases: whether norms may have a bias that their class does not have.
    """

    name: str
    side_files: tuple[str, ...] = ()
    in_config = True
    stem = "model"
    stores_norm_biases = False

    def detect(self, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> bool:
        """Whether a checkpoint with this config.json and these tensors is in this format."""
        raise NotImplementedError

    def sites(
        self,
        config: Mapping[str, Any],
        headers: Mapping[str, TensorHeader],
        linears: Mapping[str, Shape],
        experts: Collection[str] = (),
    ) -> tuple[StoredSite, ...]:
        """Every quantized module, from config and headers alone.

        linears: shape [out, in] of every Linear of the float model, by its name on disk. It says what a target such as
        "Linear" means, and the number of input features, which packed tensors only bound. experts: those of them that
        belong to an expert. FormatError names file and tensor of a contradiction between config, headers and model;
        UnsupportedError names module and reason.
        """
        raise NotImplementedError

    def read(self, site: StoredSite, get: Get) -> PackedWeight:
        """The canonical weight of ``site``; ``get`` loads a tensor by its stored name, or one slice of it."""
        raise NotImplementedError

    def read_bias(self, site: StoredSite, get: Get) -> Tensor | None:
        """The bias of a site that owns it, None where there is none."""
        return None

    def order_of(self, site: StoredSite) -> str:
        """How stored matrices lie, for reading a part of them: "oi" [out ..., in ...], "io" the other way round; "" for
        outputs and inputs that are interleaved, so that a part is cut from the whole weight. Vectors are along the
        outputs, ``g_idx`` along the inputs; either may be packed, grouped or of length one.
        """
        return "oi"

    def unneeded(self, site: StoredSite, columns: bool) -> frozenset[str]:
        """Last parts of the names of tensors that a part of ``site`` (with ``columns``: not all inputs) does without,
        since they are sums over all inputs that nothing is computed with.
        """
        return frozenset()

    def added_tensors(self, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> Mapping[str, str]:
        """Stored names, by names in the model, of tensors that norms and float Linears have beyond the float model's.

        ``<norm>.bias`` is added to what the norm gives; ``<norm>.weight`` may be stored under another name.
        """
        return {}

    def refuses(self, scheme: Scheme, shape: Shape, packed: PackedWeight | None = None) -> str:
        """Why this format cannot express a scheme of such a shape (or this weight); "" when it can."""
        raise NotImplementedError

    def write(self, name: str, packed: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """The tensors that store ``packed`` for the module ``name``, which computes in ``dtype``, by full name."""
        raise NotImplementedError

    def write_bias(self, name: str, packed: PackedWeight, bias: Tensor | None) -> dict[str, Tensor]:
        """The tensors that store its float bias, if it has one."""
        return {} if bias is None else {f"{name}.bias": bias}

    def quantization_config(
        self, sites: Sequence[StoredSite], float_modules: Sequence[str], floats: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The quantization section, for the sites that were written.

        float_modules: modules with a weight matrix that were left float, such as Linears and routers. floats: names of
        all float tensors. Called before anything is written as well, without tensors: UnsupportedError for schemes that
        cannot be described together.
        """
        raise NotImplementedError
