"""Products of random numbers to measure tiles with: ops as a graph calls them, on as many weights as no cache holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import layouts, tiles
from .targets import Target
from .tiles import Weight

SCHEMES = {"w4a16": "w4a16", "w8a16": "w8a16", "int8": "w8a8", "int4": "w4a8", "fp8": "wfp8afp8"}
_OPS = torch.ops.qcompile_cuda
_CACHE = 64 * 2**20  # bytes of an L2 cache, where torch does not know


def products(weight: Weight, rows: int, target: Target, device: str) -> list[Callable[[], Tensor]]:
    """The same product with several weights, together four times the L2 cache of ``device``.

    Splits are asked from ``tiles.choose`` at each call, and summed. Weights are symmetric, floats bfloat16; scales of
    activations are 1, which a graph multiplies with in whatever it makes of the sum.
    """
    made = _Random(weight, device)
    x, first = made.activations(rows), made.tensors()
    count = max(2, 4 * _cache_bytes(device) // sum(t.numel() * t.element_size() for t in first) + 1)
    weights = [first, *(made.tensors() for _ in range(count - 1))]
    if weight.part:
        call = _part_of_experts(weight, rows, target, x, made)
    elif weight.x_bits == 16:
        call = _floats(weight, rows, target, x, made)
    else:
        call = _scaled(weight, rows, target, x, made)
    return [partial(call, *tensors) for tensors in weights]


def scheme_of(weight: Weight) -> str:
    """A scheme whose weights are stored so."""
    blocks = "_b128x128" if weight.kind == "fp8" else f"_g{weight.group}"
    return SCHEMES[weight.kind] + (blocks if weight.group else "")


def _cache_bytes(device: str) -> int:
    if device == "cpu":
        return 0
    return getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0) or _CACHE


class _Random:
    """Tensors of random numbers, the same ones in every run."""

    def __init__(self, weight: Weight, device: str) -> None:
        self.weight, self.device = weight, device
        self.generator = torch.Generator(device).manual_seed(0)

    def uniform(self, *shape: int) -> Tensor:
        """float32 between 0 and 1."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def _bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator, device=self.device)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Codes and scales, as kernels prepare them."""
        kind, out, columns, count, group, _ = self.weight
        experts, bits = (count,) if count else (), self.weight.bits
        groups = columns // group if group else 1
        if kind in ("int8", "fp8"):
            codes = self._bytes(*experts, out, columns)
            codes = codes.view(torch.int8) if kind == "int8" else (codes & 0xBF).view(torch.float8_e4m3fn)
        else:
            codes = self._bytes(*experts, out // 16, columns * bits * 2)
        if kind == "fp8":
            scales = self.uniform(*experts, -(-out // 128) if group else out, groups)
            return codes, (scales * 0.02 + 0.005).bfloat16()
        scales = (self.uniform(*experts, out, groups) * 0.02 + 0.005).bfloat16()
        zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
        offset = -(2 ** (bits - 1)) if self.weight.x_bits == 8 else layouts.offset_of(bits, scales.dtype)
        return codes, layouts.scale_pairs(scales, zeros, offset)

    def activations(self, rows: int) -> list[Tensor]:
        """What a product reads: rows, and the scales of quantized ones."""
        columns, group = self.weight.columns, self.weight.group
        if self.weight.x_bits == 16:
            return [(self.uniform(rows, columns) - 0.5).bfloat16()]
        codes = self._bytes(rows, columns)
        codes = (codes & 0xBF).view(torch.float8_e4m3fn) if self.weight.kind == "fp8" else codes.view(torch.int8)
        groups = columns // group if group and self.weight.kind == "fp8" else 1
        return [codes, torch.ones(rows, groups, device=self.device)]

    def ends(self, rows: int) -> Tensor | None:
        """Where the sorted rows of each expert end, if each row has one at random."""
        if not self.weight.experts:
            return None
        owner = (self.uniform(rows) * self.weight.experts).long()
        return torch.bincount(owner, minlength=self.weight.experts).cumsum(0).to(torch.int32)


def _floats(weight: Weight, rows: int, target: Target, x: list[Tensor], made: _Random):
    ends = made.ends(rows)

    def call(codes: Tensor, pairs: Tensor) -> Tensor:
        splits = tiles.choose(weight, rows, target).splits
        y = _OPS.float_linear(
            *x, codes, pairs, None, ends, weight.bits, target.has_wgmma, weight.group, True, weight.out,
            splits if splits > 1 else 0,
        )  # fmt: skip
        return y.sum(0) if splits > 1 else y

    return call


def _scaled(weight: Weight, rows: int, target: Target, x: list[Tensor], made: _Random):
    ends, grouped, fp8 = made.ends(rows), x[1].shape[-1] > 1, weight.kind == "fp8"
    scale_rows = 128 if fp8 and weight.group else 1

    def call(codes: Tensor, scales: Tensor) -> Tensor:
        splits = tiles.choose(weight, rows, target).splits
        y = _OPS.scaled_linear(
            x[0], x[1] if grouped or splits < 2 else None, codes, scales, None, ends, weight.kind, weight.group,
            scale_rows, grouped, weight.out, splits if splits > 1 else 0, torch.bfloat16,
        )  # fmt: skip
        return y.sum(0) if splits > 1 else y

    return call


def _part_of_experts(weight: Weight, rows: int, target: Target, x: list[Tensor], made: _Random):
    """rows: (token, slot) pairs, as many as there are of whole tokens, with up to 8 experts each."""
    scheme = scheme_of(weight)
    kernel = "cuda." + ("fp8" if weight.kind == "fp8" else SCHEMES[weight.kind])
    kernel += ("_sm90" if target.has_wgmma else "_sm80") if weight.x_bits == 16 else ""
    k = min(8, rows, 1 << (max(1, weight.experts // 4).bit_length() - 1))
    ids = made.uniform(rows // k, weight.experts).topk(k).indices
    routing = made.uniform(rows // k, k)
    order, ends = _OPS.expert_order(ids, weight.experts)
    tokens, pairs = ([part[:count] for part in x] for count in (rows // k, ids.numel()))

    def gate_up(*tensors: Tensor) -> Tensor:
        half = weight.out // 2
        return _OPS.gate_up(tokens, ids, order, ends, tensors, scheme, kernel, half, "silu", torch.bfloat16)

    def down(*tensors: Tensor) -> Tensor:
        few = tiles.each_row(rows, weight.experts)
        splits = tiles.expert_splits(rows // k, k, weight.out, target) if few else 1
        y = _OPS.down(
            pairs, ids, routing, order, ends, tensors, scheme, kernel, weight.out, splits if splits > 1 else 0,
            torch.bfloat16,
        )  # fmt: skip
        return y.sum(0) if splits > 1 else y

    return gate_up if weight.part == "gate_up" else down
