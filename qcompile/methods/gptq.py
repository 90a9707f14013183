"""GPTQ: round column by column, and let the columns that follow make up for the error (arXiv 2210.17323).

What counts is the error |X (W - W').T|² for inputs X. Let H = X.T @ X, and U the upper Cholesky factor of its inverse.
After column i is rounded to q, all later columns j become ``W[:, j] -= (W[:, i] - q) / U[i, i] * U[i, j]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CalibrationError, ConfigError
from ..numerics import pack_codes, quantize_weight
from ..observers import Needs, Statistics
from ..types import PackedWeight, Scheme, WeightType
from ._aim import aimed, one_thread
from ._ranges import search_ranges

COLUMNS = 128  # rounded before the rest of the weight is updated by one product


class GPTQ:
    """Options, the default first:

    actorder  in which order columns are rounded: "static", those with the largest inputs first, in groups as they
              lie; "group_aware", the same inside of each group, and groups by their largest; "group", groups are made
              in that order (inputs are permuted when the model runs); "none"
    damping   0.01: share of the mean of H's diagonal that is added to it; more for little calibration data
    observer  "weighted" searches the scale of each group with the least error, each column's by how much of it the
              columns that follow cannot make up for (1 / U[i, i]²); "mse" counts all alike, "minmax" takes the range
    target    "float" aims at what the float model computes, and so makes up for the errors of earlier layers; "own" at
              what this weight would compute from the inputs that it gets

    Scales are chosen when their group is reached, except by "static", which has them from the weights as they were.
    """

    name = "gptq"

    def check(self, options: dict[str, object]) -> None:
        """Raise ConfigError for an option that does not exist or has a wrong value."""
        for key, value in options.items():
            if key == "damping":
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                    raise ConfigError(f"option 'damping' of method 'gptq' must be a number from 0 to 1, not {value!r}")
            elif key not in _CHOICES:
                raise ConfigError(f"method 'gptq' has no option {key!r}. Known: damping, {', '.join(_CHOICES)}.")
            elif value not in _CHOICES[key]:
                raise ConfigError(f"option {key!r} of method 'gptq' must be one of {_CHOICES[key]}, not {value!r}")

    def refuses(self, scheme: Scheme, options: dict[str, object]) -> str:
        """Only integers are rounded by this method."""
        return "" if scheme.weight.number == "int" else f"it rounds to integers, not to {scheme.weight.number}"

    def needs(self, scheme: Scheme, options: dict[str, object]) -> Needs:
        """H, of inputs that come from what is quantized already."""
        return Needs(hessian=True, sequential=True, drift=options.get("target") != "own")

    def quantize(
        self,
        weight: Tensor,
        scheme: Scheme,
        options: dict[str, object],
        statistics: Statistics | None = None,
        dtype: torch.dtype | None = None,
    ) -> PackedWeight:
        """Quantize a float weight [out, in] with the Hessian [in, in] of its inputs.

        CalibrationError when that is singular in spite of the damping.
        """
        assert statistics is not None
        assert statistics.hessian is not None
        dtype = dtype or weight.dtype
        damping = float(str(options.get("damping", 0.01)))
        weight = aimed(weight, statistics, damping)
        actorder = str(options.get("actorder", "static"))
        size = min(scheme.weight.group_size or weight.shape[1], weight.shape[1])
        order = _order(statistics.hessian.diagonal(), actorder, size)
        factor = _inverse_factor(statistics.hessian[order][:, order], damping)
        grid = _Grid(weight, dtype, scheme.weight, size, str(options.get("observer", "weighted")))
        left = factor.diagonal().square().reciprocal()
        if actorder == "static" or size == weight.shape[1]:
            inverse = torch.argsort(order)
            for group, columns in enumerate(weight.split(size, dim=1)):
                grid.fit(group, columns.T, left[inverse[group * size : group * size + size]])
        place = torch.arange(len(order), device=order.device) if actorder == "group" else order  # in storage
        rounded = _round_columns(weight.T.float()[order], factor, grid, (place // size).tolist())
        codes = torch.empty_like(rounded).index_copy_(0, place, rounded).T.contiguous()
        return PackedWeight(
            scheme,
            tuple(weight.shape),
            pack_codes(codes, scheme.weight.bits),
            grid.scales.T.to(grid.dtype).contiguous(),
            None if scheme.weight.symmetric else grid.zeros.T.to(torch.uint8).contiguous(),
            order.to(torch.int32) if actorder == "group" else None,
        )


_CHOICES = {
    "actorder": ("static", "group_aware", "group", "none"),
    "observer": ("weighted", "mse", "minmax"),
    "target": ("float", "own"),
}


class _Grid:
    """What each group of a weight [out, in] is rounded to: scales and zeros float32 [groups, out], once ``fit``."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, weight_type: WeightType, size: int, observer: str) -> None:
        self.one_group = Scheme(WeightType(weight_type.bits, weight_type.symmetric))
        self.dtype, self.observer, self.top = dtype, observer, 2**weight_type.bits - 1
        groups = -(-weight.shape[1] // size)
        self.scales = weight.new_zeros((groups, weight.shape[0]), dtype=torch.float32)
        self.zeros = torch.full_like(self.scales, 2 ** (weight_type.bits - 1))

    def fit(self, group: int, columns: Tensor, importance: Tensor) -> None:
        """Choose scale and zero point of a group for its ``columns`` [group, out]; they are representable.

        importance: [group], of the squared error of each column.
        """
        if self.observer == "weighted":
            scales, zeros = search_ranges(columns.T, self.one_group.weight, self.dtype, importance)
            self.scales[group], self.zeros[group] = scales[:, 0], zeros[:, 0]
            return
        packed = quantize_weight(columns.T, self.one_group, scale_dtype=self.dtype, observer=self.observer)
        self.scales[group] = packed.scales[:, 0].float()
        if packed.zeros is not None:
            self.zeros[group] = packed.zeros[:, 0].float()

    def is_fitted(self, group: int) -> bool:
        """Whether ``fit`` was called for a group; no scale that is stored is zero."""
        return bool(self.scales[group, 0] != 0)

    def round(self, group: int, column: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, as float32, of a column [out], and what they stand for."""
        scale, zero = self.scales[group], self.zeros[group]
        codes = torch.round(column / scale).add_(zero).clamp_(0, self.top)
        return codes, (codes - zero) * scale


def _order(diagonal: Tensor, actorder: str, size: int) -> Tensor:
    """In which order columns are rounded, int64 [in]; ties in the order of columns."""
    if actorder == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    if actorder != "group_aware":
        return torch.argsort(diagonal, descending=True, stable=True)
    groups = torch.arange(len(diagonal), device=diagonal.device).split(size)
    inside = [group[torch.argsort(diagonal[group], descending=True, stable=True)] for group in groups]
    largest = torch.stack([diagonal[group[0]] for group in inside])
    return torch.cat([inside[i] for i in torch.argsort(largest, descending=True, stable=True).tolist()])


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of a damped Hessian [in, in]; inputs that are always zero stand alone.

    The damping grows where rounding made the Hessian indefinite. In one thread, which fixes the order of its sums.
    """
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1  # the indexed copy is ours
    mean = diagonal.mean()
    with one_thread():
        for share in (damping, *(step for step in (0.01, 0.1, 1.0) if step > damping)):
            damped = hessian.clone()
            damped.diagonal().add_(mean * share)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed and bool(torch.isfinite(factor.diagonal()).all()):
                return factor
    raise CalibrationError(
        "the Hessian of its inputs cannot be inverted, even when it is damped: calibrate on more data, or quantize it "
        "by method 'rtn'"
    )


def _round_columns(columns: Tensor, factor: Tensor, grid: _Grid, groups: list[int]) -> Tensor:
    """Codes uint8 [in, out] of float32 ``columns`` [in, out], in their order; ``groups`` are those of the columns.

    Columns are changed. A group that is not fitted yet is when its first column is reached: its columns are adjacent.
    """
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    left = factor.diagonal().square().reciprocal()
    start = 0
    while start < len(groups):
        stop = min(start + COLUMNS, len(groups))
        while stop < len(groups) and groups[stop] == groups[stop - 1] and not grid.is_fitted(groups[stop]):
            stop += 1  # a group that will be fitted must be up to date
        block, errors = columns[start:stop], torch.empty_like(columns[start:stop])
        for i, group in enumerate(groups[start:stop]):
            if not grid.is_fitted(group):
                members = slice(i, i + groups[start:stop].count(group))
                grid.fit(group, block[members], left[start:stop][members])
            rounded, value = grid.round(group, block[i])
            own = factor[start + i, start + i : stop]
            errors[i] = (block[i] - value) / own[0]
            block[i + 1 :].addr_(own[1:], errors[i], alpha=-1)
            codes[start + i] = rounded
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        start = stop
    return codes


METHOD = GPTQ()
