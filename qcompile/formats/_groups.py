"""The quantization section of compressed-tensors: which module belongs to which config group, and what it means.

A group has targets (names, ``re:`` regular expressions or classes) and two QuantizationArgs, for weights and for input
activations (compressed-tensors 0.20, ``quantization/quant_args.py``); ignored modules belong to none. Beside the class
"Linear", the experts of a layer are known as "MoEGMM", as the CANN recipes call them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..errors import ConfigError, FormatError, UnsupportedError
from ..types import ActivationType, Scheme, WeightType
from ._patterns import matches

EXPERTS = "MoEGMM"
_CLASSES = ("Linear", "Module")
_METHODS = ("compressed-tensors", "sparseml")
_LAYOUTS = {  # by the number of a weight; the first is the default
    "fp8": ("float-quantized", "naive-quantized"),
    "nvfp4": ("nvfp4-pack-quantized",),
    "mxfp4": ("mxfp4-pack-quantized",),
    "mxfp8": ("mxfp8-quantized",),
}
_INTEGERS = ("pack-quantized", "int-quantized", "naive-quantized")


def section_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section of a config.json; under "compression_config" in old files.

    The CANN recipes name their files "modelslim", whose own ones have no config_groups.
    """
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            section = place.get(key)
            if not isinstance(section, Mapping):
                continue
            method, has_groups = section.get("quant_method"), "config_groups" in section
            if method in _METHODS or (has_groups and method in (None, "modelslim")):
                return section
    return None


def refuse_extras(section: Mapping[str, Any]) -> None:
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


def group_of(name: str, section: Mapping[str, Any], is_expert: bool) -> tuple[str, Mapping[str, Any]] | None:
    """Label and config group of a Linear, None for one that is ignored or that no group targets.

    An exact name beats a regular expression, which beats a class; of classes, the narrower one.
    """
    if any(_matches(name, pattern, is_expert) for pattern in _list(section, "ignore")):
        return None
    best, closest = None, 0
    for label, group in section["config_groups"].items():
        if not isinstance(group, Mapping):
            raise UnsupportedError(
                f"config.json: config group {label!r} is a preset's name with a list of targets; write out its "
                "targets and weights"
            )
        match = max((_matches(name, target, is_expert) for target in _list(group, "targets")), default=0)
        if match > closest and group.get("weights"):
            best, closest = (label, group), match
    return best


def is_within_ignored(name: str, section: Mapping[str, Any]) -> bool:
    """Whether a module that contains ``name`` is ignored; the package itself takes full names and ``re:`` only."""
    return any(isinstance(part, str) and name.startswith(f"{part}.") for part in _list(section, "ignore"))


def check_clips(section: Mapping[str, Any], clipped: Collection[str]) -> None:
    """FormatError for a group that says that activations are clipped, when none of its modules (clipped) has a clip."""
    for label, group in section["config_groups"].items():
        if isinstance(group, Mapping) and group.get("activation_use_clip") and label not in clipped:
            raise FormatError(
                f"config.json: config group {label!r} says activation_use_clip, but no module of it has a stored "
                "alpha; set it to false if the activations are not clipped"
            )


def _list(holder: Mapping[str, Any], key: str) -> list | tuple:
    values = holder.get(key) or ()
    if not isinstance(values, list | tuple):
        raise FormatError(f"config.json: {key} must be a list of names, not {values!r}")
    return values


def _matches(name: str, pattern: Any, is_expert: bool) -> int:
    """How closely a pattern names the Linear ``name``: 4 exactly, 3 by regex, 2 or 1 by class, 0 not."""
    if not isinstance(pattern, str):
        raise FormatError(f"config.json: targets and ignore hold names, not {pattern!r}")
    if pattern.startswith("re:"):
        return 3 if matches(pattern[3:], name, "targets or ignore") else 0
    if pattern == EXPERTS:
        return 2 if is_expert else 0
    return 4 if pattern == name else 1 if pattern in _CLASSES else 0


