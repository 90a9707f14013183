"""Copies of modules with other tensors, to find out by a few numbers what their code computes.

Whether a module is what it seems to be is not decided by its class or by the names in it: a small copy with random
weights runs, and its results are compared. No weight of the model is read, so models on the meta device work as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_STATE = frozenset(vars(nn.Module())) - {"training"}


def clone(
    module: nn.Module,
    tensor: Callable[[Tensor], Tensor],
    replaced: Mapping[nn.Module, nn.Module] | None = None,
    sizes: Mapping[int, int] | None = None,
) -> nn.Module:
    """A copy of ``module`` in eval mode that shares no tensor with it.

    tensor    gives the new parameter or buffer for an old one
    replaced  modules inside that something else stands for
    sizes     integer attributes that have one of these values get another, as the new tensors have other shapes
    """
    done: dict[nn.Module, nn.Module] = dict(replaced or {})

    def copied(old: nn.Module) -> nn.Module:
        if old in done:
            return done[old]
        new = done[old] = type(old).__new__(type(old))
        state = {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(old).items()}
        for name, value in state.items():
            if name not in _STATE and type(value) is int and sizes:
                state[name] = sizes.get(value, value)
        vars(new).update(state, training=False)
        for name, old_tensor in old._parameters.items():
            made = None if old_tensor is None else nn.Parameter(tensor(old_tensor), requires_grad=False)
            new._parameters[name] = made
        for name, old_buffer in old._buffers.items():
            new._buffers[name] = None if old_buffer is None else tensor(old_buffer)
        for name, child in old._modules.items():
            new._modules[name] = None if child is None else copied(child)
        return new

    return copied(module)


def signature(module: nn.Module, without: frozenset[nn.Module] = frozenset()) -> tuple:
    """Equal for two modules only if they run the same code on tensors of the same shapes with the same settings.

    ``without``: modules inside whose signature does not matter.
    """
    settings = tuple((n, v if _is_plain(v) else id(v)) for n, v in vars(module).items() if n not in _STATE)
    named = [*module._parameters.items(), *module._buffers.items()]
    tensors = tuple((n, None if t is None else (tuple(t.shape), t.dtype)) for n, t in named)
    children = tuple(
        (n, None if child is None or child in without else signature(child, without))
        for n, child in module._modules.items()
    )
    return type(module), settings, tensors, children


def numbers(module: nn.Module, *, configs: bool = False) -> tuple[float, ...]:
    """The finite positive numbers among the attributes of ``module`` and of modules inside; of configs when asked."""
    held = [value for inner in module.modules() for name, value in vars(inner).items() if name not in _STATE]
    if configs:
        held += [v for config in held if hasattr(config, "to_dict") for v in vars(config).values()]
    return tuple(sorted({v for v in held if type(v) in (int, float) and 0 < v < float("inf")}))


def deviation(actual: Tensor, expected: Tensor) -> float:
    """Largest difference of two results [tokens, features], each token relative to its largest expected value."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.double(), expected.double()
    scale = expected.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return ((actual - expected).abs() / scale).nan_to_num(nan=float("inf")).max().item()


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed numbers, those of a matrix or of a stack of them divided by the root of its last size."""
    scale = max(1, shape[-1]) ** -0.5 if len(shape) > 1 else 1.0
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def filler(
    generator: torch.Generator, dtype: torch.dtype | None = None, sizes: Mapping[int, int] | None = None
) -> Callable[[Tensor], Tensor]:
    """For ``clone``: random floats in ``dtype`` (default: in the dtype of the old tensor), zeros for integers."""

    def fill(old: Tensor) -> Tensor:
        shape = [(sizes or {}).get(size, size) for size in old.shape]
        if not old.is_floating_point():
            return torch.zeros(shape, dtype=old.dtype)
        return random(generator, *shape, dtype=dtype or old.dtype)

    return fill


def altered(module: nn.Module) -> str:
    """Why what ``module`` computes is not its class's forward alone; "" when it is."""
    if "forward" in vars(module):
        return "its forward was replaced (accelerate does so to move weights), which a new module would lose"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which a replaced module would lose"
    return ""


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)
