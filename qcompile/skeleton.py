"""Model classes without weights: built from a config alone, filled tensor by tensor.

Everything that only transformers models have is here: classes by name, rotary buffers, tied embeddings, generation
config and tokenizer files. transformers is imported when a function needs it.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, FormatError, UnsupportedError
from .modules import QuantLinear
from .storage import CONFIG, read_json, shortened, write_json

_GENERATION = "generation_config.json"
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


def build(folder: Path, dtype: torch.dtype, untied: bool) -> nn.Module:
    """The model that config.json describes, on the meta device; buffers that no file holds are real.

    untied: its output embeddings are stored apart, whatever ``tie_word_embeddings`` says. Code that a checkpoint
    brings along is never run. FormatError when transformers cannot build it.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config  # or transformers would quantize by itself
            if untied:
                part.tie_word_embeddings = False
        name = next(iter(config.architectures or ()), "")
        cls = getattr(transformers, name, None)
        known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        with torch.device("meta"):
            make = cls._from_config if known else transformers.AutoModelForCausalLM.from_config
            model = make(config, dtype=dtype)
    except Exception as error:  # a foreign config can make a constructor raise anything
        raise FormatError(f"{folder / CONFIG}: transformers cannot build a model from it: {error}") from error
    _rebuild_buffers(model)
    model.config._name_or_path = model.name_or_path = str(folder)
    if (folder / _GENERATION).is_file() and model.can_generate():
        read_json(folder / _GENERATION)
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


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


def slots(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Every float parameter and persistent buffer by its names, with all places that hold it.

    Tensors of a QuantLinear are left out. A shared tensor is listed under each of its names with all of its places.
    """
    places: dict[Any, list[tuple[nn.Module, str]]] = {}
    keys: dict[str, Any] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear):
            continue
        for name, tensor in _stored(module):
            key = _identity(tensor)
            keys[f"{prefix}.{name}".lstrip(".")] = key
            if (module, name) not in places.setdefault(key, []):
                places[key].append((module, name))
    return {name: places[key] for name, key in keys.items()}


def fill(places: list[tuple[nn.Module, str]], tensor: Tensor) -> None:
    """Put a loaded tensor into every place of a slot, frozen where it is a parameter."""
    parameter = nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else None
    for module, name in places:
        if name in module._parameters:
            module._parameters[name] = parameter
        else:
            module._buffers[name] = tensor


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``model`` holds ``old``; a shared module has several names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def _stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor


def _identity(tensor: Tensor) -> Any:
    """Equal for tensors that share all of their memory."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


# ---------------------------------------------------------------------------------------------------------- saving


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Float parameters and persistent buffers as a checkpoint holds them: shared ones once, under the source's name."""
    targets = getattr(model, "all_tied_weights_keys", None) or {}
    by_place: dict[Any, list[str]] = {}
    for name, places in slots(model).items():
        by_place.setdefault((id(places[0][0]), places[0][1]), []).append(name)
    chosen = {}
    for names in by_place.values():
        name = next((n for n in names if n not in targets), names[0])
        prefix, _, key = name.rpartition(".")
        chosen[name] = getattr(model.get_submodule(prefix), key)
    return chosen


def check_names(model: nn.Module) -> None:
    """UnsupportedError when transformers stores this architecture under names or shapes that its modules lack."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    if get_model_conversion_mapping(model, add_legacy=False):
        raise UnsupportedError(
            f"{type(model).__name__} is stored in another form than its modules have (experts one by one, renamed "
            "parts); saving such models is not supported yet"
        )


def write_config(model: Any, folder: Path, section: Mapping[str, Any] | None, untied: bool) -> None:
    """config.json with its quantization section, and generation_config.json, as save_pretrained writes them."""
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
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
