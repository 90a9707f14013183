"""Small models for tests: transformers configs that build in milliseconds, and their Linears quantized in place."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from qcompile import kernels, plugins
from qcompile.modules import QuantLinear, replace_module
from qcompile.numerics import quantize_weight
from qcompile.trace import walk
from qcompile.types import Scheme, WeightType


def tiny_config(family: str = "qwen3", **changes):
    """A transformers config of two layers of width 128."""
    from transformers import AutoConfig

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 160,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model(family, **(sizes | changes))


def tiny_model(family: str = "qwen3", dtype: torch.dtype = torch.bfloat16, **changes) -> nn.Module:
    """A model of that config with random weights, in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=dtype).eval()


class TinyMLP(nn.Module):
    """A module that is not of transformers: a shared Linear, a bias, and a buffer that is saved."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.again = self.first
        self.last = nn.Linear(width, 8, bias=False)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.again(torch.relu(self.first(x))))) + self.shift


def quantize_linears(model: nn.Module, scheme: str | dict[str, str] = "w4a16_g32", *, head: bool = False) -> nn.Module:
    """Round the Linears of ``model`` to nearest, in place and without tracing.

    scheme: one for all, or by the last part of a module's name (others stay float). head: the lm_head as well.
    """
    backend = plugins.find("backends", "cpu")
    for site in walk(model):
        name = scheme if isinstance(scheme, str) else scheme.get(site.name.rpartition(".")[2])
        if name is None or (site.role == "lm_head" and not head):
            continue
        parsed, linear = Scheme.parse(name), model.get_submodule(site.name)
        kernel, why = kernels.choose(backend, site, parsed)
        assert kernel is not None, why
        packed = quantize_weight(linear.weight.detach(), parsed)
        quantized = QuantLinear(packed, linear.bias, f"cpu.{kernel.name}", site.dtype)
        replace_module(model, linear, quantized.train(linear.training))
    return model


def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of some token ids, without gradients."""
    if ids is None:
        ids = torch.arange(3, 3 + 24).view(2, 12)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``|actual - expected| / |expected|``."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def expand_groups(values: torch.Tensor, weight: WeightType, out: int, inn: int) -> torch.Tensor:
    """Repeat values [..., rows, groups] of each group for its weights: [..., out, in], or what broadcasts to that."""
    rows, columns = weight.block or (1, weight.group_size)
    if columns is None:
        return values
    return values.repeat_interleave(rows, dim=-2)[..., :out, :].repeat_interleave(columns, dim=-1)[..., :inn]


def change_config(folder: Path, edit) -> None:
    """Let ``edit`` change the config of a folder."""
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
