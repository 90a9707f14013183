"""ModelSlim: what Huawei's msmodelslim writes, and vllm-ascend, SGLang and MindIE read on Ascend NPUs.

quant_model_description*.json maps the name of every tensor to a type; config.json says nothing. The type of a module is
that of its weight ("FLOAT": not quantized), by msmodelslim 26.1 and its older versions:

    W8A8            static: input_scale, input_offset, deq_scale = input_scale * weight scale (float32, or its bits in
                    int64), quant_bias int32 = round(bias / deq_scale - input_offset * sum(q)), which holds the bias
    W8A8_DYNAMIC    W8A8_MIX (static tensors as well), W4A8_DYNAMIC, W4A4_DYNAMIC: symmetric, activations per token
    W8A16, W4A16    ``W = (q - weight_offset) * weight_scale``
    WFP8AFP8_DYNAMIC, W8A8_MXFP8, W4A4_MXFP4    small floats

Weights are int8 [out, in]; of 4 bits also pairs of rows int8 [out / 2, in], told apart by the shape. Scales and offsets
are float32 [out, 1] or [out, groups], of old W4A8 files weight_scale [out, 1] times weight_scale_second [out, groups].
scale_bias = 8 * sum(W), of chunks of the inputs, is what the hardware needs: it is checked when read, and written.

Smoothing with a shift adds ``<norm>.bias`` (or ``<norm>.module.bias``), which the norm adds to its result.
A quantized key-value cache, online rotations and scales on activations are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..errors import FormatError, UnsupportedError, shortened
from ..types import PackedWeight, Scheme
from . import Format, Get, Shape, StoredSite, TensorHeader
from ._headers import FLOATS, Stored, by_module, check, every, finite
from ._layouts import paired, signed, unpair
from ._qweight import is_permuted

_FLOAT, _STATIC, _MIXED = "FLOAT", "W8A8", "W8A8_MIX"
_TYPES = {
    "W8A16": "w8a16_asym",
    "W4A16": "w4a16_asym",
    _STATIC: "w8a8_static",
    "W8A8_DYNAMIC": "w8a8",
    _MIXED: "w8a8",
    "W4A8_DYNAMIC": "w4a8",
    "W4A4_DYNAMIC": "w4a4",
    "WFP8AFP8_DYNAMIC": "wfp8afp8",
    "W8A8_MXFP8": "wmxfp8amxfp8",
    "W4A4_MXFP4": "wmxfp4amxfp4",
}
_MARKS = ("weight_scale", "weight_offset", "deq_scale", "quant_bias", "input_scale", "input_offset", "scale_bias")
_REFUSED = {  # ends of names, and what they belong to
    ".kv_cache_scale": "a quantized key-value cache (C8)",
    ".kv_cache_offset": "a quantized key-value cache (C8)",
    ".c8_scale": "a quantized key-value cache (C8)",
    ".fa_q.scale": "quantized attention (fa_quant)",
    ".fa_k.scale": "quantized attention (fa_quant)",
    ".fa_v.scale": "quantized attention (fa_quant)",
    ".div.mul_scale": "smoothing by scales on activations that are not folded into a norm",
    ".left_trans": "online rotations (FlatQuant)",
    ".right_trans": "online rotations (FlatQuant)",
    "heads_rotation": "online rotations (QuaRot)",
    "kronecker_rotation_m": "online rotations (QuaRot)",
}
_CACHES = ("kv_cache_type", "kv_quant_type", "fa_quant_type")  # what the description says of caches and attention
_CHUNKS = 16  # of the inputs of layers that are split along them, so that up to 16 devices can share scale_bias
_SPLIT_INPUTS = ("o_proj", "down_proj", "w2")  # such layers, as msmodelslim's exporter knows them


class ModelSlim(Format):
    """Reads every type but those with rotations, writes the version "1.0.0"."""

    name = "modelslim"
    side_files = ("quant_model_description.json", "quant_model_description_*.json")
    in_config = False
    stem = "quant_model_weights"
    stores_norm_biases = True

    def detect(self, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> bool:
        """Whether there is a description; files of the CANN recipes use the name for compressed-tensors."""
        section = config.get("quantization_config")
        return (
            isinstance(section, Mapping) and section.get("quant_method") == self.name and "config_groups" not in section
        )

    def sites(
        self,
        config: Mapping[str, Any],
        headers: Mapping[str, TensorHeader],
        linears: Mapping[str, Shape],
        experts: Collection[str] = (),
    ) -> tuple[StoredSite, ...]:
        """Every quantized Linear; see ``Format.sites``."""
        description = config["quantization_config"]
        for key in _CACHES:
            if description.get(key) not in (None, "", _FLOAT):
                raise UnsupportedError(f"the description has {key} {description[key]!r}, which is not supported")
        for end, what in _REFUSED.items():
            if found := [name for name in headers if name.endswith(end)]:
                raise UnsupportedError(f"{shortened(found)} belongs to {what}, which is not supported")
        modules = by_module(headers, linears, _MARKS)
        return every(linears, lambda name: _site(name, linears[name], modules.get(name, {}), description))

    def added_tensors(self, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> dict[str, str]:
        """Biases, and weights under another name, that smoothing with a shift gave to norms and float Linears."""
        added = {}
        for name in headers:
            module, _, leaf = name.rpartition(".")
            norm = module.removesuffix(".module")
            if norm != module and leaf in ("weight", "bias"):
                if f"{norm}.weight" in headers:
                    raise UnsupportedError(
                        f"{norm}.weight and {module}.weight are both stored: a norm that float and quantized layers "
                        "read differently is not supported"
                    )
                added[f"{norm}.{leaf}"] = name
            elif leaf == "bias" and (weight := headers.get(f"{module}.weight")) and weight.dtype in FLOATS:
                added[name] = name
        return added

    def read(self, site: StoredSite, get: Get) -> PackedWeight:
        """The canonical weight, in float32 scales as stored."""
        weight, kind = site.scheme.weight, site.layout["type"]
        tensors = {name.removeprefix(f"{site.name}."): name for name in site.tensors}
        codes, scales = get(tensors["weight"]), _scales(site, tensors, get)
        if weight.number != "int":
            _symmetric_zeros(tensors, kind, get)
            return PackedWeight(site.scheme, site.shape, codes.view(torch.uint8), scales)
        codes = _unsigned(unpair(codes) if site.layout["pairs"] else codes, weight.bits, tensors["weight"])
        zeros, params = None, {}
        if weight.symmetric:
            _symmetric_zeros(tensors, kind, get)
        else:
            name = tensors.get("weight_offset", "")
            offset = get(name).float() if name else torch.zeros(1, 1)
            zeros = _zero_points(offset, weight.bits, name).expand_as(scales).contiguous()
        if kind == _STATIC:
            params["input_scale"] = finite(get(tensors["input_scale"]).float().reshape(1), tensors["input_scale"])
            params["input_zero"] = _input_zero(get(tensors["input_offset"]), tensors["input_offset"])
        packed = PackedWeight(site.scheme, site.shape, numerics.pack_codes(codes, weight.bits), scales, zeros, **params)
        if "scale_bias" in tensors:
            _check_scale_bias(get(tensors["scale_bias"]), packed, tensors["scale_bias"])
        return packed

    def read_bias(self, site: StoredSite, get: Get) -> Tensor | None:
        """The float bias that quant_bias stands for."""
        codes = get(f"{site.name}.weight").sum(1, dtype=torch.int64)
        offset = int(_input_zero(get(f"{site.name}.input_offset"), f"{site.name}.input_offset"))
        steps = get(f"{site.name}.quant_bias").to(torch.int64) + offset * codes
        deq_scale = _floats(get(f"{site.name}.deq_scale")).reshape(-1)
        return (steps.double() * deq_scale.double()).float() if steps.any() else None

    def unneeded(self, site: StoredSite, columns: bool) -> frozenset[str]:
        """The correction of the hardware's offset, which is computed again."""
        return frozenset({"scale_bias"} if columns else ())

    def refuses(self, scheme: Scheme, shape: Shape, packed: PackedWeight | None = None) -> str:
        """Why a weight cannot be written."""
        (out, inn), weight, activation = shape, scheme.weight, scheme.activation
        if _type_of(scheme) is None:
            return f"it has no type for {scheme}; known: {', '.join(_TYPES)}; use compressed-tensors"
        if activation and activation.clip:
            return "it has no clipped activations; use compressed-tensors"
        if weight.bits == 4 and weight.number == "int" and out % 2:
            return f"4-bit weights are stored in pairs of rows, which {out} rows are not; use compressed-tensors"
        if weight.group_size and inn % weight.group_size:
            return f"the group size {weight.group_size} does not divide its {inn} inputs; use compressed-tensors"
        if packed is not None and is_permuted(packed):
            return "it cannot store columns in another order (act-order); use gptq or compressed-tensors"
        return ""

    def write(self, name: str, packed: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """The tensors of one module; the inverse of ``read``."""
        weight, inn, kind = packed.scheme.weight, packed.shape[1], _type_of(packed.scheme)
        if weight.number != "int":
            codes = packed.codes if weight.bits == 4 else packed.codes.view(torch.float8_e4m3fn)
            scales = packed.scales.view(torch.uint8) if weight.number != "fp8" else packed.scales.float()
            return {f"{name}.weight": codes, f"{name}.weight_scale": scales}
        codes = numerics.unpack_codes(packed.codes, weight.bits, inn)
        if packed.permutation is not None:
            codes = torch.empty_like(codes).index_copy_(1, packed.permutation.long(), codes)
        numbers, scales = signed(codes, weight.bits), packed.scales.float()
        tensors = {"weight": paired(numbers) if kind in ("W4A8_DYNAMIC", "W4A16") else numbers}
        if kind == _STATIC:
            assert packed.input_scale is not None
            deq_scale = packed.input_scale * scales[:, 0]
            bits = deq_scale.view(torch.int32).to(torch.int64)
            tensors["deq_scale"] = deq_scale if dtype == torch.bfloat16 else bits
            tensors["input_scale"] = packed.input_scale
            tensors["input_offset"] = _offset(packed).float()
        else:
            zeros = packed.zeros
            offset = torch.zeros_like(scales) if zeros is None else zeros.float() - 2 ** (weight.bits - 1)
            tensors |= {"weight_scale": scales, "weight_offset": offset}
        if kind == "W4A8_DYNAMIC":
            chunks = _CHUNKS if name.endswith(_SPLIT_INPUTS) and inn % _CHUNKS == 0 else 1
            tensors["scale_bias"] = _scale_bias(packed, chunks)
        return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}

    def write_bias(self, name: str, packed: PackedWeight, bias: Tensor | None) -> dict[str, Tensor]:
        """The bias: within quant_bias of static activations, with what their zero point adds."""
        if _type_of(packed.scheme) != _STATIC:
            return super().write_bias(name, packed, bias)
        assert packed.input_scale is not None
        codes = signed(numerics.unpack_codes(packed.codes, 8, packed.shape[1]), 8).sum(1, dtype=torch.int64)
        steps = -(_offset(packed).to(torch.int64) * codes).double()
        if bias is not None:
            steps += bias.double() / (packed.input_scale * packed.scales[:, 0].float()).double()
        return {f"{name}.quant_bias": torch.round(steps).to(torch.int32)}

    def quantization_config(
        self, sites: Sequence[StoredSite], float_modules: Sequence[str], floats: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The description: a type for every tensor."""
        sizes = {site.scheme.weight.group_size for site in sites if site.scheme.weight.number == "int"} - {None}
        if len(sizes) > 1:
            raise UnsupportedError(f"modelslim has one group size for all modules, not {sizes}; use compressed-tensors")
        types = {site.name: _type_of(site.scheme) for site in sites}
        described = dict.fromkeys(floats, _FLOAT)
        for site in sites:
            own = {name: _FLOAT if name == f"{site.name}.bias" else str(types[site.name]) for name in site.tensors}
            described |= own
        return {
            "version": "1.0.0",
            "model_quant_type": Counter(types.values()).most_common(1)[0][0],
            "group_size": next(iter(sizes), 0),
            "metadata": {},
            "optional": {},
            **described,
        }


FORMAT = ModelSlim()


def _type_of(scheme: Scheme) -> str | None:
    """The type in which a scheme is written; None when there is none."""
    weight = scheme.weight
    if scheme.activation is None:
        plain = weight.number == "int" and weight.bits in (4, 8)
        return f"W{weight.bits}A16" if plain else None
    if str(scheme) in ("w8a8_static", "w8a8_static_sym"):
        return _STATIC
    grouped = weight.bits == 4 and weight.number == "int"
    name = str(replace(scheme, weight=replace(weight, group_size=None)) if grouped else scheme).removesuffix("_clip")
    return next((kind for kind, known in _TYPES.items() if known == name), None)


# -------------------------------------------------------------------------------------------------------- headers


def _site(name: str, shape: Shape, stored: Stored, description: Mapping[str, Any]) -> StoredSite | None:
    """The Linear ``name`` as stored, or None when it is float."""
    kind = description.get(f"{name}.weight", _FLOAT)
    marks = [stored[mark] for mark in _MARKS if mark in stored]
    if kind == _FLOAT:
        if marks:
            raise FormatError(f"{marks[0].file}: {marks[0].name} is stored, but the description has {name} as {_FLOAT}")
        return None
    if not isinstance(kind, str) or kind not in _TYPES:
        raise UnsupportedError(
            f"{name}: the type {kind!r} of ModelSlim is not read; known: {', '.join([*_TYPES, _FLOAT])}"
        )
    (out, inn), scheme = shape, Scheme.parse(_TYPES[kind])
    weight = stored.get("weight")
    packs: dict[str, tuple] = {}
    pairs = scheme.weight.bits == 4 and weight is not None and weight.shape == (out // 2, inn)
    if not stored:
        return None  # missing altogether: whoever fills the model knows
    scheme = _grouped(name, scheme, inn, stored, description)
    groups = scheme.weight.groups(inn)
    per_group, per_row = (out, groups), (out, 1)
    if scheme.weight.number == "int":
        packs["weight"] = (("I8",), (out // 2, inn) if pairs else (out, inn))
    else:
        packed = scheme.weight.bits == 4
        packs["weight"] = (("U8",), (out, -(-inn // 2))) if packed else (("F8_E4M3",), (out, inn))
    if kind in (_STATIC, _MIXED):
        packs["input_scale"] = (FLOATS, (1,), ())
        packs["input_offset"] = ((*FLOATS, "I8", "I32"), (1,), ())
        packs["deq_scale"] = ((*FLOATS, "I64"), (out,), per_row)
        packs["quant_bias"] = (("I32",), (out,), per_row)
    if kind != _STATIC:
        floats = FLOATS if scheme.weight.number in ("int", "fp8") else ("U8",)
        second = "weight_scale_second" in stored
        packs["weight_scale"] = (floats, per_row if second else per_group, *([(out,)] if groups == 1 else []))
    optional: dict[str, tuple] = {
        "weight_scale": (FLOATS, per_row, (out,)),
        "weight_offset": ((*FLOATS, "I8", "I32", "I64"), per_group, per_row, (out,)),
        "weight_scale_second": (FLOATS, per_group),
        "weight_offset_second": ((*FLOATS, "I8", "I32", "I64"), per_group),
        "scale_bias": (FLOATS, *((out, n) for n in (1, _CHUNKS, inn)), (out,)),
    }
    if kind in (_STATIC, _MIXED):
        optional["bias"] = (FLOATS, (out,))  # which quant_bias holds already
    packs |= {suffix: entry for suffix, entry in optional.items() if suffix in stored and suffix not in packs}
    check(name, stored, packs, f"the description makes {name} {kind} ({scheme}), of shape {list(shape)}")
    note = "its static half, for decoding, is not used: its activations are quantized per token"
    return StoredSite(
        name,
        scheme,
        shape,
        tuple(f"{name}.{suffix}" for suffix in packs),
        {"type": kind, "pairs": pairs},
        owns_bias=kind in (_STATIC, _MIXED),
        note=note if kind == _MIXED else "",
    )


def _grouped(name: str, scheme: Scheme, inn: int, stored: Stored, description: Mapping[str, Any]) -> Scheme:
    """The scheme with the group size that scales and description agree on."""
    scales = stored.get("weight_scale_second") or stored.get("weight_scale")
    if scheme.weight.group_size or scales is None or len(scales.shape) != 2 or scales.shape[1] == 1:
        return scheme
    size, groups = description.get("group_size"), scales.shape[1]
    size = 256 if size is None and "weight_scale_second" in stored else size  # msmodelslim's default of old
    if type(size) is not int or size < 1 or -(-inn // size) != groups:
        raise FormatError(
            f"{scales.file}: {scales.name} has {groups} groups of {inn} inputs, but the description has the group_size "
            f"{size!r}"
        )
    return replace(scheme, weight=replace(scheme.weight, group_size=size))


# ------------------------------------------------------------------------------------------------------ tensor data


def _floats(values: Tensor) -> Tensor:
    """Float32 numbers, or those whose bits are the lower half of int64 ones."""
    return values.float() if values.is_floating_point() else values.to(torch.int32).view(torch.float32)


def _scales(site: StoredSite, tensors: Mapping[str, str], get: Get) -> Tensor:
    weight, (out, inn) = site.scheme.weight, site.shape
    if site.layout["type"] == _STATIC and "weight_scale" not in tensors:
        name = tensors["deq_scale"]
        input_scale = get(tensors["input_scale"]).float().reshape(1)
        return _quotient(finite(_floats(get(name)), name).reshape(out), input_scale, name)[:, None]
    name = tensors["weight_scale"]
    scales = get(name)
    if weight.number in ("mxfp4", "mxfp8"):
        return finite(scales.view(torch.float8_e8m0fnu), name)
    scales = finite(scales.float(), name).reshape(out, -1)
    if second := tensors.get("weight_scale_second"):
        scales = scales * finite(get(second).float(), second)
    return scales.expand(out, weight.groups(inn)).contiguous()


def _quotient(product: Tensor, factor: Tensor, name: str) -> Tensor:
    """float32 s whose product with ``factor`` is ``product`` again, where there is such a number, else the nearest."""
    if not bool(factor):
        raise FormatError(f"{name} cannot be divided by an input_scale of zero")
    quotient = product / factor
    for neighbour in (torch.nextafter(quotient, quotient.new_tensor(end)) for end in (torch.inf, -torch.inf)):
        quotient = torch.where((quotient * factor != product) & (neighbour * factor == product), neighbour, quotient)
    return quotient


def _unsigned(values: Tensor, bits: int, name: str) -> Tensor:
    """Signed int8 numbers as unsigned codes; FormatError where they need more bits than their type has."""
    half = 2 ** (bits - 1)
    if values.numel() and (int(values.min()) < -half or int(values.max()) >= half):
        raise FormatError(f"{name} holds numbers outside of {-half}..{half - 1}, not {bits}-bit")
    return (values.to(torch.int16) + half).to(torch.uint8)


def _zero_points(offset: Tensor, bits: int, name: str) -> Tensor:
    """Zero points uint8 of signed float offsets; FormatError where they are no integers of so many bits."""
    zeros = offset + 2 ** (bits - 1)
    if not bool(((zeros >= 0) & (zeros < 2**bits) & (zeros == torch.round(zeros))).all()):
        raise FormatError(f"{name} holds offsets that are no {bits}-bit integers")
    return zeros.to(torch.uint8).reshape(offset.shape[0], -1)


def _symmetric_zeros(tensors: Mapping[str, str], kind: str, get: Get) -> None:
    for name in ("weight_offset", "weight_offset_second"):
        if name in tensors and bool(get(tensors[name]).float().any()):
            raise FormatError(f"{tensors[name]} is not zero, but {kind} has symmetric weights")


def _input_zero(offset: Tensor, name: str) -> Tensor:
    zero = offset.float().reshape(1)
    if not bool((zero == torch.round(zero)) & (zero.abs() <= 128)):
        raise FormatError(f"{name} is {zero.item()}, not an integer of -128..127")
    return zero.to(torch.int32)


def _offset(packed: PackedWeight) -> Tensor:
    """The zero point of its static activations, 0 where they are symmetric."""
    return torch.zeros(1, dtype=torch.int32) if packed.input_zero is None else packed.input_zero


def _scale_bias(packed: PackedWeight, chunks: int) -> Tensor:
    """8 * sum(W) of each row, float32 [out, chunks], over chunks of the inputs."""
    weight = numerics.dequantize_packed(packed, torch.float32)
    return 8 * weight.unflatten(1, (chunks, -1)).sum(2)


def _check_scale_bias(stored: Tensor, packed: PackedWeight, name: str) -> None:
    """FormatError unless the correction of the hardware's offset fits the weight; old exporters round to bfloat16."""
    stored = stored.float().reshape(packed.shape[0], -1)
    if packed.shape[1] % stored.shape[1]:
        raise FormatError(f"{name} has {stored.shape[1]} chunks, which {packed.shape[1]} inputs are not")
    weight = numerics.dequantize_packed(packed, torch.float32).unflatten(1, (stored.shape[1], -1))
    difference = (stored - 8 * weight.sum(2)).abs()
    if bool((difference > 0.02 * 8 * weight.abs().sum(2) + 1e-6).any()):
        raise FormatError(f"{name} is not 8 * sum(weight): weight and scales are not those that it was made from")
