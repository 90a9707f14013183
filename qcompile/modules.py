"""What ``print(model)`` shows at the name of a quantized Linear, and of quantized experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from . import numerics, ops, plugins
from .errors import ConfigError
from .memory import return_memory
from .notebook import show_reports
from .ops import FLOAT
from .types import PackedWeight, PlannedSite, Scheme, SiteResult, State


class QuantWeight(nn.Module):
    """A quantized weight in the layout of one kernel, and its bias.

    Buffers ``weight_0``, ``weight_1`` ... hold the kernel's tensors, ``input_scale``, ``input_zero`` and ``alpha`` what
    the quantization of its input needs; ``packed()`` gives the canonical form back. ``shape`` is (out, in), or
    (experts, out, in) with a bias [experts, out].
    """

    def __init__(self, packed: PackedWeight, bias: Tensor | None, kernel: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.scheme, self.kernel, self.dtype = packed.shape, packed.scheme, kernel, dtype
        tensors = ops.find_kernel(kernel).prepare(packed)
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"weight_{i}", tensor)
        self._tensor_count = len(tensors)
        for name, tensor in packed.activation_tensors().items():
            self.register_buffer(name, tensor)
        self._params = tuple(packed.activation_tensors())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def out_features(self) -> int:
        """Output features, of one expert where there are several."""
        return self.shape[-2]

    @property
    def in_features(self) -> int:
        """Input features."""
        return self.shape[-1]

    def tensors(self) -> list[Tensor]:
        """The kernel's tensors."""
        return [getattr(self, f"weight_{i}") for i in range(self._tensor_count)]

    def params(self) -> list[Tensor]:
        """What ``qcompile::quantize`` takes beside the activations."""
        return [getattr(self, name) for name in self._params]

    def packed(self) -> PackedWeight:
        """The canonical weight."""
        params = dict(zip(self._params, self.params(), strict=True))
        return ops.find_kernel(self.kernel).restore(self.tensors(), self.scheme, self.shape, params)

    def extra_repr(self) -> str:
        experts = f"experts={self.shape[0]}, " if len(self.shape) == 3 else ""
        return (
            f"{experts}in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme}, kernel={self.kernel}"
        )


