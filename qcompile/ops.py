"""The semantic ops of qcompile: what quantization means, independent of any device.

Each op has a schema, a reference in plain torch that *is* its definition, and a fake. The first tensors of ``weight``
are in the layout of ``kernel``, ``"backend.name"``; the kernel named ``reference`` takes the canonical layout. A
lowered graph holds none of these ops: the pass ``lower`` replaces each by its kernel's ATen operations.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import numerics, plugins
from .errors import UnsupportedError
from .gates import up_rows
from .moe import grouped_float, run_experts, run_float_experts
from .types import ActivationType, Scheme

CODE_DTYPES = {"int": torch.int8, "fp8": torch.float8_e4m3fn, "mxfp8": torch.float8_e4m3fn}
"""What ``quantize`` returns codes in; the fp4 formats give their values, in float32."""


FLOAT = "float"
"""Scheme and kernel of a projection of experts that stays float; its one tensor is the weight [experts, out, in]."""


@functools.cache
def scheme_of(name: str) -> Scheme:
    """Parse a scheme name once."""
    return Scheme.parse(name)


@functools.cache
def activation_of(name: str) -> ActivationType:
    """Parse an activation type once."""
    return ActivationType.parse(name)


@functools.cache
def find_kernel(name: str):
    """The kernel called ``"backend.kernel"``."""
    backend, _, kernel = name.partition(".")
    return plugins.find("backends", backend).kernel(kernel)


def computes_itself(name: str, device: str, *arguments: Any) -> Callable | None:
    """What a device computes such a call of the op ``name`` with, None where it leaves that to the definition."""
    if device not in plugins.names("backends"):
        return None
    operation = getattr(plugins.find("backends", device), "operations", {}).get(name)
    return None if operation is None or operation.refuses(*arguments) else operation.compute


@torch.library.custom_op("qcompile::linear", mutates_args=())
def linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, scheme: str, kernel: str, out_features: int) -> Tensor:
    """``x @ W.T + bias`` with a quantized weight and float activations: x [..., in] -> [..., out] in x's dtype."""
    return find_kernel(kernel).linear(x, weight, bias, scheme_of(scheme), out_features)


