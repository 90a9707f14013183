"""compressed-tensors: what llm-compressor writes, and vLLM, SGLang and transformers read. Our native format.

Integer weights only, in two layouts (compressed-tensors 0.20, ``compressors/pack_quantized`` and ``naive_quantized``):

    pack-quantized   weight_packed int32 [out, ceil(in * bits / 32)]: codes plus 2 ** (bits - 1), a little-endian bit
                     stream along ``in``; weight_shape int64 [2]; asymmetric: weight_zero_point int32
                     [ceil(out * bits / 32), groups], the same stream along ``out``; act-order: weight_g_idx int32 [in]
    int-quantized    weight int8 [out, in], the codes as they are; asymmetric: weight_zero_point int8 [out, groups]

Both have weight_scale, float [out, groups]. Before 0.18 the package put 32 // bits codes into each word of 3, 5, 6 and
7 bits and left the top bits empty; such files are read and told apart by their width.

Weight-only schemes are written as pack-quantized, quantized activations as int-quantized. weight_g_idx is written for a
permuted weight with groups; compressed-tensors 0.19 dropped it, so only older readers take it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..errors import ConfigError, FormatError, UnsupportedError
from ..types import ActivationType, PackedWeight, Scheme, WeightType
from . import Shape, StoredSite, TensorHeader
from ._words import from_words, is_padded, to_words, unpack_words, width

_FLOATS = ("BF16", "F16", "F32", "F64")
_PACKED, _PLAIN = "pack-quantized", "int-quantized"
_MARKS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale")
_METHODS = ("compressed-tensors", "sparseml")
_VERSION = "0.18.0"  # the first with the dense bit stream for every width


class CompressedTensors:
    """Reads and writes integer weights, and dynamic int8 activations per token."""

    name, side_files = "compressed-tensors", ()

    def detect(self, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> bool:
        """Whether config.json says so; the same section lies under "compression_config" in old files."""
        return _section(config) is not None

    def sites(
        self, config: Mapping[str, Any], headers: Mapping[str, TensorHeader], linears: Mapping[str, Shape]
    ) -> tuple[StoredSite, ...]:
        """Every quantized Linear; see ``Format.sites``."""
        section = _section(config) or {}
        _refuse_extras(section)
        by_module: dict[str, dict[str, TensorHeader]] = {}
        for header in headers.values():
            module, _, suffix = header.name.rpartition(".")
            by_module.setdefault(module, {})[suffix] = header
        for module, stored in by_module.items():
            marks = [stored[mark] for mark in _MARKS if mark in stored]
            if marks and module not in linears:
                raise UnsupportedError(
                    f"{marks[0].file}: {marks[0].name} belongs to a quantized module that is no Linear of this model; "
                    "only Linears are read in this format"
                )
        found = (_site(name, shape, by_module.get(name, {}), section) for name, shape in linears.items())
        return tuple(site for site in found if site)

    def read(self, site: StoredSite, get: Callable[[str], Tensor]) -> PackedWeight:
        """The canonical weight; bit for bit what compressed-tensors' own decompression multiplies."""
        weight, (out, inn) = site.scheme.weight, site.shape
        scales = get(f"{site.name}.weight_scale")
        if not torch.isfinite(scales).all():
            raise FormatError(f"{site.name}.weight_scale holds NaN or infinity; the checkpoint is damaged")
        zeros = get(f"{site.name}.weight_zero_point") if not weight.symmetric else None
        if site.layout["packed"]:
            stored = get(f"{site.name}.weight_shape").tolist()
            if stored != [out, inn]:
                raise FormatError(f"{site.name}.weight_shape says {stored}, but the model's Linear is {[out, inn]}")
            padded = site.layout["padded"]
            codes = from_words(get(f"{site.name}.weight_packed"), weight.bits, inn, padded)
            if zeros is not None:
                zeros = unpack_words(zeros.t(), weight.bits, out, padded).t().contiguous()
        else:
            codes = numerics.pack_codes(
                _unsigned(get(f"{site.name}.weight"), weight.bits, f"{site.name}.weight"), weight.bits
            )
            zeros = None if zeros is None else _unsigned(zeros, weight.bits, f"{site.name}.weight_zero_point")
        scales = scales.reshape(-1, weight.groups(inn)).expand(out, -1).contiguous()
        permutation = None
        if site.layout["g_idx"]:
            permutation = _permutation(get(f"{site.name}.weight_g_idx"), weight, site)
        if permutation is not None:
            columns = numerics.unpack_codes(codes, weight.bits, inn)[:, permutation.long()]
            codes = numerics.pack_codes(columns, weight.bits)
        return PackedWeight(site.scheme, site.shape, codes, scales, zeros, permutation)

    def refuses(self, scheme: Scheme, shape: Shape, packed: PackedWeight | None = None) -> str:
        """Why a scheme cannot be written; every scheme that qcompile has today can."""
        if scheme.activation and not scheme.activation.dynamic:
            return "static activation scales are not written yet"
        return ""

    def write(self, name: str, packed: PackedWeight) -> dict[str, Tensor]:
        """The tensors of one module; the inverse of ``read``."""
        weight, (out, inn) = packed.scheme.weight, packed.shape
        codes, tensors = packed.codes, {}
        if packed.permutation is not None:
            columns = numerics.unpack_codes(codes, weight.bits, inn)
            order = packed.permutation.long()
            codes = numerics.pack_codes(torch.empty_like(columns).index_copy_(1, order, columns), weight.bits)
            if weight.groups(inn) > 1 and weight.group_size:
                groups = torch.arange(inn, dtype=torch.int32, device=codes.device) // weight.group_size
                tensors["weight_g_idx"] = torch.empty_like(groups).index_copy_(0, order, groups)
        if packed.scheme.activation:
            tensors["weight"] = numerics.signed_codes(codes)
        else:
            tensors["weight_packed"] = to_words(codes)
            tensors["weight_shape"] = torch.tensor([out, inn], dtype=torch.int64)
            if packed.zeros is not None:
                zeros = numerics.pack_codes(packed.zeros.t().contiguous(), weight.bits)
                tensors["weight_zero_point"] = to_words(zeros).t().contiguous()
        tensors["weight_scale"] = packed.scales
        return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}

    def quantization_config(self, sites: Sequence[StoredSite], float_modules: Sequence[str]) -> dict[str, Any]:
        """The section of config.json: one group per scheme, targeted by class when it is the only one."""
        groups: dict[tuple[Scheme, bool], list[str]] = {}
        for site in sites:
            permuted = f"{site.name}.weight_g_idx" in site.tensors
            groups.setdefault((site.scheme, permuted), []).append(site.name)
        described = [
            _describe(scheme, permuted, ["Linear"] if len(groups) == 1 else names)
            for (scheme, permuted), names in groups.items()
        ]
        formats = {group["format"] for group in described}
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
        }


