"""What GPTQ, AWQ and AutoRound share: modules of ``qweight``, ``qzeros`` and ``scales``, and settings per module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..errors import ConfigError, FormatError, UnsupportedError
from ..types import PackedWeight, Scheme, WeightType
from ._headers import Stored, Wanted, check
from ._patterns import matches

AUTO_ROUND = ("auto-round", "intel/auto-round")
_REGEX = set(r"*+?^$()[]{}|\\")


# -------------------------------------------------------------------------------------------------- configuration


def section_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization_config of a config.json, also of its text_config; empty where there is none."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(section := place.get("quantization_config"), Mapping):
            return section
    return {}


def method_of(section: Mapping[str, Any]) -> str:
    """The format that a section is about: "gptq", "awq", or "" for others. AutoRound writes both layouts."""
    method = section.get("quant_method")
    if method in AUTO_ROUND:
        return "awq" if "awq" in packing_of(section) else "gptq"
    return method if method in ("gptq", "awq") else ""


def packing_of(section: Mapping[str, Any]) -> str:
    """AutoRound's name of the layout; "backend" in old files."""
    return str(section.get("packing_format") or section.get("backend") or "auto_round:auto_gptq")


def settings_of(name: str, section: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
    """The settings of the module ``name``, None where they exclude it, and which part of config.json said so.

    gptqmodel: the first key of "dynamic" that matches the beginning of the name wins; "-:" excludes, "+:" or no prefix
    overrides. AutoRound: "extra_config" by exact name, else by regular expression; 16 bits exclude.
    """
    for key, overrides in _entries(section, "dynamic"):
        kind, pattern = (key[:2], key[2:]) if key[:2] in ("+:", "-:") else ("+:", key)
        if matches(pattern, name, "dynamic"):
            origin = f"the rule {key!r} of dynamic"
            return (None if kind == "-:" else {**section, **(overrides or {})}), origin
    extra = dict(_entries(section, "extra_config"))
    regexes = (key for key in extra if _REGEX & set(key) and matches(key, name, "extra_config", anywhere=True))
    if closest := name if name in extra else next(regexes, None):
        merged = {**section, **(extra[closest] or {})}
        excluded = merged.get("bits") in (16, 32) or str(merged.get("data_type", "int")).startswith(
            ("float", "bf", "fp16")
        )
        return (None if excluded else merged), f"extra_config of {closest!r}"
    return section, "quantization_config"


def _entries(section: Mapping[str, Any], key: str) -> Iterable[tuple[str, Mapping[str, Any] | None]]:
    entries = section.get(key) or {}
    if not isinstance(entries, Mapping) or any(not isinstance(v, Mapping | None) for v in entries.values()):
        raise FormatError(f"config.json: {key} must map names to objects")
    return entries.items()


def scheme_of(name: str, settings: Mapping[str, Any], origin: str, symmetric: bool, widths: Iterable[int]) -> Scheme:
    """The scheme that settings describe; UnsupportedError names the module for one that is not read."""
    bits, group = settings.get("bits", settings.get("w_bit")), settings.get("group_size", settings.get("q_group_size"))
    for key, value in (("bits", bits), ("group_size", group)):
        if type(value) is not int:
            raise FormatError(f"config.json: {origin} gives {name} the {key} {value!r}; it must be an integer")
    kind, activation = settings.get("data_type") or "int", settings.get("act_bits")
    if kind != "int" or bits not in widths:
        raise UnsupportedError(
            f"{name}: {bits}-bit {kind} weights are not read from this format; known: int of "
            f"{', '.join(map(str, widths))} bits"
        )
    if isinstance(activation, int) and activation < 16:
        raise UnsupportedError(f"{name}: {activation}-bit activations are not read from this format")
    try:
        return Scheme(WeightType(bits, symmetric, None if group == -1 else group))
    except ConfigError as error:
        raise FormatError(f"config.json: {origin} of {name}: {error}") from None


# -------------------------------------------------------------------------------------------------------- headers


def check_module(name: str, stored: Stored, wanted: Wanted, about: str) -> None:
    """FormatError that names file and tensor unless the module fits, and is not float as well."""
    if "weight" in stored:
        raise FormatError(
            f"{stored['weight'].file}: both {name}.weight and {name}.qweight are stored; one of them is wrong"
        )
    check(name, stored, wanted, about)


# ------------------------------------------------------------------------------------------------------ tensor data


def input_order(packed: PackedWeight) -> Tensor:
    """Codes uint8 [out, in], one per byte, column i for input feature i."""
    codes = numerics.unpack_codes(packed.codes, packed.scheme.weight.bits, packed.shape[1])
    if packed.permutation is None:
        return codes
    return torch.empty_like(codes).index_copy_(1, packed.permutation.long(), codes)


def is_permuted(packed: PackedWeight) -> bool:
    """Whether the order of the columns matters, since they belong to several groups."""
    return packed.permutation is not None and packed.scheme.weight.groups(packed.shape[1]) > 1


def half_refusal(scales: Tensor) -> str:
    """Why scales cannot be stored as float16, which readers of these formats expect; "" when they can."""
    halves = scales.to(torch.float16)
    lost = int((halves.double() != scales.double()).sum())
    if not lost:
        return ""
    return (
        f"{lost} of its {scales.numel()} scales are {scales.dtype} numbers that float16, which this format stores, "
        "does not hold exactly; quantize a float16 or bfloat16 model, or save as compressed-tensors"
    )
