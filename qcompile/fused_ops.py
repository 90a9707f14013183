"""Semantic ops for what stands between matrix products: norms, gated activations, both with a quantization, attention.

Each function here is the definition of the op of its name: plain torch, and a fused op calls the ops that it joins.
The pass ``canonicalize`` finds them in a graph (``attend_shared_heads`` the attention), the fusing passes join them
with ``qcompile::quantize``, and ``lower`` replaces each by a device's own operation or by its definition, which is bit
for bit what the graph held before.

The arguments of a norm are the same in every op:

    weight       [n] or None: multiplied after the normalization
    bias         [n] or None: added after that
    eps          a float, or None where ``eps_tensor`` (0-d) holds it because the graph reads it at run time
    offset       added to the weight in float32 first: 1 for Gemma's ``1 + w``, otherwise 0
    round_first  round to x's dtype before the weight is multiplied (Llama), not only in the end (Gemma, GPT-OSS)

Those of a quantization are ``params`` and ``activation``, as in ``qcompile::quantize``; ``keep`` asks for the float
result as well, because somebody else reads it (the router of a mixture of experts).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from . import gates, numerics, ops  # noqa: F401  (ops registers qcompile::quantize)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a norm of such numbers is computed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    eps_tensor: Tensor | None,
    offset: float,
    round_first: bool,
) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * (weight + offset) + bias`` over the last axis: [..., n] -> [..., n] in x's dtype.

    Zhang and Sennrich 2019, equation 4.
    """
    wide = x.to(wide_dtype(x.dtype))
    variance = wide.pow(2).mean(-1, keepdim=True)
    normal = wide * torch.rsqrt(variance + (eps_tensor if eps is None else eps))  # type: ignore[operator]
    if round_first:
        normal = normal.to(x.dtype)
    if weight is not None:
        normal = normal * (weight.to(wide.dtype) + offset) if offset else weight * normal
    if bias is not None:
        normal = normal + bias
    return normal.to(x.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    eps_tensor: Tensor | None,
    offset: float,
    round_first: bool,
) -> tuple[Tensor, Tensor]:
    """(norm of the sum, sum) of ``x + residual``, both [..., n] in x's dtype."""
    total = x + residual
    return torch.ops.qcompile.rms_norm(total, weight, bias, eps, eps_tensor, offset, round_first), total


def gated_act(gate: Tensor, up: Tensor, function: str) -> Tensor:
    """``f(gate) * up`` for an activation of ``gates``, such as "silu": [..., n] -> [..., n] in their dtype."""
    return gates.gated_pair(gate, up, function)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    eps_tensor: Tensor | None,
    offset: float,
    round_first: bool,
    params: list[Tensor],
    activation: str,
    keep: bool,
) -> list[Tensor]:
    """``quantize(rms_norm(x))``, then (``keep``) the norm itself."""
    normal = torch.ops.qcompile.rms_norm(x, weight, bias, eps, eps_tensor, offset, round_first)
    return [*torch.ops.qcompile.quantize(normal, params, activation), *([normal] if keep else [])]


def add_rms_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    eps_tensor: Tensor | None,
    offset: float,
    round_first: bool,
    params: list[Tensor],
    activation: str,
    keep: bool,
) -> list[Tensor]:
    """``quantize(rms_norm(x + residual))``, then the sum, then (``keep``) the norm."""
    normal, total = torch.ops.qcompile.add_rms_norm(x, residual, weight, bias, eps, eps_tensor, offset, round_first)
    return [*torch.ops.qcompile.quantize(normal, params, activation), total, *([normal] if keep else [])]


def gated_act_quantize(
    gate: Tensor, up: Tensor, function: str, params: list[Tensor], activation: str, keep: bool
) -> list[Tensor]:
    """``quantize(gated_act(gate, up))``, then (``keep``) the product itself."""
    product = torch.ops.qcompile.gated_act(gate, up, function)
    return [*torch.ops.qcompile.quantize(product, params, activation), *([product] if keep else [])]


def quantize_words(x: Tensor, params: list[Tensor], activation: str) -> list[Tensor]:
    """``quantize`` to 4 bits [..., 8 n], with eight codes in a word: [int32 [..., n], scale [..., 1]]."""
    codes, scale = torch.ops.qcompile.quantize(x, params, activation)
    return [numerics.pack_int4(codes), scale]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Tensor:
    """Attention, of whose heads several may share those of k and v: in q's dtype.

    q [batch, heads, rows, width], k [batch, shared, positions, width], v [batch, shared, positions, value width] ->
    [batch, heads, rows, value width]; head h reads shared head ``h // (heads / shared)``. mask, which is added to the
    scaled scores, broadcasts to [batch, heads, rows, positions]; causal: row i reads none after i.
    scale: width ** -0.5 unless it is given.
    """
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)


DEFINITIONS: dict[str, Callable] = {
    function.__name__: function
    for function in (
        rms_norm, add_rms_norm, gated_act, rms_norm_quantize, add_rms_norm_quantize, gated_act_quantize, quantize_words,
        attend,
    )
}  # fmt: skip

for _name, _definition in DEFINITIONS.items():
    torch.library.custom_op(f"qcompile::{_name}", _definition, mutates_args=())
    torch.library.register_fake(f"qcompile::{_name}", _definition)