# ----------------------------------------------------------------------------------------------- from group to scheme


def scheme_of(name: str, group: Mapping[str, Any], layout: Any, clips: bool) -> Scheme:
    """The scheme of a config group; UnsupportedError says what of it is not read.

    layout: what the config says about the layout, since mxfp8 and fp8 in groups of 32 are described alike. clips:
    whether the module has a stored clip.
    """
    weights, inputs = group["weights"], group.get("input_activations")
    if not isinstance(weights, Mapping) or not isinstance(inputs or {}, Mapping):
        raise FormatError(
            f"config.json: weights and input_activations of the group that targets {name} must be objects"
        )
    if group.get("output_activations"):
        raise _refused(name, "its outputs are quantized")
    if clips and not group.get("activation_use_clip"):
        raise FormatError(f"config.json: a clip is stored for {name}, but its group does not say activation_use_clip")
    try:
        weight = _weight(name, weights, layout)
        return Scheme(weight, _activation(name, inputs, weight, clips) if inputs else None)
    except ConfigError as error:
        raise UnsupportedError(f"{name}: qcompile has no such scheme yet: {error}") from None


def _refused(name: str, what: str) -> UnsupportedError:
    return UnsupportedError(f"{name}: {what}, which qcompile does not read from compressed-tensors yet")


def _size(name: str, arguments: Mapping[str, Any], key: str, default: int | None) -> int | None:
    value = arguments.get(key, default)
    if type(value) is not int and (value is not None or default is not None):
        raise FormatError(f"config.json: the group that targets {name} has {key} {value!r}")
    return value


def _weight(name: str, arguments: Mapping[str, Any], layout: Any) -> WeightType:
    bits, kind = _size(name, arguments, "num_bits", 8), arguments.get("type", "int")
    size, symmetric = _size(name, arguments, "group_size", None), bool(arguments.get("symmetric", True))
    strategy = arguments.get("strategy") or ("tensor" if size is None else "group" if size > 0 else "channel")
    known = {
        "int": ("tensor", "channel", "group"),
        "float": ("tensor", "channel", "group", "block", "tensor_group"),
    }
    if not (isinstance(kind, str) and isinstance(strategy, str)) or strategy not in known.get(kind, ()):
        raise _refused(name, f"weights are {bits}-bit {kind}, quantized per {strategy}")
    if "group" in strategy and (size is None or size < 1):
        raise FormatError(
            f"config.json: the group that targets {name} has strategy {strategy!r} and group_size {size!r}"
        )
    in_groups = size if strategy == "group" else None
    assert bits is not None
    if kind == "int":
        if strategy == "tensor" and not symmetric:
            raise _refused(name, "weights are asymmetric with one scale for the whole tensor")
        return WeightType(bits, symmetric, in_groups)
    if bits == 4 and (size == 16 or strategy == "tensor_group"):
        return WeightType(4, symmetric, size, "nvfp4")
    if bits == 4 and size == 32:
        return WeightType(4, symmetric, size, "mxfp4")
    if bits == 8 and (layout == "mxfp8-quantized" or arguments.get("scale_dtype") == "torch.uint8"):
        return WeightType(8, symmetric, size, "mxfp8")
    if bits != 8:
        raise _refused(name, f"weights are {bits}-bit float in groups of {size}")
    return WeightType(8, symmetric, in_groups, "fp8", _block(name, arguments, strategy), strategy == "tensor")


def _block(name: str, arguments: Mapping[str, Any], strategy: str) -> tuple[int, int] | None:
    block = arguments.get("block_structure")
    if strategy != "block":
        return None
    if isinstance(block, str):
        block = [int(side) if side.isdigit() else side for side in block.split("x")]  # as old versions wrote it
    if not isinstance(block, list | tuple) or len(block) != 2 or any(type(side) is not int for side in block):
        raise FormatError(f"config.json: the group that targets {name} has block_structure {block!r}")
    return block[0], block[1]


