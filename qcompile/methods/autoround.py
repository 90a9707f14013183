"""AutoRound: learn to round up or down, and the ranges, by what a decoder block computes (arXiv 2309.05516).

Codes are ``round(W / (scale * m) + v)``. The offsets v of all weights of a block, within half a step, and the factor m
of every scale follow the sign of the gradient of the block's error, in steps that shrink to nothing. The block is given
what the quantized blocks before it compute, and is held to what the float model computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..groups import join_groups, split_groups
from ..numerics import pack_codes, representable
from ..observers import Needs, Statistics
from ..types import PackedWeight, Scheme
from . import Block
from ._ranges import search_ranges

_RANGE = 0.5  # of a factor around 1: scales may shrink to half and grow by half
_LARGEST = 1.0  # of an offset, in steps: also weights beyond the nearest two codes can be reached


class AutoRound:
    """Options, the default first:

    steps  200: how often the offsets are moved; each step looks at one set of inputs
    rate   of the first step, in steps of codes; 0 is ``2 / steps``
    """

    name = "autoround"

    def check(self, options: dict[str, object]) -> None:
        """Raise ConfigError for an option that does not exist or has a wrong value."""
        for key, value in options.items():
            if key not in ("steps", "rate"):
                raise ConfigError(f"method 'autoround' has no option {key!r}. Known: steps, rate.")
            is_number = isinstance(value, int if key == "steps" else (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 <= value <= (10**6 if key == "steps" else 1):  # type: ignore[operator]
                raise ConfigError(f"option {key!r} of method 'autoround' must be a number of its kind, not {value!r}")

    def refuses(self, scheme: Scheme, options: dict[str, object]) -> str:
        """Integers only; activations must not have parameters that are stored."""
        if scheme.weight.number != "int":
            return f"it rounds to integers, not to {scheme.weight.number}"
        if scheme.activation is not None and scheme.activation.params:
            return "it learns with dynamic activations; their static scales and clips are made by other methods"
        return ""

    def needs(self, scheme: Scheme, options: dict[str, object]) -> Needs:
        """The inputs of whole blocks, of the quantized and of the float model."""
        return Needs(ranges=True, sequential=True, drift=True, blocks=True)

    def quantize(
        self,
        weight: Tensor,
        scheme: Scheme,
        options: dict[str, object],
        statistics: Statistics | None = None,
        dtype: torch.dtype | None = None,
    ) -> PackedWeight:
        """Round one weight [out, in] to nearest in its best ranges: where blocks are not known."""
        learned = _Learned(weight, scheme, dtype or weight.dtype)
        return learned.packed()

    def tune(self, block: Block, options: dict[str, Any]) -> dict[str, PackedWeight]:
        """The weights with the least error of the block that were seen; at worst those that are rounded to nearest."""
        steps = int(options.get("steps", 200))
        rate = float(options.get("rate", 0)) or 2 / max(1, steps)
        learned = {
            site: _Learned(weight, block.schemes[site], block.dtypes[site]) for site, weight in block.weights.items()
        }
        parameters = [tensor for each in learned.values() for tensor in each.parameters]
        with torch.no_grad():
            start = self._error(block, learned)
        for step in range(steps):
            for tensor in parameters:
                tensor.requires_grad_(True)
            loss = block.loss(step % block.batches, {site: each.weight() for site, each in learned.items()})
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for tensor, gradient in zip(parameters, gradients, strict=True):
                tensor.requires_grad_(False)
                if gradient is not None:
                    tensor.sub_(gradient.sign_(), alpha=rate * (1 - step / steps))
            for each in learned.values():
                each.clamp()
        with torch.no_grad():
            if not self._error(block, learned) < start:
                learned = {s: _Learned(w, block.schemes[s], block.dtypes[s]) for s, w in block.weights.items()}
        return {site: each.packed() for site, each in learned.items()}

    def _error(self, block: Block, learned: dict[str, _Learned]) -> float:
        weights = {site: each.weight() for site, each in learned.items()}
        return sum(block.loss(batch, weights).item() for batch in range(block.batches))


class _Learned:
    """A weight [..., out, in] with offsets and factors that can be learned."""

    def __init__(self, weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> None:
        self.scheme, self.dtype, self.shape = scheme, dtype, tuple(weight.shape)
        weight_type = scheme.weight
        size = weight_type.group_size or weight.shape[-1]
        flat = weight.detach().float().reshape(-1, weight.shape[-1])
        self.groups = split_groups(flat, size)
        self.scales, self.zeros = search_ranges(flat, weight_type, dtype)
        self.offsets, self.factors = torch.zeros_like(self.groups), torch.zeros_like(self.scales)
        self.top = 2**weight_type.bits - 1

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        """Offsets [rows, groups, n] in steps, factors [rows, groups] around 0."""
        return self.offsets, self.factors

    def clamp(self) -> None:
        """Keep offsets and factors where they may be."""
        self.offsets.clamp_(-_LARGEST, _LARGEST)
        self.factors.clamp_(-_RANGE, _RANGE)

    def rounded(self, offsets: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes less their zero points before and after they are limited, [rows, groups, n], and scales [..., 1]."""
        scales = representable(self.scales * (1 + factors), self.dtype)[..., None]
        codes, zeros = torch.addcdiv(offsets, self.groups, scales).round_(), self.zeros[..., None]
        return codes, codes.clamp(-zeros, self.top - zeros), scales

    def weight(self) -> Tensor:
        """The dequantized weight, float32 [..., out, in]; rounding passes gradients on."""
        made: Tensor = _Dequantized.apply(self.offsets, self.factors, self)
        return made.flatten(1)[:, : self.shape[-1]].reshape(self.shape)

    @torch.no_grad()
    def packed(self) -> PackedWeight:
        """The weight as it is stored."""
        _, codes, scales = self.rounded(self.offsets, self.factors)
        weight_type = self.scheme.weight
        stored = join_groups((codes + self.zeros[..., None]).round().to(torch.uint8), self.shape[-1])
        above = self.shape[:-1]
        return PackedWeight(
            self.scheme,
            self.shape,
            pack_codes(stored, weight_type.bits).reshape(*above, -1),
            scales.to(self.dtype).reshape(*above, -1),
            None if weight_type.symmetric else self.zeros.to(torch.uint8).reshape(*above, -1),
        )


class _Dequantized(torch.autograd.Function):
    """Groups as they are dequantized; by hand, as a chain of ops would keep ten temporaries of the weight's size."""

    @staticmethod
    def forward(ctx: Any, offsets: Tensor, factors: Tensor, learned: _Learned) -> Tensor:
        """From offsets [rows, groups, n] and factors [rows, groups]."""
        codes, limited, scales = learned.rounded(offsets, factors)
        ctx.learned = learned
        ctx.save_for_backward(codes == limited, limited, scales)
        return limited * scales

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Through what was rounded as if it were not, and of the offsets only where codes were not limited."""
        inside, codes, scales = ctx.saved_tensors
        ratio = (ctx.learned.groups / scales).mul_(inside)
        of_scale = torch.sub(codes, ratio, out=ratio).mul_(gradient).sum(-1)
        return gradient * scales * inside, of_scale * ctx.learned.scales, None


METHOD = AutoRound()
