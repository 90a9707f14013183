"""Loading what a command line names: float or quantized models, their tokenizers, and text to measure on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, FormatError

HELD_OUT = "heldout.safetensors"


def load_any(path: Path, device: str = "cpu") -> nn.Module:
    """Load a checkpoint folder, quantized or float."""
    if is_quantized(path):
        from .checkpoint import load

        return load(path, device=device)
    return load_float(path, device)


def is_quantized(path: Path) -> bool:
    """Whether the config of a checkpoint folder speaks of quantization."""
    file = path / "config.json"
    if not file.is_file():
        raise FormatError(f"no checkpoint in {path}: expected a folder with config.json and safetensors files")
    try:
        return "quantization_config" in json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise FormatError(f"{file} is not JSON: {error}") from None


def load_float(path: Path, device: str = "cpu") -> nn.Module:
    """Load a float language model in the dtype it is stored in; never from the network."""
    if is_quantized(path):
        raise FormatError(f"{path} is quantized already; a float checkpoint is needed here")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(f"{path} cannot be loaded as a language model: {error}") from error
    return model.to(device).eval()


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer beside a checkpoint."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(
            f"{path} has no usable tokenizer ({error}); copy tokenizer.json and tokenizer_config.json there"
        ) from error


def held_out_ids(path: Path) -> Tensor:
    """The held-out token ids that ship with the model in ``path``."""
    file = path / HELD_OUT
    if not file.is_file():
        raise ConfigError(f"{path} has no {HELD_OUT} to measure on; give a text file")
    from safetensors.torch import load_file

    return load_file(file)["input_ids"].long()


def text_ids(path: Path, tokenizer: Any) -> Tensor:
    """Token ids of a UTF-8 text file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read text from {path}: {error}") from None
    return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]


def greedy(model: nn.Module, prompt: Tensor, new_tokens: int) -> Tensor:
    """Greedy continuation of token ids [1, n]."""
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)  # type: ignore[operator]


def nbytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers; a shared tensor counts once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
