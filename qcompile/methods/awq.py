"""AWQ: scale up the columns of a weight that meet large inputs, so that rounding harms them less (arXiv 2306.00978).

For a value x that some weights W read: ``x / s`` and ``W * s`` with ``s = mean|x| ** r``, or ``mean|x| ** r / w ** (1 -
r)`` where w is the mean of |W| over its rows, each weight as a share of the largest in its group. r is searched for the
least error of the products; then the range of every group is, for the least error of what the group contributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..groups import join_groups, split_groups
from ..numerics import minmax_scales, pack_codes
from ..observers import Needs, Statistics
from ..types import PackedWeight, Scheme
from . import Reader, check_options
from ._aim import aimed
from ._ranges import encode, group_blocks, search_ranges
from ._smoothing import best_scale, pooled_mean
from .gptq import METHOD as GPTQ

ROWS = 1024  # inputs of a site, or of an expert, on which scales and ranges are searched


class AWQ:
    """Options, the default first:

    scaling   True searches a scale for each value whose producer can be divided by it; False leaves all as they are
    clip      True searches the range of each group, False takes all of it
    rounding  "nearest"; "gptq" rounds what was scaled by method gptq, with its defaults (``clip`` does not matter then)
    """

    name = "awq"
    choices: ClassVar = {"scaling": (True, False), "clip": (True, False), "rounding": ("nearest", "gptq")}

    def check(self, options: dict[str, object]) -> None:
        """Raise ConfigError for an option that does not exist or has a wrong value."""
        check_options(self.name, options, self.choices)

    def refuses(self, scheme: Scheme, options: dict[str, object]) -> str:
        """Only integers are rounded by this method."""
        return "" if scheme.weight.number == "int" else f"it rounds to integers, not to {scheme.weight.number}"

    def needs(self, scheme: Scheme, options: dict[str, object]) -> Needs:
        """Some inputs, that come from what is quantized already."""
        scaling = bool(options.get("scaling", True))
        return Needs(rows=ROWS, hessian=True, sequential=True, drift=True, smoothing=scaling)

    def smooth(
        self, readers: Sequence[Reader], shared: Callable[[Tensor], Tensor], options: dict[str, object]
    ) -> Tensor | None:
        """The scale [in] with the least error; None where none helps."""
        inputs = pooled_mean(readers).clamp(min=1e-8)
        weights = _relative_mean(readers)
        kinds = [inputs.pow, lambda share: inputs.pow(share) / weights.pow(1 - share)]
        return best_scale(readers, kinds, shared)

    def quantize(
        self,
        weight: Tensor,
        scheme: Scheme,
        options: dict[str, object],
        statistics: Statistics | None = None,
        dtype: torch.dtype | None = None,
    ) -> PackedWeight:
        """Round a float weight [out, in], scaled already, to nearest in the best range of each group."""
        assert statistics is not None
        if options.get("rounding") == "gptq":
            return GPTQ.quantize(weight, scheme, {}, statistics, dtype)
        own = aimed(weight, statistics)
        return round_in_ranges(own, scheme, statistics, dtype or weight.dtype, bool(options.get("clip", True)))


def round_in_ranges(
    weight: Tensor, scheme: Scheme, statistics: Statistics, dtype: torch.dtype, searched: bool
) -> PackedWeight:
    """Round a float weight [out, in] to nearest; ranges ``searched`` for the error of what the inputs make of it."""
    weight_type = scheme.weight
    if searched:
        x = statistics.rows.float()
        blocks = group_blocks(x.T @ x, weight_type.group_size or weight.shape[1])
        damping = 0.01 * blocks.diagonal(dim1=1, dim2=2).mean() + 1e-12  # inputs that were not seen count a little
        blocks.diagonal(dim1=1, dim2=2).add_(damping)
        scales, zeros = search_ranges(weight, weight_type, dtype, blocks)
    else:
        scales, zeros = minmax_scales(
            split_groups(weight.float(), weight_type.group_size or weight.shape[1]), weight_type, dtype
        )
    return PackedWeight(
        scheme,
        tuple(weight.shape),
        pack_codes(encode(weight, weight_type, scales, zeros), weight_type.bits),
        scales.to(dtype),
        None if weight_type.symmetric else zeros.to(torch.uint8),
    )


def _relative_mean(readers: Sequence[Reader]) -> Tensor:
    """Mean over all rows of |w| as a share of the largest in its group, float32 [in]."""
    total, rows = torch.zeros(()), 0
    for reader in readers:
        weight, size = reader.weight.abs(), reader.scheme.weight.group_size or reader.weight.shape[1]
        groups = split_groups(weight, size)
        shares = groups / (groups.amax(-1, keepdim=True) + 1e-6)
        total, rows = total + join_groups(shares, weight.shape[1]).sum(0), rows + len(weight)
    return (total / rows).clamp(min=1e-4)


METHOD = AWQ()