FORMAT = CompressedTensors()


# -------------------------------------------------------------------------------------------------- configuration


def _section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            section = place.get(key)
            if not isinstance(section, Mapping):
                continue
            if section.get("quant_method", "compressed-tensors" if "config_groups" in section else "") in _METHODS:
                return section
    return None


def _refuse_extras(section: Mapping[str, Any]) -> None:
    """UnsupportedError for what changes the model's numbers and is not a scheme of one weight."""
    status = section.get("quantization_status") or "compressed"
    if status != "compressed":
        raise UnsupportedError(
            f"config.json: quantization_status is {status!r}: the weights are floats that imitate quantization; "
            "save the checkpoint compressed"
        )
    if section.get("kv_cache_scheme"):
        raise UnsupportedError("config.json: kv_cache_scheme: a quantized key-value cache is not supported yet")
    transforms = section.get("transform_config") or {}
    if transforms.get("config_groups") if isinstance(transforms, Mapping) else transforms:
        raise UnsupportedError("config.json: transform_config: online rotations are not supported yet")
    sparsity = section.get("sparsity_config") or {}
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise UnsupportedError(f"config.json: sparsity_config: {sparsity['format']!r} weights are not supported")
    if not isinstance(section.get("config_groups"), Mapping) or not section["config_groups"]:
        raise FormatError("config.json: quantization_config has no config_groups, so no weight has a scheme")


def _matches(name: str, pattern: Any) -> int:
    """How closely a target or ignore pattern names the Linear ``name``: 3 exactly, 2 by regex, 1 by class, 0 not."""
    if not isinstance(pattern, str):
        raise FormatError(f"config.json: targets and ignore hold names, not {pattern!r}")
    if pattern.startswith("re:"):
        try:
            return 2 if re.match(pattern[3:], name) else 0
        except re.error as error:
            raise FormatError(f"config.json: {pattern!r} is not a regular expression: {error}") from None
    return 3 if pattern == name else 1 if pattern in ("Linear", "Module") else 0