def _activation(name: str, arguments: Mapping[str, Any], weight: WeightType, clips: bool) -> ActivationType:
    bits, kind = _size(name, arguments, "num_bits", 8), arguments.get("type", "int")
    size, dynamic = _size(name, arguments, "group_size", None), arguments.get("dynamic", False)
    symmetric = bool(arguments.get("symmetric", True))
    described = f"{'dynamic' if dynamic else 'static'} {bits}-bit {kind} activations"
    assert bits is not None
    if kind == "float" and weight.number not in ("int", "fp8"):
        if bits != weight.bits or size != weight.group_size or not dynamic:
            raise _refused(name, f"it has {described} in groups of {size} beside {weight.number} weights")
        return ActivationType(bits, True, symmetric, weight.number, size)
    strategy = arguments.get("strategy") or ("group" if size and size > 0 else "token" if dynamic else "tensor")
    wanted = ("token", "group") if kind == "float" and dynamic else ("token",) if dynamic else ("tensor",)
    if strategy not in wanted or dynamic not in (True, False) or (kind == "float" and bits != 8):
        raise _refused(name, f"it has {described} per {strategy}")
    number = "int" if kind == "int" else "fp8"
    return ActivationType(bits, dynamic, symmetric, number, size if strategy == "group" else None, clips)


def layout_of(name: str, group: Mapping[str, Any], section: Mapping[str, Any], scheme: Scheme) -> str:
    """The layout of a module's tensors: its group's, the section's, or what the package infers for its scheme."""
    layout = group.get("format") or section.get("format")
    known = _LAYOUTS.get(scheme.weight.number, _INTEGERS)
    if layout in (None, "mixed-precision"):
        return default_layout(scheme)
    if layout not in known:
        raise UnsupportedError(
            f"{name}: layout {layout!r} of compressed-tensors is not read for {scheme}; known: {', '.join(known)}"
        )
    return str(layout)


def default_layout(scheme: Scheme) -> str:
    """The layout in which the package stores a scheme."""
    if scheme.weight.number != "int":
        return _LAYOUTS[scheme.weight.number][0]
    return _INTEGERS[1] if scheme.activation else _INTEGERS[0]


# ----------------------------------------------------------------------------------------------- from scheme to group


def describe(scheme: Scheme, permuted: bool, targets: list[str]) -> dict[str, Any]:
    """One config group, in the words of compressed-tensors' QuantizationScheme."""
    weight, activation = scheme.weight, scheme.activation
    kind = {"type": "int" if weight.number == "int" else "float"}
    strategy = "tensor_group" if weight.number == "nvfp4" else "group" if weight.group_size else "channel"
    if weight.per_tensor or weight.block:
        strategy = "block" if weight.block else "tensor"
    scale_dtype = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8", "mxfp8": "torch.uint8"}.get(weight.number)
    scales = {"scale_dtype": scale_dtype} if scale_dtype else {}
    weights = {
        "num_bits": weight.bits,
        **kind,
        "symmetric": weight.symmetric,
        "strategy": strategy,
        "group_size": weight.group_size,
        **({"block_structure": list(weight.block)} if weight.block else {}),
        "dynamic": False,
        "actorder": "group" if permuted else None,
        **scales,
    }
    inputs = None
    if activation:
        per = "group" if activation.group_size else "token" if activation.dynamic else "tensor"
        inputs = {
            "num_bits": activation.bits,
            **kind,
            "symmetric": activation.symmetric,
            "strategy": "tensor_group" if activation.number == "nvfp4" else per,
            **({"group_size": activation.group_size} if activation.group_size else {}),
            "dynamic": "local" if activation.number == "nvfp4" else activation.dynamic,
            **scales,
        }
    clip = {"activation_use_clip": True} if activation and activation.clip else {}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": default_layout(scheme),
        **clip,
    }