class QuantLinear(QuantWeight):
    """A Linear with a quantized weight: x [..., in_features] -> [..., out_features] in x's dtype."""

    def __init__(self, packed: PackedWeight, bias: Tensor | None, kernel: str, dtype: torch.dtype) -> None:
        super().__init__(packed, bias, kernel, dtype)
        activation = packed.scheme.activation
        self._dynamic = activation is not None and activation.dynamic
        # all that forward reads is compared at every call of a compiled model: two tuples, not a scheme's every field
        self._texts = (str(packed.scheme), None if activation is None else str(activation), kernel)

    def forward(self, x: Tensor) -> Tensor:
        activation = self._texts[1]
        parts = [x] if activation is None else torch.ops.qcompile.quantize(x, self.params(), activation)
        return self.product(parts, x.dtype)

    def product(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The product of [x], or of what ``qcompile::quantize`` made of it, with the weight, and the bias."""
        scheme, activation, kernel = self._texts
        if activation is None:
            return torch.ops.qcompile.linear(parts[0], self.tensors(), self.bias, scheme, kernel, self.shape[0])
        return torch.ops.qcompile.scaled_linear(
            parts if self._dynamic else [*parts, *self.params()],
            self.tensors(), self.bias, scheme, kernel, self.shape[0], dtype,
        )  # fmt: skip


class FloatWeight(nn.Module):
    """A projection of experts that is float: ``weight`` [experts, out, in] and ``bias`` [experts, out] or None."""

    scheme: Scheme | None = None
    kernel = FLOAT

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, out, in)."""
        return tuple(self.weight.shape)

    @property
    def in_features(self) -> int:
        """Input features."""
        return self.weight.shape[-1]

    def tensors(self) -> list[Tensor]:
        """The weight."""
        return [self.weight]

    def params(self) -> list[Tensor]:
        """Nothing: its input stays float."""
        return []

    def extra_repr(self) -> str:
        experts, out, inn = self.weight.shape
        return f"experts={experts}, in_features={inn}, out_features={out}, bias={self.bias is not None}"


Projection = QuantWeight | FloatWeight


class QuantExperts(nn.Module):
    """The experts of one layer: ``gate_up_proj`` (``up_proj`` without a gate) and ``down_proj``, gate first.

    ``forward`` takes hidden states [tokens, hidden] (or [batch, sequence, hidden]), the chosen experts and their
    weights [tokens, k], as the experts of transformers do, and returns the weighted sum in the shape and dtype of the
    hidden states. The projections are named as the float module named its parameters; either may be float.
    """

    def __init__(self, up: tuple[str, Projection], down: tuple[str, Projection], activation: str) -> None:
        super().__init__()
        self._up, self._down, self.activation = up[0], down[0], activation
        self.add_module(*up)
        self.add_module(*down)

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two projections."""
        return self._up, self._down

    @property
    def up(self) -> Projection:
        """The projection that makes gate and up, gate first."""
        return self.get_submodule(self._up)  # type: ignore[return-value]

    @property
    def down(self) -> Projection:
        """The projection back to the hidden size."""
        return self.get_submodule(self._down)  # type: ignore[return-value]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.up.in_features)
        k = top_k_index.shape[-1]
        routed = (self.shared_input(x), top_k_index.reshape(-1, k), top_k_weights.reshape(-1, k))
        return torch.ops.qcompile.quant_experts(*routed, *self.projections(x.dtype)).view(hidden_states.shape)

    def shared_input(self, x: Tensor) -> list[Tensor]:
        """x [tokens, hidden] as all experts read it: quantized where that needs no expert's own scale."""
        kind = self.up.scheme.activation if self.up.scheme else None
        return [x] if kind is None or kind.params else torch.ops.qcompile.quantize(x, [], str(kind))

    def observed(self, x: Tensor, ids: Tensor, routing: Tensor, seen: Callable[[int, Tensor, Tensor], None]) -> Tensor:
        """``forward`` of x [tokens, hidden] that shows what the products read, sorted by expert.

        ``seen(projection, rows, ends)``: of projection 0, up, or 1, down; the rows of expert e end at ``ends[e]``, and
        are float if that projection is.
        """
        return ops.compute_experts([x], ids, routing, *self.projections(x.dtype), seen=seen)

    def projections(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """What ``ops.compute_experts`` takes after the input and its routing."""
        up, down = self.up, self.down
        return (
            up.tensors(), up.bias, up.params(), down.tensors(), down.bias, down.params(),
            f"{_scheme(up)}|{_scheme(down)}", f"{up.kernel}|{down.kernel}", self.activation,
            [up.shape[0], up.in_features, down.in_features], dtype,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


def _scheme(part: Projection) -> str:
    return FLOAT if part.scheme is None else str(part.scheme)


def quantize_site(
    planned: PlannedSite,
    weight: Tensor,
    bias: Tensor | None,
    packed: PackedWeight | None = None,
    release: Callable[[], None] | None = None,
) -> tuple[QuantWeight, SiteResult]:
    """Quantize a float weight [out, in] or [experts, out, in] as planned: its module, and what was lost.

    packed: what calibration made of it already. release: is called when the float weight is no longer needed, before
    the layout of the kernel is made.
    """
    scheme = planned.scheme
    assert scheme is not None
    with torch.no_grad():  # not around the function, where it would hold the arguments
        if packed is None:
            packed = plugins.find("methods", planned.method).quantize(weight, scheme, dict(planned.options))
        sqnr = numerics.signal_to_noise(weight, packed)
        del weight
        if release is not None:
            release()
        return_memory()  # temporaries of quantizing, up to 64 MB that glibc keeps, would lie beside the kernel's layout
        module = module_of(planned, packed, bias)
    return module, SiteResult(planned, sum(t.numel() * t.element_size() for t in module.buffers()), sqnr)


def module_of(planned: PlannedSite, packed: PackedWeight, bias: Tensor | None) -> QuantWeight:
    """The module that holds the packed weight of a site."""
    kind = QuantLinear if planned.site.kind == "linear" else QuantWeight
    return kind(packed, bias, planned.kernel, planned.site.dtype)


def quantized_modules(model: nn.Module) -> dict[str, QuantWeight]:
    """All quantized weights of ``model`` by the name of their site; one that is reached by two names appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantWeight)}


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``model`` holds ``old``; a shared module has several names."""
    for parent, name in holders(model).get(id(old), ()):
        setattr(parent, name, new)


def holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place (parent, name) of every module, by its id."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():  # named_children would skip a second name
            if child is not None:
                found.setdefault(id(child), []).append((parent, name))
    return found


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
        show_reports()
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
