"""What a command line needs around a model: its tokenizer, text to measure on, a continuation, its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import skeleton
from .errors import ConfigError, FormatError

HELD_OUT = "heldout.safetensors"


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer beside a checkpoint; never from the network."""
    from transformers import AutoTokenizer

    folder = skeleton.resolve(path, False)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(
            f"{folder} has no usable tokenizer ({error}); copy tokenizer.json and tokenizer_config.json there"
        ) from error


def held_out_ids(*paths: str | Path) -> Tensor:
    """The held-out token ids that lie beside the first of these checkpoints that has some."""
    files = [skeleton.resolve(path, False) / HELD_OUT for path in paths]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ConfigError(f"there is no {HELD_OUT} in {files[0].parent} to measure on; give a text file with --text")
    from safetensors.torch import load_file

    return load_file(file)["input_ids"].long()


def text_ids(path: Path, tokenizer: Any) -> Tensor:
    """Token ids of a UTF-8 text file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read text from {path}: {error}") from None
    return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]


def greedy(model: Any, prompt: Tensor, new_tokens: int, **options: Any) -> Tensor:
    """Greedy continuation of token ids [1, n]; ``options`` go to ``generate``."""
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, **options)


def nbytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers; a shared tensor counts once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
