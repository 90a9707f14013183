"""compressed-tensors: what llm-compressor writes, and vLLM, SGLang and transformers read. Our native format.

Every scheme is stored (compressed-tensors 0.20, ``compressors``); config.json says which module has which. Layouts by
their names there; ``_layouts`` has the tensors, ``_groups`` the config:

    pack-quantized         integers without quantized activations, packed into int32 words
    int-quantized          integers beside quantized activations, one per byte; also naive-quantized
    float-quantized        fp8 with a scale per tensor, channel, group or block
    nvfp4-pack-quantized   e2m1, scales e4m3 of 16 weights, divided by a float32 weight_global_scale
    mxfp4-pack-quantized   e2m1, scales powers of two of 32 weights; mxfp8-quantized the same with e4m3

Static activations have input_scale and input_zero_point. Before 0.18 the package put 32 // bits codes into each word of
3, 5, 6 and 7 bits and left the top bits empty; such files are read and told apart by their width. weight_g_idx is
written for a permuted weight with groups; 0.19 dropped it, so only older readers take it.

The CANN recipes' w4a8 experts are read as well: a group that targets "MoEGMM" with 4-bit weights in pairs of rows, the
bits of float32 scales in int64, a bias that is 8 * sum(W) for the hardware, and with "activation_use_clip" a stored
alpha. A clip is written as a tensor ``alpha`` beside int-quantized weights; ``cann_recipes`` writes their own layout.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from ..numerics import dequantize_packed
from ..types import PackedWeight, Scheme
from . import Format, Get, Shape, StoredSite, TensorHeader, _groups, _layouts
from ._headers import FLOATS, Stored, by_module, check, every

_MARKS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale")
_VERSION = "0.18.0"  # the first with the dense bit stream for every width


class CompressedTensors(Format):
    """Reads and writes every scheme."""

    name = "compressed-tensors"

    def detect(self, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> bool:
        """Whether config.json says so."""
        return _groups.section_of(config) is not None

    def sites(
        self,
        config: Mapping[str, Any],
        headers: Mapping[str, TensorHeader],
        linears: Mapping[str, Shape],
        experts: Collection[str] = (),
    ) -> tuple[StoredSite, ...]:
        """Every quantized Linear; see ``Format.sites``."""
        section = _groups.section_of(config) or {}
        _groups.refuse_extras(section)
        modules = by_module(headers, linears, _MARKS)
        sites = every(linears, lambda name: _site(name, linears[name], modules.get(name, {}), section, name in experts))
        _groups.check_clips(section, {site.layout["group"] for site in sites if site.layout["alpha"] is not None})
        return sites

    def read(self, site: StoredSite, get: Get) -> PackedWeight:
        """The canonical weight; bit for bit what compressed-tensors' own decompression multiplies."""
        packed = _layouts.read(site, get)
        if site.owns_bias:
            _check_correction(get(f"{site.name}.bias"), packed, f"{site.name}.bias")
        return packed

    def unneeded(self, site: StoredSite, columns: bool) -> frozenset[str]:
        """The correction of the hardware's offset, which is computed again."""
        return frozenset({"bias"} if columns and site.owns_bias else ())

    def refuses(self, scheme: Scheme, shape: Shape, packed: PackedWeight | None = None) -> str:
        """Why a scheme cannot be written; every one can."""
        return ""

    def write(self, name: str, packed: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """The tensors of one module; the inverse of ``read``."""
        return {f"{name}.{suffix}": tensor for suffix, tensor in _layouts.write(packed).items()}

    def quantization_config(
        self, sites: Sequence[StoredSite], float_modules: Sequence[str], floats: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The section of config.json: one group per scheme, targeted by class when it is the only one."""
        groups: dict[tuple[Scheme, bool], list[str]] = {}
        for site in sites:
            permuted = f"{site.name}.weight_g_idx" in site.tensors
            groups.setdefault((site.scheme, permuted), []).append(site.name)
        described = [
            _groups.describe(scheme, permuted, ["Linear"] if len(groups) == 1 else names)
            for (scheme, permuted), names in groups.items()
        ]
        formats = {group["format"] for group in described}
        packed_zeros = any(g["format"] == "pack-quantized" and not g["weights"]["symmetric"] for g in described)
        return {
            "quant_method": self.name,
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": {f"group_{i}": group for i, group in enumerate(described)},
            "ignore": list(float_modules),
            "kv_cache_scheme": None,
            "sparsity_config": {},
            "transform_config": {},
            "global_compression_ratio": None,
            "version": _VERSION,
            **({"dequantize": True} if packed_zeros else {}),  # transformers reads them so only; nobody else looks
        }


FORMAT = CompressedTensors()


def _site(name: str, shape: Shape, stored: Stored, section: Mapping[str, Any], is_expert: bool) -> StoredSite | None:
    """The Linear ``name`` as stored, or None when config and headers agree that it is float."""
    marks = [stored[mark] for mark in _MARKS if mark in stored]
    plain = stored.get("weight")
    codes = plain if plain and plain.dtype not in FLOATS else None
    found = _groups.group_of(name, section, is_expert)
    if found is None:
        for header in [*marks, *([codes] if codes else [])]:
            raise FormatError(
                f"{header.file}: {header.name} is stored quantized, but config.json ignores {name} or has no group "
                "that targets it"
            )
        return None
    label, group = found
    if not marks and not codes:
        if plain is None or _groups.is_within_ignored(name, section):
            return None  # float; or tied to another module, or missing: whoever fills the model knows
        raise FormatError(
            f"{plain.file}: {plain.name} is float ({plain.dtype}), but config group {label!r} targets {name} and "
            "config.json does not ignore it"
        )
    if plain and "weight_packed" in stored:
        raise FormatError(f"{plain.file}: both {plain.name} and {name}.weight_packed are stored; one of them is wrong")
    alpha = next((suffix for suffix in stored if suffix.endswith("alpha") and not suffix.endswith("w_alpha")), None)
    scheme = _groups.scheme_of(name, group, group.get("format") or section.get("format"), alpha is not None)
    layout = _groups.layout_of(name, group, section, scheme)
    kind = _layouts.codes_of(layout, scheme, stored, shape)
    padded = kind == "words" and _layouts.has_padding(stored, shape, scheme.weight.bits, section)
    reads = dict(_layouts.wanted(shape, scheme, kind, padded))
    if "weight_g_idx" in stored or group["weights"].get("actorder") in (True, "group", "dynamic"):
        reads["weight_g_idx"] = (("I32", "I64"), (shape[1],))
    for suffix in _layouts.ZERO_POINTS.keys() & stored.keys() - reads.keys():
        reads[suffix] = (stored[suffix].dtype,), stored[suffix].shape  # of symmetric numbers; ``read`` expects zeros
    if alpha is not None:
        reads[alpha] = (FLOATS, (1,), ())
    is_correction = kind == "pairs" and "bias" in stored
    if is_correction:
        reads["bias"] = (("F32",), (shape[0],), (shape[0], 1))
    check(name, stored, reads, f"config group {label!r} makes {name} {scheme}, {layout}, of shape {list(shape)}")
    return StoredSite(
        name,
        scheme,
        shape,
        tuple(f"{name}.{suffix}" for suffix in reads),
        {"codes": kind, "padded": padded, "g_idx": "weight_g_idx" in reads, "alpha": alpha, "group": label},
        owns_bias=is_correction,
    )


def _check_correction(stored: Tensor, packed: PackedWeight, name: str) -> None:
    """FormatError unless a stored correction of the hardware's offset is ``8 * sum(W)`` of each row."""
    weight = dequantize_packed(packed, torch.float32)
    difference = (stored.reshape(-1).float() - 8 * weight.sum(1)).abs()
    if bool((difference > 0.01 * 8 * weight.abs().sum(1) + 1e-6).any()):
        raise FormatError(
            f"{name} is not the correction 8 * sum(weight) that this layout keeps there; a layer's own bias beside "
            "weights in pairs of rows is not known to it"
        )
