"""GPTQ: round column by column, and let the columns that follow make up for the error (arXiv 2210.17323).

What counts is the error |X (W - W').T|² for inputs X. Let X.T @ X = R @ R.T with an upper triangular R. Before column
j is rounded, ``W[:, j] += (W[:, i] - W'[:, i]) * R[i, j] / R[j, j]`` for all columns i before it. These are the codes
of GPTQ, without the inverse of the Hessian (QuIP, arXiv 2307.13304, theorem 6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CalibrationError, ConfigError
from ..numerics import pack_codes, quantize_weight
from ..observers import Needs, Statistics
from ..types import PackedWeight, Scheme, WeightType
from ._aim import aimed, factorized
from ._ranges import search_ranges

COLUMNS = 64  # for which the errors of all columns before them are made up by one product


class GPTQ:
    """Options, the default first:

    actorder  in which order columns are rounded: "static", those with the largest inputs first, in groups as they
              lie; "group_aware", the same inside of each group, and groups by their largest; "group", groups are made
              in that order (inputs are permuted when the model runs); "none"
    damping   0.01: share of the mean of H's diagonal that is added to it; more for little calibration data
    observer  "weighted" searches the scale of each group with the least error, each column's by how much of it the
              columns that follow cannot make up for (R[i, i]²); "mse" counts all alike, "minmax" takes the range
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
        actorder = str(options.get("actorder", "static"))
        size = min(scheme.weight.group_size or weight.shape[1], weight.shape[1])
        order = _order(statistics.hessian.diagonal(), actorder, size)
        factor = factorized(statistics, damping, order)
        if factor is None:
            raise CalibrationError(
                "the Hessian of its inputs cannot be inverted, even when it is damped: calibrate on more data, or "
                "quantize it by method 'rtn'"
            )
        weight, left = aimed(weight, statistics, damping, order), factor.diagonal().square()
        grid = _Grid(weight, dtype, scheme.weight, size, str(options.get("observer", "weighted")))
        if actorder == "static" or size == weight.shape[1]:
            grid.fit(slice(None), weight, left[torch.argsort(order)])
        place = torch.arange(len(order), device=order.device) if actorder == "group" else order  # in storage
        rounded = _round_columns(weight.T[order], factor, grid, (place // size).tolist())
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
        self.scheme = Scheme(WeightType(weight_type.bits, weight_type.symmetric, size))
        self.dtype, self.observer, self.top = dtype, observer, 2**weight_type.bits - 1
        groups = -(-weight.shape[1] // size)
        self.scales = weight.new_zeros((groups, weight.shape[0]), dtype=torch.float32)
        self.zeros = torch.full_like(self.scales, 2 ** (weight_type.bits - 1))

    def fit(self, groups: slice, weight: Tensor, importance: Tensor) -> None:
        """Choose scales and zero points of ``groups`` for their ``weight`` [out, in]; they are representable.

        importance: [in], of the squared error of each column.
        """
        if self.observer == "weighted":
            scales, zeros = search_ranges(weight, self.scheme.weight, self.dtype, importance)
            self.scales[groups], self.zeros[groups] = scales.T, zeros.T
            return
        packed = quantize_weight(weight, self.scheme, scale_dtype=self.dtype, observer=self.observer)
        self.scales[groups] = packed.scales.T.float()
        if packed.zeros is not None:
            self.zeros[groups] = packed.zeros.T.float()

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


def _round_columns(columns: Tensor, factor: Tensor, grid: _Grid, groups: list[int]) -> Tensor:
    """Codes uint8 [in, out] of float32 ``columns`` [in, out], in their order; ``groups`` are those of the columns.

    Columns become their errors. A group that is not fitted yet is when its first column is reached: its columns are
    adjacent.
    """
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    left, factor = factor.diagonal().square(), factor / factor.diagonal()
    start = 0
    while start < len(groups):
        stop = min(start + COLUMNS, len(groups))
        while stop < len(groups) and groups[stop] == groups[stop - 1] and not grid.is_fitted(groups[stop]):
            stop += 1  # a group that will be fitted must be up to date
        block = torch.addmm(columns[start:stop], factor[:start, start:stop].T, columns[:start])
        for i, group in enumerate(groups[start:stop]):
            if not grid.is_fitted(group):
                own = slice(start + i, start + i + groups[start:stop].count(group))
                moved = block[i : i + own.stop - own.start] - columns[own]  # each as if it were the next one
                moved = torch.linalg.solve_triangular(factor[own, own].T, moved, upper=False, unitriangular=True)
                grid.fit(slice(group, group + 1), (columns[own] + moved).T, left[own])
            codes[start + i], value = grid.round(group, block[i])
            error = columns[start + i].sub_(value)
            block[i + 1 :].addr_(factor[start + i, start + i + 1 : stop], error)
        start = stop
    return codes


METHOD = GPTQ()