@linear.register_fake
def _(x, weight, bias, scheme, kernel, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("qcompile::quantize", mutates_args=())
def quantize(x: Tensor, params: list[Tensor], activation: str) -> list[Tensor]:
    """Quantize activations x [..., n]: [codes, scale], [codes, scale, zero], or (static) [codes].

    activation: ``str(ActivationType)``; params: what ``PackedWeight.activation_tensors`` holds. The definition is
    ``numerics.quantize_activation``.
    """
    own = computes_itself("quantize", x.device.type, x, params, activation)
    return own(x, params, activation) if own else _quantized(x, params, activation)


def _quantized(x: Tensor, params: list[Tensor], activation: str) -> list[Tensor]:
    return numerics.quantize_activation(x.contiguous(), activation_of(activation), params)


@quantize.register_fake
def _(x, params, activation):
    kind = activation_of(activation)
    codes = x.new_empty(x.shape, dtype=CODE_DTYPES.get(kind.number, torch.float32))
    if kind.parts == 1:
        return [codes]
    groups = 1 if kind.group_size is None else -(-x.shape[-1] // kind.group_size)
    scale = x.new_empty(*x.shape[:-1], groups, dtype=torch.float32)
    return [codes, scale] if kind.symmetric else [codes, scale, torch.empty_like(scale, dtype=torch.int32)]


@torch.library.custom_op("qcompile::scaled_linear", mutates_args=())
def scaled_linear(
    x: list[Tensor],
    weight: list[Tensor],
    bias: Tensor | None,
    scheme: str,
    kernel: str,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """``x @ W.T + bias`` for quantized activations: [codes [..., in], scale] or [codes, scale, zero] -> [..., out].

    Dynamic scales (and int32 zeros) are those of ``quantize``, static ones the tensors [1] that it was given.
    """
    return find_kernel(kernel).scaled_linear(x, weight, bias, scheme_of(scheme), out_features, dtype)


@scaled_linear.register_fake
def _(x, weight, bias, scheme, kernel, out_features, dtype):
    return x[0].new_empty(*x[0].shape[:-1], out_features, dtype=dtype)


def compute_linears(x, weights, biases, scheme, kernel, out_features, dtype):
    """What ``qcompile::linears`` computes, in traceable torch code."""
    each = len(weights) // len(out_features)
    parts = [weights[i : i + each] for i in range(0, len(weights), each)]
    return find_kernel(kernel).linears(x, parts, biases, scheme_of(scheme), out_features, dtype)


@torch.library.custom_op("qcompile::linears", mutates_args=())
def linears(
    x: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    scheme: str,
    kernel: str,
    out_features: list[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Several ``linear``s, or ``scaled_linear``s, of the same input under one scheme: the result of each.

    x: [float], or what ``scaled_linear`` takes; weights: the tensors of the first weight, then of the second, ...
    The pass ``merge_linears`` makes them; the definition is one Linear after the other.
    """
    return compute_linears(x, weights, biases, scheme, kernel, out_features, dtype)


@linears.register_fake
def _(x, weights, biases, scheme, kernel, out_features, dtype):
    return [x[0].new_empty(*x[0].shape[:-1], out, dtype=dtype) for out in out_features]


@torch.library.custom_op("qcompile::experts", mutates_args=())
def experts(
    x: Tensor,
    ids: Tensor,
    routing: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
    interleaved: bool,
) -> Tensor:
    """The float experts of one layer, with their weights as the model has them: x [tokens, hidden] -> the same.

    ids          int64 [tokens, k], the chosen experts; routing: float [tokens, k], their weights
    up, down     [experts, out, in], or (transposed) [experts, in, out]; biases [experts, out]
    activation   a name of ``gates``; interleaved: up makes gate 0, up 0, gate 1 ..., else gate first

    The definition is ``moe.run_float_experts``. It is what marks experts in a traced graph.
    """
    arguments = (x, ids, routing, up, up_bias, down, down_bias, activation, transposed, interleaved)
    return (computes_itself("experts", x.device.type, *arguments) or run_float_experts)(*arguments)


@experts.register_fake
def _(x, ids, routing, up, up_bias, down, down_bias, activation, transposed, interleaved):
    if x.dim() != 2 or ids.dim() != 2:
        raise UnsupportedError(
            f"experts take x [tokens, hidden] and ids [tokens, k], not {x.dim()}-D and {ids.dim()}-D"
        )
    return torch.empty_like(x)


def compute_experts(
    x, ids, routing, up, up_bias, up_params, down, down_bias, down_params, schemes, kernels, activation, sizes, dtype,
    *, seen=None, across=lambda largest: largest, summed=None,
):  # fmt: skip
    """What ``qcompile::quant_experts`` computes, in traceable torch code.

    seen: is called with (0 or 1, rows, ends) before the product up or down of rows that end where ``ends`` says.
    across: as for ``moe.run_experts``. summed: of a part of the experts, whose results ranks will sum, the dtype of
    what ``down`` gives, and of the result.
    """
    parsed = [None if scheme == FLOAT else scheme_of(scheme) for scheme in schemes.split("|")]
    experts, hidden, intermediate = sizes
    outputs = (up_rows(activation, intermediate), hidden)

    def product(i: int, weight: list[Tensor]):
        def multiply(rows, ends):
            if seen is not None:
                seen(i, rows[0], ends)
            scheme = parsed[i]
            if scheme is None:
                return grouped_float(rows[0], ends, weight[0], False)
            kernel = find_kernel(kernels.split("|")[i])
            made = summed if i and summed and scheme.activation else dtype  # weight-only products give what they take
            return kernel.grouped_linear(rows, ends, weight, scheme, outputs[i], made)

        return multiply

    return run_experts(
        x, ids, routing, product(0, up), up_bias, up_params, product(1, down), down_bias, down_params,
        (parsed[0], parsed[1]), activation, experts, summed or dtype, across, summed is not None,
    )  # fmt: skip


@torch.library.custom_op("qcompile::quant_experts", mutates_args=())
def quant_experts(
    x: list[Tensor],
    ids: Tensor,
    routing: Tensor,
    up: list[Tensor],
    up_bias: Tensor | None,
    up_params: list[Tensor],
    down: list[Tensor],
    down_bias: Tensor | None,
    down_params: list[Tensor],
    schemes: str,
    kernels: str,
    activation: str,
    sizes: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """The quantized experts of one layer: x [tokens, hidden] -> [tokens, hidden] in ``dtype``.

    x            [float], or [codes, scale] or [codes, scale, zero] where ``quantize`` was called before
    ids          int64 [tokens, k], the chosen experts; routing: float [tokens, k], their weights
    up, down     the tensors of the two projections in the layouts of ``kernels``, "up|down"; up makes gate and up
                 together, gate first; params are their static scales or clips, [experts] each
    schemes      "up|down", each may be "float"; activation: a name of ``gates``; sizes: [experts, hidden, intermediate]

    The definition is ``moe.run_experts``.
    """
    if os.environ.get("QCOMPILE_DEBUG"):
        check_ids(ids, sizes[0])
    arguments = (
        x, ids, routing, up, up_bias, up_params, down, down_bias, down_params,
        schemes, kernels, activation, sizes, dtype,
    )  # fmt: skip
    return (computes_itself("quant_experts", ids.device.type, *arguments) or compute_experts)(*arguments)


@quant_experts.register_fake
def _(x, ids, routing, *rest):
    sizes, dtype = rest[-2:]
    _same_tokens(x[0], ids, routing)
    return x[0].new_empty((x[0].shape[0], sizes[1]), dtype=dtype)


def _same_tokens(x: Tensor, ids: Tensor, routing: Tensor) -> None:
    """Tell the compiler what it may not see: that the three have the same number of tokens."""
    torch._check(x.shape[0] == ids.shape[0], lambda: f"{x.shape[0]} tokens, but experts chosen for {ids.shape[0]}")
    torch._check(ids.shape == routing.shape, lambda: f"experts {list(ids.shape)}, but weights {list(routing.shape)}")


def check_ids(ids: Tensor, experts: int) -> None:
    """UnsupportedError for a router's choice that is no expert; reads the tensor."""
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < experts):
        raise UnsupportedError(
            f"the router chose experts {int(ids.min())} to {int(ids.max())}, but there are 0 to {experts - 1}"
        )
