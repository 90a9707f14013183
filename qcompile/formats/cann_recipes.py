"""The w4a8 experts of the CANN recipes: compressed-tensors in the layout that their Ascend kernels take.

Read as compressed-tensors, which its files say they are; this writes them. Linears are int8 with dynamic activations;
the Linears of an expert have 4-bit codes in pairs of rows, the bits of float32 scales in int64, a bias that is
8 * sum(W) for the hardware, and where activations are clipped an alpha. Two groups: "Linear" and "MoEGMM".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..errors import UnsupportedError
from ..types import PackedWeight, Scheme
from . import StoredSite, TensorHeader, _groups, _layouts
from .compressed_tensors import CompressedTensors

_OF_EXPERTS = ("w4a8", "w4a8_clip")
_EXPERT = re.compile(r".*\.\d+\.(gate_proj|up_proj|down_proj|w[123])")


class CannRecipes(CompressedTensors):
    """Writes W8A8 Linears and W4A8 experts."""

    name = "cann-recipes"

    def detect(self, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> bool:
        """Never: compressed-tensors reads it."""
        return False

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], packed: PackedWeight | None = None) -> str:
        """Why a weight cannot be written."""
        if str(scheme) not in ("w8a8", *_OF_EXPERTS):
            return f"it stores w8a8, and w4a8 and w4a8_clip of experts, not {scheme}; use compressed-tensors"
        if scheme.weight.bits == 4 and shape[0] % 2:
            return f"it stores rows in pairs, which {shape[0]} rows are not; use compressed-tensors"
        if packed is not None and packed.permutation is not None:
            return "it cannot store columns in another order (act-order); use compressed-tensors"
        return ""

    def write(self, name: str, packed: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """The tensors of one module; the inverse of ``read``."""
        tensors = super().write(name, packed, dtype)
        if packed.scheme.weight.bits == 4:
            tensors[f"{name}.weight"] = _layouts.paired(tensors[f"{name}.weight"])
            scales = packed.scales.float().flatten()
            tensors[f"{name}.weight_scale"] = scales.view(torch.int32).to(torch.int64)
            tensors[f"{name}.bias"] = 8 * numerics.dequantize_packed(packed, torch.float32).sum(1)
        return tensors

    def write_bias(self, name: str, packed: PackedWeight, bias: Tensor | None) -> dict[str, Tensor]:
        """The float bias; UnsupportedError of an expert, whose place for one is taken."""
        if bias is not None and packed.scheme.weight.bits == 4:
            raise UnsupportedError(f"{name} has a bias, where {self.name} keeps 8 * sum(W); use compressed-tensors")
        return super().write_bias(name, packed, bias)

    def quantization_config(
        self, sites: Sequence[StoredSite], float_modules: Sequence[str], floats: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The section of config.json with its two groups."""
        experts = [site for site in sites if site.scheme.weight.bits == 4]
        for site in sites:
            if (site.scheme.weight.bits == 4) != bool(_EXPERT.fullmatch(site.name)):
                kind = "of an expert" if _EXPERT.fullmatch(site.name) else "no expert"
                raise UnsupportedError(
                    f"{site.name} is {kind} and {site.scheme}: {self.name} has w8a8 Linears and w4a8 experts; use "
                    "compressed-tensors"
                )
        section = super().quantization_config(sites, float_modules, floats)
        linear, expert = (_groups.describe(Scheme.parse(name), False, []) for name in ("w8a8", "w4a8"))
        clips = any(str(site.scheme) == "w4a8_clip" for site in experts)
        groups = {
            "group_0": linear | {"targets": ["Linear"]},
            "group_1": expert | {"targets": [_groups.EXPERTS], "activation_use_clip": clips},
        }
        section["config_groups"] = groups if experts else {"group_0": groups["group_0"]}
        return section | {"quant_method": "compressed-tensors", "format": "int-quantized"}


FORMAT = CannRecipes()