def _group(name: str, section: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The config group of a Linear: an exact name beats a regex, which beats the class; ignored wins over all."""
    if any(_matches(name, pattern) for pattern in section.get("ignore") or ()):
        return None
    best, closest = None, 0
    for label, group in section["config_groups"].items():
        if not isinstance(group, Mapping):
            raise UnsupportedError(
                f"config.json: config group {label!r} is a preset's name with a list of targets; write out its "
                "targets and weights"
            )
        match = max((_matches(name, target) for target in group.get("targets") or ()), default=0)
        if match > closest and group.get("weights"):
            best, closest = (label, group), match
    return best


def _scheme(name: str, group: Mapping[str, Any], inn: int) -> Scheme:
    """The scheme of a config group; UnsupportedError says what of it is not."""

    def refuse(what: str) -> UnsupportedError:
        return UnsupportedError(f"{name}: {what}, which qcompile does not read from compressed-tensors yet")

    weights, inputs = group["weights"], group.get("input_activations")
    if not isinstance(weights, Mapping) or not isinstance(inputs or {}, Mapping):
        raise FormatError(
            f"config.json: weights and input_activations of the group that targets {name} must be objects"
        )
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    if kind != "int":
        raise refuse(f"weights are {bits}-bit {kind}" + (" (fp8)" if bits == 8 else " (nvfp4 or mxfp4)" * (bits == 4)))
    size = weights.get("group_size")
    if not isinstance(size, int | None):
        raise FormatError(f"config.json: the group that targets {name} has group_size {size!r}")
    strategy = weights.get("strategy") or ("tensor" if size is None else "group" if size > 0 else "channel")
    if strategy not in ("tensor", "channel", "group"):
        raise refuse(f"weights are quantized per {strategy}")
    if strategy == "group" and (size is None or size < 1):
        raise FormatError(f"config.json: the group that targets {name} has strategy 'group' and group_size {size!r}")
    if strategy == "tensor" and not weights.get("symmetric", True):
        raise refuse("weights are asymmetric with one scale for the whole tensor")
    if group.get("output_activations"):
        raise refuse("its outputs are quantized")
    activation = None
    if inputs:
        described = f"{inputs.get('num_bits', 8)}-bit {inputs.get('type', 'int')} activations"
        if inputs.get("type", "int") != "int" or inputs.get("num_bits", 8) != 8:
            raise refuse(f"it has {described}")
        if inputs.get("dynamic") is not True:
            raise refuse(f"it has static {described} (a stored input_scale)")
        if inputs.get("strategy") not in (None, "token") or not inputs.get("symmetric", True):
            raise refuse(f"it has {described} that are not symmetric per token")
        activation = ActivationType(8)
    try:
        weight = WeightType(bits, bool(weights.get("symmetric", True)), size if strategy == "group" else None)
        return Scheme(weight, activation)
    except ConfigError as error:
        raise UnsupportedError(f"{name}: qcompile has no such scheme yet: {error}") from None


def _describe(scheme: Scheme, permuted: bool, targets: list[str]) -> dict[str, Any]:
    """One config group, in the words of compressed-tensors' QuantizationScheme."""
    weight = scheme.weight
    weights = {
        "num_bits": weight.bits,
        "type": "int",
        "symmetric": weight.symmetric,
        "strategy": "group" if weight.group_size else "channel",
        "group_size": weight.group_size,
        "dynamic": False,
        "actorder": "group" if permuted else None,
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs if scheme.activation else None,
        "output_activations": None,
        "format": _PLAIN if scheme.activation else _PACKED,
    }


# -------------------------------------------------------------------------------------------------------- headers


def _site(name: str, shape: Shape, stored: Mapping[str, TensorHeader], section: Mapping[str, Any]) -> StoredSite | None:
    """The Linear ``name`` as stored, or None when config and headers agree that it is float."""
    marks = [stored[mark] for mark in _MARKS if mark in stored]
    plain = stored.get("weight")
    codes = plain if plain and plain.dtype not in _FLOATS else None
    found = _group(name, section)
    if found is None:
        for header in [*marks, *([codes] if codes else [])]:
            raise FormatError(
                f"{header.file}: {header.name} is stored quantized, but config.json ignores {name} or has no group "
                "that targets it"
            )
        return None
    label, group = found
    if not marks and not codes:
        if plain is None:
            return None  # tied to another module, or missing: whoever fills the model knows
        raise FormatError(
            f"{plain.file}: {plain.name} is float ({plain.dtype}), but config group {label!r} targets {name} and "
            "config.json does not ignore it"
        )
    if plain and "weight_packed" in stored:
        raise FormatError(f"{plain.file}: both {plain.name} and {name}.weight_packed are stored; one of them is wrong")
    scheme = _scheme(name, group, shape[1])
    layout = group.get("format") or section.get("format")
    if layout in (None, "mixed-precision"):
        layout = _PLAIN if scheme.activation else _PACKED
    if layout not in (_PACKED, _PLAIN, "naive-quantized"):
        raise UnsupportedError(
            f"{name}: layout {layout!r} of compressed-tensors is not read; known: {_PACKED}, {_PLAIN}"
        )
    padded = layout == _PACKED and _is_padded(stored, shape, scheme.weight.bits, section)
    reads = dict(_expected(shape, scheme, layout == _PACKED, padded))
    actorder = group["weights"].get("actorder")
    if "weight_g_idx" in stored or actorder in (True, "group", "dynamic"):
        reads["weight_g_idx"] = (("I32", "I64"), ((shape[1],),))
    for suffix, (dtypes, shapes) in reads.items():
        where = next(iter(stored.values())).file
        header = stored.get(suffix)  # type: ignore[assignment]
        wanted = f"{' or '.join(dtypes)} {' or '.join(str(list(s)) for s in shapes)}"
        about = f"config group {label!r} makes {name} {scheme}, {layout}, of shape {list(shape)}"
        if header is None:
            raise FormatError(f"{where}: {name}.{suffix} is missing: {about}, which needs it as {wanted}")
        if header.dtype not in dtypes or header.shape not in shapes:
            raise FormatError(
                f"{header.file}: {header.name} is {header.dtype} {list(header.shape)}, but must be {wanted}: {about}"
            )
    return StoredSite(
        name,
        scheme,
        shape,
        tuple(f"{name}.{suffix}" for suffix in reads),
        {"packed": layout == _PACKED, "padded": padded, "g_idx": "weight_g_idx" in reads},
    )


def _is_padded(stored: Mapping[str, TensorHeader], shape: Shape, bits: int, section: Mapping[str, Any]) -> bool:
    """Whether words have unused bits: by the width of codes or zeros; where neither tells, by the writer's version."""
    for suffix, n, axis in (("weight_packed", shape[1], 1), ("weight_zero_point", shape[0], 0)):
        header = stored.get(suffix)
        if header and len(header.shape) == 2 and (known := is_padded(header.shape[axis], n, bits)) is not None:
            return known
    numbers = re.match(r"(\d+)\.(\d+)", str(section.get("version")))
    return 32 % bits != 0 and numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, 18)


