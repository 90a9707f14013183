"""Model classes without weights: built from a config alone, filled tensor by tensor.

Everything that only transformers models have is here: classes by name, rotary buffers, tied embeddings, generation
config and tokenizer files. transformers is imported when a function needs it.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .errors import ConfigError, FormatError, UnsupportedError, shortened
from .formats import Format
from .modules import FloatWeight, QuantWeight
from .storage import CONFIG, PLAIN_CONFIG, read_json, write_json

_GENERATION = "generation_config.json"
_NUMBERS_PER_BYTE = 16  # of a model in a file; 2-bit weights have 4, and an incomplete file is to be reported as such
_COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "*.spm",
    "spiece.model", "sentencepiece*.model", "chat_template*", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def is_transformers(model: nn.Module) -> bool:
    """Whether ``model`` is a PreTrainedModel; decided without importing transformers."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__)


def resolve(path: str | Path, allow_download: bool = False) -> Path:
    """The local folder of a checkpoint: a path, or a hub id in huggingface_hub's cache.

    The network is used only with ``allow_download``. ConfigError when there is no such folder.
    """
    folder = Path(path)
    if folder.exists() or not isinstance(path, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", *_COMPANIONS]
    try:
        return Path(snapshot_download(path, local_files_only=not allow_download, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        hint = "" if allow_download else "; pass allow_download=True to fetch it from the hub"
        raise ConfigError(f"{path!r} is neither a folder nor in the local hub cache{hint} ({error})") from None


# -------------------------------------------------------------------------------------------------------- building


def build(folder: Path, dtype: torch.dtype, tensors: int, stored_bytes: int) -> nn.Module:
    """The model that config.json describes, on the meta device; buffers that no file holds are real.

    Code that a checkpoint brings along is never run. FormatError when transformers cannot build it, or when a model of
    that size cannot be in ``tensors`` tensors of ``stored_bytes``: a damaged config must not fill the memory.
    """
    import transformers

    _check_depth(folder, tensors)
    registered = itertools.count()

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        if next(registered) > 16 * tensors + 1000:
            raise FormatError(f"it has more parameters than {tensors} stored tensors can fill")

    handle = register_module_parameter_registration_hook(count)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for part in _parts(config):
            if hasattr(part, "quantization_config"):
                del part.quantization_config  # or transformers would quantize by itself
        cls: Any = getattr(transformers, next(iter(config.architectures or ()), ""), None)
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            cls = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        with torch.device("meta"):
            model = cls._from_config(config, dtype=dtype)
        if (folder / _GENERATION).is_file() and model.can_generate():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a foreign config can make transformers raise anything
        raise FormatError(f"{folder / CONFIG}: transformers cannot build a model from it: {error}") from error
    finally:
        handle.remove()
    numbers = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    if numbers > _NUMBERS_PER_BYTE * stored_bytes + 2**26:
        raise FormatError(
            f"{folder / CONFIG} describes a model of {numbers:,} numbers, for which files of {stored_bytes:,} bytes "
            "are too small"
        )
    model.tie_weights()
    _rebuild_buffers(model)
    model.config._name_or_path = model.name_or_path = str(folder)
    return model


def _check_depth(folder: Path, tensors: int) -> None:
    """FormatError for more layers than the stored tensors can fill; transformers would make lists of them."""
    pending: list[Any] = [read_json(folder / CONFIG)]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
            deep = [k for k, v in value.items() if "layer" in k and type(v) is int and v > 16 * tensors + 1000]
            if deep:
                held = f"but the files hold {tensors} tensors"
                raise FormatError(f"{folder / CONFIG}: {deep[0]} is {value[deep[0]]}, {held}")
        elif isinstance(value, list):
            pending += value


def head_name(model: Any) -> str:
    """The name of the output embeddings (lm_head) of a transformers model, or ""."""
    head = model.get_output_embeddings() if is_transformers(model) else None
    return next((name for name, module in model.named_modules() if head is not None and module is head), "")


def untie(model: Any) -> None:
    """Have neither config nor model claim that input and output embeddings are one tensor."""
    for part in _parts(model.config):
        part.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _parts(config: Any) -> tuple[Any, ...]:
    return (config, config.get_text_config())


@torch.no_grad()
def _rebuild_buffers(model: Any) -> None:
    """Compute the buffers that checkpoints leave out (rotary frequencies, embedding scales), as from_pretrained does.

    ``_init_weights`` of transformers 5 must fill them. It runs over two different backgrounds: what differs
    afterwards was not filled.
    """
    from transformers import PreTrainedModel

    parents = {"": model}
    for name, module in model.named_modules():
        owner = module if isinstance(module, PreTrainedModel) else parents[name.rpartition(".")[0]]
        parents[name] = owner
        missing = [k for k in module._non_persistent_buffers_set if getattr(module, k, None) is not None]
        if not missing:
            continue
        filled = []
        for background in (0, 1):
            for key in missing:
                module._buffers[key] = torch.full_like(module._buffers[key], background, device="cpu")
            owner._init_weights(module)
            filled.append([module._buffers[key].clone() for key in missing])
        unfilled = [f"{name}.{k}" for k, a, b in zip(missing, *filled, strict=True) if not torch.equal(a, b)]
        if unfilled:
            raise UnsupportedError(
                f"{type(model).__name__} keeps {shortened(unfilled)} outside of checkpoints and does not say how to "
                "compute it; build the model yourself and pass it as model="
            )


# --------------------------------------------------------------------------------------------------------- filling


@dataclass(frozen=True)
class Slot:
    """One float parameter or persistent buffer: all names it goes by, and all (module, key) that hold it."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def fill(self, tensor: Tensor) -> None:
        """Put a loaded tensor into every place, frozen where it is a parameter."""
        parameter = nn.Parameter(tensor, requires_grad=False)
        for module, key in self.places:
            if key in module._parameters:
                module._parameters[key] = parameter
            else:
                module._buffers[key] = tensor


def slots(model: nn.Module, without: Container[tuple[int, str]] = ()) -> list[Slot]:
    """The slots of ``model``, in its order: none of a quantized or fused weight, nor of (id of a module, key)."""
    found: dict[Any, Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantWeight | FloatWeight):
            continue
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            name = f"{prefix}.{key}".lstrip(".")
            if tensor is None or key in module._non_persistent_buffers_set:
                continue
            if (id(module), key) in without:
                continue
            slot = found.setdefault(_identity(tensor), Slot(tensor))
            slot.names.append(name)
            slot.places.append((module, key))
    return list(found.values())


def ignored_patterns(model: nn.Module) -> list[str]:
    """Regular expressions of stored names that transformers ignores for this model, such as old rotary buffers."""
    if not is_transformers(model):
        return []
    return [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]  # type: ignore[misc]


def _identity(tensor: Tensor) -> Any:
    """Equal for tensors that share all of their memory."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


# ----------------------------------------------------------------------------------------------------------- norms


def add_bias(model: nn.Module, name: str) -> None:
    """Give the norm or Linear called ``name`` a parameter ``bias``, still to be filled, that is added to its result.

    Smoothing with a shift (ModelSlim's anti-outlier) moves the mean of activations there. FormatError where there is
    none that lacks a bias.
    """
    module = dict(model.named_modules()).get(name)
    weight = module._parameters.get("weight") if module is not None else None
    is_linear = isinstance(module, nn.Linear)
    if (
        module is None
        or weight is None
        or getattr(module, "bias", None) is not None
        or not (is_linear or weight.dim() == 1)
    ):
        raise FormatError(f"{name}.bias is stored, but {name} is no norm or Linear of the model that lacks a bias")
    bias = torch.empty(weight.shape[:1], dtype=weight.dtype, device="meta")
    module.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
    if not is_linear:
        module.register_forward_hook(_add_bias)


def shifted_norms(model: nn.Module) -> list[str]:
    """Names of the norms that ``add_bias`` changed."""
    return [name for name, module in model.named_modules() if _add_bias in module._forward_hooks.values()]


def _add_bias(norm: Any, inputs: Any, output: Tensor) -> Tensor:
    return output + norm.bias.to(output.dtype)


# ---------------------------------------------------------------------------------------------------------- saving


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Float parameters and persistent buffers as a checkpoint holds them: shared ones once, under the source's name."""
    targets = getattr(model, "all_tied_weights_keys", None) or {}
    return {next((n for n in s.names if n not in targets), s.names[0]): s.tensor for s in slots(model)}


def matrices(model: nn.Module) -> list[str]:
    """Names of the float weight matrices that take part in products: of Linears, and of routers, which may be none."""
    owners = ((name, module) for name, module in model.named_modules() if not isinstance(module, nn.Embedding))
    weights = ((name, module._parameters.get("weight")) for name, module in owners)
    return [f"{name}.weight".lstrip(".") for name, weight in weights if weight is not None and weight.dim() == 2]


def describe(model: Any, folder: Path, format: Format, section: Mapping[str, Any] | None, untied: bool) -> None:
    """Write all that a checkpoint holds beside tensors; ``section`` is None for a float one."""
    if section and format.side_files:
        write_json(folder / format.side_files[0], section)
    inside = section if format.in_config else None
    if is_transformers(model):
        copy_companions(model, folder)
        write_config(model, folder, inside, untied)
    else:
        quantization = {"quantization_config": inside} if inside else {}
        write_json(folder / PLAIN_CONFIG, {"model": type(model).__name__, **quantization})


def write_config(model: Any, folder: Path, section: Mapping[str, Any] | None, untied: bool) -> None:
    """config.json with its quantization section, and generation_config.json, as save_pretrained writes them."""
    config = copy.deepcopy(model.config)
    for part in _parts(config):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
        if untied:
            part.tie_word_embeddings = False
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    described = json.loads(config.to_json_string())
    if section is not None:
        described["quantization_config"] = dict(section)
    if model.can_generate() and model.generation_config is not None:
        (folder / _GENERATION).write_text(model.generation_config.to_json_string(), encoding="utf-8")
    write_json(folder / CONFIG, described)


def copy_companions(model: Any, folder: Path) -> None:
    """Copy tokenizer and processor files from where the model came from, if that folder is on this machine."""
    origin = getattr(model, "name_or_path", "")
    if not origin:
        return
    try:
        source = resolve(origin)
    except ConfigError:
        return
    for pattern in _COMPANIONS if source.is_dir() else ():
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy2(file, folder / file.name)
