"""The fp8 checkpoints of DeepSeek, Qwen and transformers; read only, since compressed-tensors stores the same.

A Linear [out, in] has weight float8_e4m3 [out, in] and weight_scale_inv, by which codes are multiplied in spite of its
name: float32 [ceil(out / rows), ceil(in / columns)] of blocks (weight_block_size), or one number (also weight_scale).
Activations are quantized per token, beside blocks in groups of as many columns; with activation_scheme "static" by a
stored input_scale (activation_scale). Which tensors exist decides what is quantized.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, FormatError, UnsupportedError
from ..types import ActivationType, PackedWeight, Scheme, WeightType
from . import Format, Get, Shape, StoredSite, TensorHeader
from ._headers import FLOATS, Stored, by_module, check, every, finite
from ._qweight import section_of

_SCALES, _INPUTS = ("weight_scale_inv", "weight_scale"), ("input_scale", "activation_scale")
_ONE = ((1,), (), (1, 1))


class Fp8(Format):
    """Reads blocks and whole tensors, dynamic and static."""

    name = "fp8"

    def detect(self, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> bool:
        """Whether config.json says so."""
        return section_of(config).get("quant_method") == "fp8"

    def sites(
        self,
        config: Mapping[str, Any],
        headers: Mapping[str, TensorHeader],
        linears: Mapping[str, Shape],
        experts: Collection[str] = (),
    ) -> tuple[StoredSite, ...]:
        """Every quantized Linear; see ``Format.sites``."""
        modules, scheme = by_module(headers, linears, (*_SCALES, *_INPUTS)), _scheme(section_of(config))
        return every(linears, lambda name: _site(name, linears[name], modules.get(name, {}), scheme))

    def read(self, site: StoredSite, get: Get) -> PackedWeight:
        """The canonical weight; scales in float32 where they are stored as powers of two."""
        (out, inn), weight = site.shape, site.scheme.weight
        _, scale_name, *input_name = site.tensors
        scales = get(scale_name)
        scales = finite(scales.float() if scales.dtype.itemsize == 1 else scales, scale_name)
        step = finite(get(input_name[0]).float().reshape(1), input_name[0]) if input_name else None
        return PackedWeight(
            site.scheme,
            site.shape,
            get(f"{site.name}.weight").view(torch.uint8),
            scales.reshape(weight.scale_rows(out), weight.groups(inn)),
            input_scale=step,
        )

    def refuses(self, scheme: Scheme, shape: Shape, packed: PackedWeight | None = None) -> str:
        """Always, since it is not written."""
        return "it is only read; use compressed-tensors, which stores the same weights"

    def write(self, name: str, packed: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """UnsupportedError: see ``refuses``."""
        raise UnsupportedError(self.refuses(packed.scheme, packed.shape))

    def quantization_config(
        self, sites: Sequence[StoredSite], float_modules: Sequence[str], floats: Sequence[str] = ()
    ) -> dict[str, Any]:
        """UnsupportedError: see ``refuses``."""
        raise UnsupportedError(self.refuses(sites[0].scheme, sites[0].shape))


FORMAT = Fp8()


def _scheme(section: Mapping[str, Any]) -> Scheme:
    """The one scheme of all quantized modules."""
    block, activation = section.get("weight_block_size"), section.get("activation_scheme", "dynamic")
    if section.get("fmt") not in (None, "e4m3", "float8_e4m3fn"):
        raise UnsupportedError(f"config.json: fp8 weights in {section['fmt']!r} are not read; known: e4m3")
    if activation not in ("dynamic", "static"):
        raise UnsupportedError(f"config.json: activation_scheme {activation!r} of fp8 is not read")
    sides = block if isinstance(block, list | tuple) else ()
    if block is not None and (len(sides) != 2 or any(type(side) is not int for side in sides)):
        raise FormatError(f"config.json: weight_block_size must be [rows, columns], not {block!r}")
    try:
        weight = WeightType(8, True, None, "fp8", (sides[0], sides[1]) if sides else None, not sides)
        dynamic = activation == "dynamic"
        columns = sides[1] if sides and dynamic else None
        return Scheme(weight, ActivationType(8, dynamic, True, "fp8", columns))
    except ConfigError as error:
        raise FormatError(f"config.json: {error}") from None


def _site(name: str, shape: Shape, stored: Stored, scheme: Scheme) -> StoredSite | None:
    """The Linear ``name`` as stored, or None when it is float."""
    header = stored.get("weight")
    if (header is None or header.dtype in FLOATS) and not any(mark in stored for mark in (*_SCALES, *_INPUTS)):
        return None
    (out, inn), weight = shape, scheme.weight
    scale = next((suffix for suffix in _SCALES if suffix in stored), _SCALES[0])
    grid = (weight.scale_rows(out), weight.groups(inn))
    wanted: dict[str, tuple] = {
        "weight": (("F8_E4M3",), (out, inn)),
        scale: ((*FLOATS, "F8_E8M0"), grid, *(_ONE if weight.per_tensor else ())),
    }
    if scheme.activation and not scheme.activation.dynamic:
        wanted[next((suffix for suffix in _INPUTS if suffix in stored), _INPUTS[0])] = (FLOATS, *_ONE)
    check(name, stored, wanted, f"config.json makes {name} {scheme}, of shape {list(shape)}")
    return StoredSite(name, scheme, shape, tuple(f"{name}.{suffix}" for suffix in wanted))
