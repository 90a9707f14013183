"""What ``print(model)`` shows at the name of a quantized Linear."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from . import numerics, ops, plugins
from .errors import ConfigError
from .types import PackedWeight, PlannedSite, SiteResult, State


class QuantLinear(nn.Module):
    """A Linear with a quantized weight, in the layout of one kernel.

    Buffers ``weight_0``, ``weight_1`` ... hold the kernel's tensors; ``packed()`` gives the canonical form back.
    ``forward`` takes x [..., in_features] and returns [..., out_features] in x's dtype.
    """

    def __init__(self, packed: PackedWeight, bias: Tensor | None, kernel: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.scheme, self.kernel, self.dtype = packed.scheme, kernel, dtype
        tensors = ops.find_kernel(kernel).prepare(packed)
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"weight_{i}", tensor)
        self._tensor_count = len(tensors)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def tensors(self) -> list[Tensor]:
        """The kernel's tensors."""
        return [getattr(self, f"weight_{i}") for i in range(self._tensor_count)]

    def packed(self) -> PackedWeight:
        """The canonical weight."""
        return ops.find_kernel(self.kernel).restore(self.tensors(), self.scheme, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        scheme = str(self.scheme)
        if self.scheme.activation is None:
            return torch.ops.qcompile.linear(x, self.tensors(), self.bias, scheme, self.kernel, self.out_features)
        codes, scale = torch.ops.qcompile.quantize(x)
        return torch.ops.qcompile.scaled_linear(
            codes, scale, self.tensors(), self.bias, scheme, self.kernel, self.out_features, x.dtype
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}, kernel={self.kernel}"
        )


@torch.no_grad()
def quantize_site(planned: PlannedSite, weight: Tensor, bias: Tensor | None) -> tuple[QuantLinear, SiteResult]:
    """Quantize a float weight [out, in] as planned: the module that takes its Linear's place, and what was lost."""
    scheme = planned.scheme
    assert scheme is not None
    packed = plugins.find("methods", planned.method).quantize(weight, scheme, dict(planned.options))
    sqnr = numerics.signal_to_noise(weight, packed)
    module = QuantLinear(packed, bias, planned.kernel, planned.site.dtype)
    return module, SiteResult(planned, sum(t.numel() * t.element_size() for t in module.tensors()), sqnr)


def quantized_modules(model: nn.Module) -> dict[str, QuantLinear]:
    """All QuantLinear modules of ``model`` by name; a module that is reached by two names appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``model`` holds ``old``; a shared module has several names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children would skip a second name
            if child is old:
                setattr(parent, name, new)


def state_of(model: nn.Module) -> State | None:
    """What qcompile knows about ``model``; None for one that it did not make."""
    return getattr(model, "_qcompile", None)


def set_state(model: nn.Module, state: State | None) -> None:
    """Attach what qcompile knows to ``model``, or (None) make it an ordinary model again.

    A quantized model of transformers saves through qcompile: its own ``save_pretrained`` would write the tensors of a
    kernel's layout under names that nothing can load.
    """
    attributes: dict[str, Any] = model.__dict__
    attributes.pop("_qcompile", None)
    attributes.pop("save_pretrained", None)
    if state is not None:
        attributes["_qcompile"] = state
        if hasattr(model, "save_pretrained"):
            attributes["save_pretrained"] = MethodType(save_pretrained, model)


def save_pretrained(model: nn.Module, save_directory: str | Path, **unsupported: Any) -> None:
    """What ``model.save_pretrained(folder)`` does for a quantized model: ``qcompile.save``, replacing a checkpoint."""
    from .checkpoint import save

    if unsupported:
        raise ConfigError(
            f"save_pretrained of a quantized model takes a folder only, not {', '.join(unsupported)}; "
            "qcompile.save(model, folder, format=..., shard_bytes=...) has other options"
        )
    save(model, save_directory, overwrite=True)
