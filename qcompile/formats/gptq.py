"""GPTQ: what AutoGPTQ, gptqmodel, optimum and AutoRound write, and vLLM, SGLang and transformers read.

Tensors of a Linear [out, in] with ``bits`` 2, 3, 4 or 8 and G groups (gptqmodel 7.7, ``nn_modules/qlinear``; every
formula was checked against its files):

    qweight  int32 [in * bits / 32, out]   each column is one little-endian bit stream: code i is input feature i
    qzeros   int32 [G, out * bits / 32]    each row is one stream: zero point of output o, or that minus 1
    scales   float16 [G, out]              bfloat16 where the model was; may be negative or zero
    g_idx    int32 [in]                    group of input i; without it (AutoRound) i // group_size

``W[o, i] = (q[i, o] - z[g_idx[i], o]) * scales[g_idx[i], o]``, one rounding in the scales' dtype. checkpoint_format
"gptq" (v1) stores z - 1, "gptq_v2" stores z. A v1 zero point of 0 is all ones: gptqmodel subtracts from whole words, so
that it borrows from the next field, others from each field. What AutoGPTQ wrote for one is lost beyond recovery.

A symmetric checkpoint ("sym": true) must hold z = 2 ** (bits - 1) everywhere, which tells v1 from v2; without "sym"
zero points are read as they are. desc_act becomes ``PackedWeight.permutation``. Written are the same tensors: g_idx
always; scales as float16, and refused where that would change them; v1 zero points of at least 1; and one "dynamic"
rule for each module that differs from most.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..errors import FormatError, UnsupportedError
from ..types import PackedWeight, Scheme, WeightType
from . import Format, Get, Shape, StoredSite, TensorHeader
from ._headers import FLOATS, Stored, by_module, every, finite, fits
from ._order import in_groups
from ._qweight import (
    AUTO_ROUND,
    check_module,
    half_refusal,
    input_order,
    method_of,
    packing_of,
    scheme_of,
    section_of,
    settings_of,
)
from ._words import from_words, to_words, unpack_words, width

_BITS = (2, 3, 4, 8)
_MARKS = ("qweight", "qzeros", "g_idx")
_NAMES = {1: "gptq", 2: "gptq_v2"}
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # 1 in every field of a word
_PACKINGS = {"auto_round:auto_gptq": 1, "auto_round": 2, "auto_round:gptqmodel": 2}  # auto_round/inference/backend.py
_KERNELS = ("gptq", "exllama", "triton", "marlin", "torch", "qbits", "ipex")  # in old AutoRound files: no version


class Gptq(Format):
    """Reads both versions, writes one of them."""

    side_files = ("quantize_config.json", "quantization_config.json")  # the latter is AutoRound's

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = _NAMES[version]

    def detect(self, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> bool:
        """Whether config.json says so; an unknown or absent checkpoint_format counts as version 1."""
        section = section_of(config)
        return method_of(section) == "gptq" and (_label(section) == "gptq_v2") == (self.version == 2)

    def sites(
        self,
        config: Mapping[str, Any],
        headers: Mapping[str, TensorHeader],
        linears: Mapping[str, Shape],
        experts: Collection[str] = (),
    ) -> tuple[StoredSite, ...]:
        """Every quantized Linear; see ``Format.sites``."""
        section = section_of(config)
        version = _version(section)
        modules = by_module(headers, linears, _MARKS)
        return every(linears, lambda name: _site(name, linears[name], modules.get(name, {}), section, version))

    def read(self, site: StoredSite, get: Get) -> PackedWeight:
        """The canonical weight; bit for bit what gptqmodel's torch kernel multiplies."""
        weight, (_, inn) = site.scheme.weight, site.shape
        scales = finite(get(f"{site.name}.scales"), f"{site.name}.scales").t().contiguous()
        zeros = _zero_points(get(f"{site.name}.qzeros"), site)
        codes = from_words(get(f"{site.name}.qweight").t().contiguous(), weight.bits, inn, False)
        g_idx = _group_of_each_input(get(f"{site.name}.g_idx"), site) if site.layout["g_idx"] else None
        if g_idx is None:
            return PackedWeight(site.scheme, site.shape, codes, scales, zeros)
        return in_groups(site.scheme, site.shape, codes, scales, zeros, g_idx)

    def order_of(self, site: StoredSite) -> str:
        """Inputs come first."""
        return "io"

    def refuses(self, scheme: Scheme, shape: Shape, packed: PackedWeight | None = None) -> str:
        """Why a weight cannot be written."""
        (out, inn), weight = shape, scheme.weight
        if scheme.activation:
            return "GPTQ has no quantized activations; use compressed-tensors"
        if weight.number != "int":
            return f"GPTQ stores integers, not {weight.number}; use compressed-tensors"
        if weight.bits not in _BITS:
            return f"GPTQ stores {', '.join(map(str, _BITS))} bits, not {weight.bits}; use compressed-tensors"
        codes = 32 if weight.bits == 3 else 32 // weight.bits
        for size, what in ((out, "output"), (inn, "input")):
            if size % codes:
                return f"{weight.bits}-bit GPTQ needs a multiple of {codes} {what} features, not {size}"
        if weight.group_size and inn % weight.group_size:
            return (
                f"the group size {weight.group_size} does not divide its {inn} input features, as GPTQ readers expect"
            )
        if packed is None:
            return ""
        if self.version == 1 and packed.zeros is not None and not packed.zeros.all():
            return "some zero points are 0, which readers of GPTQ version 1 understand differently; save as gptq_v2"
        return half_refusal(packed.scales)

    def write(self, name: str, packed: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """The tensors of one module; the inverse of ``read``."""
        weight, inn = packed.scheme.weight, packed.shape[1]
        codes = packed.codes if packed.permutation is None else numerics.pack_codes(input_order(packed), weight.bits)
        zeros = packed.zeros
        if zeros is None:
            zeros = torch.full(packed.scales.shape, 2 ** (weight.bits - 1), dtype=torch.uint8)
        fields = (zeros - 1 if self.version == 1 else zeros).t().contiguous()
        g_idx = _trivial(inn, weight).to(torch.int32)
        if packed.permutation is not None:
            g_idx = torch.empty_like(g_idx).index_copy_(0, packed.permutation.long(), g_idx)
        tensors = {
            "qweight": to_words(codes).t().contiguous(),
            "qzeros": to_words(numerics.pack_codes(fields, weight.bits)),
            "scales": packed.scales.t().to(torch.float16).contiguous(),
            "g_idx": g_idx,
        }
        return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}

    def quantization_config(
        self, sites: Sequence[StoredSite], float_modules: Sequence[str], floats: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The section of config.json; gptqmodel and vLLM honour its "dynamic", transformers 5.23 does not."""
        settings = {site.name: _describe(site) for site in sites}
        common = dict(Counter(tuple(each.items()) for each in settings.values()).most_common(1)[0][0])
        dynamic: dict[str, dict[str, Any]] = {
            f"-:^{re.escape(name)}$": {} for name in float_modules if not _is_head(name)
        }
        for name, each in settings.items():
            if changed := {key: value for key, value in each.items() if value != common[key]}:
                dynamic[f"+:^{re.escape(name)}$"] = changed
        return {
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            **common,
            "lm_head": any(map(_is_head, settings)),
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
        }


FORMAT = Gptq(1)


# -------------------------------------------------------------------------------------------------- configuration


def _label(section: Mapping[str, Any]) -> str | None:
    label = section.get("checkpoint_format") or section.get("format")
    return None if label is None else str(label).lower()


def _version(section: Mapping[str, Any]) -> int | None:
    """1 or 2 where the config says so, else None."""
    if section.get("quant_method") in AUTO_ROUND:
        packing = packing_of(section)
        if packing not in _PACKINGS and not any(kernel in packing for kernel in _KERNELS):
            raise UnsupportedError(f"config.json: the AutoRound layout {packing!r} is not read")
        return _PACKINGS.get(packing)
    label = "marlin" if section.get("is_marlin_format") else _label(section)
    versions = {None: None, "gptq": 1, "gptq_v2": 2}
    if label not in versions:
        raise UnsupportedError(f"config.json: the GPTQ layout {label!r} is not read; known: gptq, gptq_v2")
    if section.get("pack_dtype") not in (None, "int32"):
        raise UnsupportedError(f"config.json: GPTQ in {section['pack_dtype']!r} words is not read; known: int32")
    return versions[label]


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] == "lm_head"


def _describe(site: StoredSite) -> dict[str, Any]:
    weight = site.scheme.weight
    permuted = bool(site.layout.get("permuted"))
    return {
        "bits": weight.bits,
        "group_size": weight.group_size or -1,
        "desc_act": permuted,
        "sym": weight.symmetric,
    }


# -------------------------------------------------------------------------------------------------------- headers


def _site(
    name: str, shape: Shape, stored: Stored, section: Mapping[str, Any], version: int | None
) -> StoredSite | None:
    """The Linear ``name`` as stored, or None when it is float; the tensors that exist decide."""
    marks = [stored[mark] for mark in _MARKS if mark in stored]
    settings, origin = settings_of(name, section)
    head = section.get("lm_head") if _is_head(name) else None
    if not marks:
        if head is True and "weight" in stored:
            header = stored["weight"]
            raise FormatError(f"{header.file}: {header.name} is float, but config.json says that lm_head is quantized")
        return None
    if settings is None or head is False:
        origin = "lm_head" if head is False else origin
        raise FormatError(
            f"{marks[0].file}: {marks[0].name} is stored quantized, but config.json excludes {name} ({origin})"
        )
    scheme = scheme_of(name, settings, origin, settings.get("sym") is True, _BITS)
    (out, inn), weight = shape, scheme.weight
    groups = weight.groups(inn)
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "qweight": (("I32",), (width(inn, weight.bits, False), out)),
        "qzeros": (("I32",), (groups, width(out, weight.bits, False))),
        "scales": (FLOATS, (groups, out)),
    }
    desc_act = settings.get("desc_act")
    if "g_idx" in stored or (desc_act and groups > 1):
        wanted["g_idx"] = (("I32", "I64"), (inn,))
    about = f"{origin} makes {name} {scheme}, desc_act {desc_act}, of shape {list(shape)}"
    if fits(stored, {"qweight": (("I32",), (inn, out // 8))}):
        about += "; qweight has the shape of AWQ gemm"
    check_module(name, stored, wanted, about)
    layout = {
        "version": version,
        "borrows": "gptqmodel" in str(section.get("meta")),
        "desc_act": desc_act,
        "g_idx": "g_idx" in wanted,
    }
    return StoredSite(name, scheme, shape, tuple(f"{name}.{suffix}" for suffix in wanted), layout)


# ------------------------------------------------------------------------------------------------------ tensor data


def _zero_points(words: Tensor, site: StoredSite) -> Tensor | None:
    """Zero points uint8 [out, G], or None for a symmetric weight; FormatError where config and tensor disagree."""
    weight, out, version = site.scheme.weight, site.shape[0], site.layout["version"]
    bits, middle = weight.bits, 2 ** (weight.bits - 1)
    fields = unpack_words(words, bits, out, False)
    first = (fields + 1) & (2**bits - 1)
    if site.layout["borrows"] and bits in _ONES:
        first = unpack_words(words + _ONES[bits], bits, out, False)
    if not weight.symmetric:
        return (fields if version == 2 else first).t().contiguous()
    if version is None:
        version = 2 if bool((fields == middle).all()) else 1
    chosen, other = (first, fields) if version == 1 else (fields, first)
    if bool((chosen == middle).all()):
        return None
    label = _NAMES[version] if site.layout["version"] else "no checkpoint_format"
    hint = "set sym to false if they are right"
    if bool((other == middle).all()):
        hint = f"the tensors are those of {_NAMES[3 - version]!r}"
    raise FormatError(
        f"{site.name}.qzeros stores {_seen(fields)}, which are the zero points {_seen(first)} in 'gptq' (version 1) "
        f"and {_seen(fields)} in 'gptq_v2'; but config.json says {label!r} and sym, so that all must be {middle}: "
        f"{hint}"
    )


def _seen(values: Tensor) -> str:
    numbers = values.unique().tolist()
    return ", ".join(map(str, numbers[:6])) + (" ..." if len(numbers) > 6 else "")


def _group_of_each_input(g_idx: Tensor, site: StoredSite) -> Tensor | None:
    """``g_idx``, or None when it is the plain order; FormatError for what config and scales contradict."""
    name, inn, weight = f"{site.name}.g_idx", site.shape[1], site.scheme.weight
    groups = weight.groups(inn)
    if inn and (int(g_idx.min()) < 0 or int(g_idx.max()) >= groups):
        raise FormatError(f"{name} names groups {int(g_idx.min())} to {int(g_idx.max())}, but there are {groups}")
    trivial = _trivial(inn, weight).to(g_idx.dtype)
    if torch.equal(g_idx, trivial):
        return None
    if site.layout["desc_act"] is False:
        raise FormatError(
            f"{name} is not in order, but config.json says that desc_act is false; set it to true if g_idx is right"
        )
    return g_idx


def _trivial(inn: int, weight: WeightType) -> Tensor:
    return torch.arange(inn) // (weight.group_size or max(inn, 1))