_Expectation = tuple[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]]


def _expected(shape: Shape, scheme: Scheme, packed: bool, padded: bool) -> Iterator[_Expectation]:
    """(suffix, (dtypes, shapes)) of every tensor that a scheme has in a layout."""
    (out, inn), weight = shape, scheme.weight
    groups = weight.groups(inn)
    scale_shapes: tuple[tuple[int, ...], ...] = ((out, groups),)
    if weight.group_size is None:
        scale_shapes = ((out, 1), (1,), ())  # one scale for the whole weight is repeated for each channel
    yield "weight_scale", (_FLOATS, scale_shapes)
    if packed:
        yield "weight_packed", (("I32",), ((out, width(inn, weight.bits, padded)),))
        yield "weight_shape", (("I64",), ((2,),))
        if not weight.symmetric:
            yield "weight_zero_point", (("I32",), ((width(out, weight.bits, padded), groups),))
    else:
        yield "weight", (("I8",), ((out, inn),))
        if not weight.symmetric:
            yield "weight_zero_point", (("I8",), ((out, groups),))


# ------------------------------------------------------------------------------------------------------ tensor data


def _unsigned(values: Tensor, bits: int, name: str) -> Tensor:
    """Signed int8 numbers as unsigned codes; FormatError where they need more bits than the config says."""
    codes = (values ^ -128).view(torch.uint8) if bits == 8 else (values + 2 ** (bits - 1)).view(torch.uint8)
    if bits < 8 and values.numel() and int(codes.max()) >= 2**bits:
        raise FormatError(
            f"{name} holds numbers outside of {-(2 ** (bits - 1))}..{2 ** (bits - 1) - 1}, not {bits}-bit"
        )
    return codes


def _permutation(g_idx: Tensor, weight: WeightType, site: StoredSite) -> Tensor | None:
    """Columns in order of their group, or None when they are; -1 means that no order was kept."""
    name, inn = f"{site.name}.weight_g_idx", site.shape[1]
    if weight.group_size is None or bool((g_idx == -1).all()):
        return None
    trivial = torch.arange(inn, dtype=g_idx.dtype) // weight.group_size
    if torch.equal(g_idx, trivial):
        return None
    if not torch.equal(g_idx.sort().values, trivial):
        raise FormatError(
            f"{name} must assign {weight.group_size} columns to each of {weight.groups(inn)} groups; "
            "uneven groups cannot be stored in the canonical layout"
        )
    return torch.argsort(g_idx, stable=True).to(torch.int32)
