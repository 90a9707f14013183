"""A part of a weight: cut from the canonical one, or read from its file without the rest.

A part whose ends fall between the words, groups and blocks of a stored weight is a stored weight of the same format
itself, only smaller. So a format reads it as it reads any other, through a ``get`` that gives it slices. Where an end
falls inside of a word, or columns are in another order (act-order), the whole weight is read, and cut afterwards.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import torch
from torch import Tensor

from .. import numerics
from ..errors import FormatError
from ..formats import Format, StoredSite, TensorHeader
from ..storage import Folder
from ..types import PackedWeight, Scheme
from .shares import Runs, indices, length

# ------------------------------------------------------------------------------------------------- canonical weights


def cut(packed: PackedWeight, rows: Runs | None, columns: Runs | None) -> PackedWeight:
    """Rows (outputs) and columns of a weight [out, in]; columns are those of the stored order, which they keep.

    A permuted weight of which columns are taken has no order any more: they read the inputs that ``inputs_of`` names.
    """
    out, inn = packed.shape
    weight, scheme = packed.scheme.weight, packed.scheme
    codes, scales, zeros, permutation = packed.codes, packed.scales, packed.zeros, packed.permutation
    if rows is not None:
        chosen = indices(rows)
        codes = codes[chosen]
        if not weight.per_tensor:
            height = weight.block[0] if weight.block else 1
            above = indices(_scaled(rows, Fraction(height), out)) if height > 1 else chosen
            scales, zeros = scales[above], None if zeros is None else zeros[above]
        out = length(rows)
    if columns is not None:
        codes = _columns(codes, columns, weight.bits, inn)
        width = weight.scale_columns
        if width and scales.shape[1] > 1:
            groups = indices(_scaled(columns, Fraction(width), inn))
            scales, zeros = scales[:, groups], None if zeros is None else zeros[:, groups]
        inn, permutation = length(columns), None
    held = {"outer": packed.outer, **packed.activation_tensors()}
    return PackedWeight(
        scheme, (out, inn), codes.contiguous(), scales.contiguous(),
        None if zeros is None else zeros.contiguous(), permutation, **held,
    )  # fmt: skip


def cut_experts(
    packed: PackedWeight, experts: tuple[int, int], rows: Runs | None, columns: Runs | None
) -> PackedWeight:
    """The same of every expert in [first, end) of a weight [experts, out, in]."""
    return PackedWeight.of_experts([cut(packed.expert(index), rows, columns) for index in range(*experts)])


def inputs_of(packed: PackedWeight, columns: Runs) -> Tensor:
    """Input features, int64, that stored columns read."""
    chosen = indices(columns)
    return chosen if packed.permutation is None else packed.permutation.long().cpu()[chosen]


def _columns(codes: Tensor, columns: Runs, bits: int, inn: int) -> Tensor:
    if all(start * bits % 8 == 0 and (stop * bits % 8 == 0 or stop == inn) for start, stop in columns):
        return torch.cat([codes[:, start * bits // 8 : math.ceil(stop * bits / 8)] for start, stop in columns], 1)
    return numerics.pack_codes(numerics.unpack_codes(codes, bits, inn)[:, indices(columns)].contiguous(), bits)


# ------------------------------------------------------------------------------------------------------ stored weights


def read_part(
    format: Format, site: StoredSite, folder: Folder, rows: Runs | None, columns: Runs | None
) -> tuple[PackedWeight, Tensor | None]:
    """Rows and columns of a stored Linear, and (of a permuted one, of which columns are taken) the inputs they read."""
    part = _Part(format, site, folder, rows, columns)
    if part.fits:
        return format.read(part.site, part.get), None
    whole = format.read(site, folder.read)
    chosen = inputs_of(whole, columns) if columns is not None and whole.permutation is not None else None
    return cut(whole, rows, columns), chosen


def read_part_of_bias(
    format: Format, site: StoredSite, folder: Folder, rows: Runs | None, columns: Runs | None, first: bool
) -> Tensor | None:
    """The bias of a site that owns it: of its rows; of columns what they add to it, which the ranks must sum.

    first: whether this rank has the stored bias itself; the others add only what their columns do.
    """
    part = _Part(format, site, folder, rows, columns)
    if not part.fits:
        bias = format.read_bias(site, folder.read) if columns is None or first else None
        return bias if bias is None or rows is None else bias[indices(rows)]

    def get(name: str, index: int | None = None) -> Tensor:
        tensor = part.get(name, index)
        return torch.zeros_like(tensor) if name.endswith(".quant_bias") and not first else tensor

    return format.read_bias(part.site, get)


class _Part:
    """A part of a stored Linear as one of its own: ``site``, and ``get``; ``fits`` tells whether that is possible."""

    def __init__(
        self, format: Format, site: StoredSite, folder: Folder, rows: Runs | None, columns: Runs | None
    ) -> None:
        self.folder, self.site = folder, site
        self.order = format.order_of(site)
        self.cuts: dict[str, list[Runs | None]] = {}
        out, inn = site.shape
        self.runs = {"o": rows, "i": columns}
        self.sizes = {"o": out, "i": inn}
        local = (out if rows is None else length(rows), inn if columns is None else length(columns))
        unneeded = format.unneeded(site, columns is not None)
        tensors = tuple(name for name in site.tensors if name.removeprefix(f"{site.name}.") not in unneeded)
        self.fits = bool(self.order) and all(self._plan(name, site.scheme) for name in tensors)
        ordered = columns is not None and bool(site.layout.get("g_idx"))
        if ordered and self.fits:
            self.fits = self._is_plain(site)
            tensors = tuple(name for name in tensors if not name.endswith("g_idx"))
        layout = {**site.layout, "g_idx": False} if ordered else site.layout
        bias = site.owns_bias and "bias" not in unneeded
        self.site = dataclasses.replace(site, shape=local, tensors=tensors, layout=layout, owns_bias=bias)
        self.whole = site

    def get(self, name: str, index: int | None = None) -> Tensor:
        """The part of a stored tensor; of ``weight_shape`` the shape of the part."""
        if name.endswith(".weight_shape"):
            stored = self.folder.read(name)
            if stored.tolist() != list(self.whole.shape):
                raise FormatError(f"{name} says {stored.tolist()}, but the model's Linear is {list(self.whole.shape)}")
            return torch.tensor(self.site.shape, dtype=stored.dtype)
        return self.folder.read_slice(name, self.cuts[name])

    def _plan(self, name: str, scheme: Scheme) -> bool:
        """Find which indices of each dimension of a stored tensor belong to the part."""
        header = self.folder.headers[name]
        suffix = name.rpartition(".")[2]
        if suffix == "weight_shape":
            return True
        letters = self.order if len(header.shape) == 2 else ("i" if suffix.endswith("g_idx") else "o")
        cuts: list[Runs | None] = []
        for letter, size in zip(letters, header.shape, strict=False):
            runs = self.runs[letter]
            if runs is None or size == 1:
                cuts.append(None)
                continue
            unit = _unit(scheme, header, letter, size, self.sizes[letter], suffix)
            if unit is None or not all(_falls_between(run, unit, self.sizes[letter]) for run in runs):
                return False
            cuts.append(_scaled(runs, unit, self.sizes[letter]))
        self.cuts[name] = cuts + [None] * (len(header.shape) - len(cuts))
        return True

    def _is_plain(self, site: StoredSite) -> bool:
        """Whether a stored order of the columns is that of the inputs."""
        name = next(name for name in site.tensors if name.endswith("g_idx"))
        stored, size = self.folder.read(name), site.scheme.weight.group_size or max(site.shape[1], 1)
        return torch.equal(stored.long(), torch.arange(site.shape[1]) // size) or bool((stored == -1).all())


def _unit(scheme: Scheme, header: TensorHeader, letter: str, size: int, features: int, suffix: str) -> Fraction | None:
    """How many features one index of a stored dimension is about; None where that cannot be told."""
    weight = scheme.weight
    if size == features:
        return Fraction(1)
    grid = (weight.block or (1, weight.group_size or features))["oi".index(letter)]
    is_grid = "scale" in suffix or "offset" in suffix or suffix in ("weight_zero_point", "qzeros")
    if is_grid and size == -(-features // grid) and grid > 1:
        return Fraction(grid)
    if header.dtype == "I32" and size * 32 == features * weight.bits:
        return Fraction(32, weight.bits)
    if header.dtype in ("U8", "I8") and size * 2 == features and weight.bits == 4:
        return Fraction(2)
    return None


def _falls_between(run: tuple[int, int], unit: Fraction, features: int) -> bool:
    start, stop = run
    return (start / unit).denominator == 1 and ((stop / unit).denominator == 1 or stop == features)


def _scaled(runs: Runs, unit: Fraction, features: int) -> Runs:
    """Runs of features as runs of indices of a dimension, each of which is about ``unit`` features."""
    return tuple(
        (int(start / unit), math.ceil(stop / unit) if stop == features else int(stop / unit)) for start, stop in runs
    )


def take(tensor: Tensor, dim: int, runs: Runs) -> Tensor:
    """The indices of runs along one dimension, in memory of their own."""
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in runs], dim).contiguous()
