"""Lowered Linears and experts as modules with buffers: what is exported, captured and converted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from npu_cases import HIDDEN, Layer, linear_site, packed_weight
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from qcompile import numerics
from qcompile.backends.npu import BACKEND
from qcompile.kernels import choose
from qcompile.types import PackedWeight, Scheme


def moved(packed: PackedWeight, device: str) -> PackedWeight:
    """The same weight on another device."""
    fields = {f.name: getattr(packed, f.name) for f in dataclasses.fields(packed)}
    return dataclasses.replace(packed, **{k: v.to(device) for k, v in fields.items() if isinstance(v, Tensor)})


class LoweredLinear(nn.Module):
    """Quantization of the activations and the product, as the passes lower a Linear [256] -> [64]."""

    def __init__(self, scheme: str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> None:
        super().__init__()
        self.scheme, self.dtype = Scheme.parse(scheme), dtype
        self.kernel, why = choose(BACKEND, linear_site(64, HIDDEN, dtype), self.scheme)
        assert self.kernel is not None, why
        packed = moved(packed_weight((64, HIDDEN), self.scheme, dtype), device)
        self.tensors = self.kernel.prepare(packed)
        self.params = list(packed.activation_tensors().values())

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, 256] -> [tokens, 64]."""
        kind = self.scheme.activation
        if kind is None:
            return self.kernel.linear(x, self.tensors, None, self.scheme, 64)
        words = kind.bits == 4 and getattr(self.kernel, "takes_words", False)
        operation = BACKEND.operations["quantize_words" if words else "quantize"]
        if operation.refuses(x, self.params, str(kind)):
            parts = numerics.quantize_activation(x, kind, self.params)
        else:
            parts = operation.compute(x, self.params, str(kind))
        own = parts if kind.dynamic else [*parts, *self.params]
        return self.kernel.scaled_linear(own, self.tensors, None, self.scheme, 64, self.dtype)


def traced(module: LoweredLinear | LoweredExperts, given: Sequence[Tensor]) -> tuple[GraphModule, list[Tensor]]:
    """The module's graph with everything that it computes from as inputs, as a compiled model has it, and these."""
    tensors, spec = pytree.tree_flatten((tuple(given), module.tensors, module.params))

    def run(*values: Tensor) -> list[Tensor]:
        rest, module.tensors, module.params = pytree.tree_unflatten(list(values), spec)
        return [module(*rest)]

    own = module.tensors, module.params
    graph = make_fx(run, tracing_mode="fake")(*tensors)
    module.tensors, module.params = own
    return graph, tensors


class LoweredExperts(nn.Module):
    """Routing, both products and what is between them, of six experts, two for each token."""

    def __init__(self, scheme: str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> None:
        super().__init__()
        self.layer = Layer(scheme, dtype)
        self.layer.packed = [moved(packed, device) for packed in self.layer.packed]
        self.tensors = [k.prepare(p) for k, p in zip(self.layer.kernels, self.layer.packed, strict=True)]
        self.params = [list(packed.activation_tensors().values()) for packed in self.layer.packed]

    def forward(self, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        """x [tokens, 256], ids and routing [tokens, 2] -> [tokens, 256]."""
        layer, kind = self.layer, self.layer.scheme.activation
        words = kind is not None and kind.bits == 4 and getattr(layer.kernels[0], "takes_words", False)
        quantize = BACKEND.operations["quantize_words" if words else "quantize"]
        is_early = kind is not None and kind.dynamic and not kind.clip
        parts = quantize.compute(x, [], str(kind)) if is_early and not quantize.refuses(x, [], str(kind)) else [x]
        names = "|".join(f"npu.{kernel.name}" for kernel in layer.kernels)
        (up, down), (up_params, down_params) = self.tensors, self.params
        return BACKEND.operations["quant_experts"].compute(
            parts, ids, routing, up, None, up_params, down, None, down_params, f"{layer.scheme}|{layer.scheme}", names,
            layer.activation, layer.sizes, layer.dtype,
        )  # fmt: skip
