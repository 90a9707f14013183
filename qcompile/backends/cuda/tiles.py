"""How a product is cut: tile sizes, splits along the input features, pipeline depth. By shape and GPU.

``choose`` is the one place that decides, for a graph that is traced and for a kernel that is launched: by what was
measured on this GPU (``tables.py``), otherwise by the rules here. Those were read off compiled code (registers, shared
memory, instructions per weight) and bandwidth arithmetic; no GPU has timed them yet.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

from torch import SymInt, Tensor

from ...labels import hint
from . import tables
from .targets import Target

DENSE, EACH_ROW, BLOCKS = 0, 1, 2  # what ``device/places.py`` does for each
MOST_SPLITS = 8  # a sum of so few numbers is unrolled by Inductor, and so becomes part of whatever reads it
FEW_ROWS = 32  # up to so many, scales are applied to sums instead of weights
MOST_ROWS = 2**15  # from here on, more of them change no tile

SIZES: Mapping[str, tuple[int, ...]] = {
    "bm": (16, 32, 64, 128, 256), "bn": (64, 128), "bk": (64, 128), "splits": (1, 2, 4, MOST_SPLITS),
    "stages": (2, 3, 4, 5, 6), "warps": (4, 8),
}  # fmt: skip
"""What each size of ``Tiles`` may be, where ``unfit`` allows it for a product. All of that compiles without spills for
sm_90; of 250 configurations for sm_80 three spill, four to six times, which their times tell."""


class Weight(NamedTuple):
    """A stored weight [experts, out, columns], as far as tiles depend on it; experts 0: of a Linear.

    kind: its numbers, "w4a16" or "w8a16" with float activations, otherwise as ``scaled_product`` calls them: "int4",
    "int8", "fp8". out and columns are those that are stored, multiples of 64. group: columns that share a scale, 0 for
    all. part: of a layer of experts, "gate_up" or "down".
    """

    kind: str
    out: int
    columns: int
    experts: int = 0
    group: int = 0
    part: str = ""

    @classmethod
    def of(cls, codes: Tensor, kind: str, group: int = 0, experts: int = 0, part: str = "") -> Weight:
        """A prepared weight: rows and columns of ``codes``, or (``layouts.py``) tiles of 16 rows."""
        out, columns, experts = hint(codes.shape[-2]), hint(codes.shape[-1]), hint(experts)
        if bits := {"w4a16": 4, "w8a16": 8, "int4": 4}.get(kind):
            out, columns = out * 16, columns // (2 * bits)
        return cls(kind, out, columns, experts, group, part)

    @property
    def bits(self) -> int:
        """Of a stored weight."""
        return 4 if self.kind in ("w4a16", "int4") else 8

    @property
    def x_bits(self) -> int:
        """Of an activation."""
        return 16 if self.kind.endswith("a16") else 8

    @property
    def longest(self) -> int:
        """Columns that a step may have: those of a group, or of two of 32, where activations are quantized."""
        whole = max(64, min(self.group, 128)) if self.group and self.x_bits == 8 else 128
        return whole if self.columns % 128 == 0 else 64

    def mode(self, rows: int) -> int:
        """How programs find their rows."""
        return DENSE if not self.experts else EACH_ROW if each_row(rows, self.experts) else BLOCKS

    def most(self, rows: int) -> int:
        """The largest number of rows that has the key of this one: what is measured for all of them."""
        return min(bucket(rows), self.experts // 2) if self.mode(rows) == EACH_ROW else bucket(rows)

    def key(self, rows: int) -> str:
        """What a table calls this product: rows are rounded up to a power of two."""
        words = [self.kind, f"g{self.group}" if self.group else "", self.part]
        words.append("x".join(map(str, (*([self.experts] if self.experts else []), self.out, self.columns))))
        apart = " apart" if self.mode(rows) == EACH_ROW else ""
        return f"{' '.join(filter(None, words))}: {bucket(rows)} rows{apart}"


@dataclass(frozen=True)
class Tiles:
    """One program computes [bm rows, bn channels], ``bk`` features at a time, of one ``splits``-th of them."""

    mode: int
    bm: int
    bn: int
    bk: int
    splits: int
    stages: int
    warps: int


def bucket(rows: int) -> int:
    """Numbers of rows up to this power of two share their tiles."""
    return min(MOST_ROWS, 1 << (max(1, rows) - 1).bit_length())


# --------------------------------------------------------------------------------------------------------- choosing

_DECIDES: ContextVar[Callable[[Weight, int, Target], Tiles] | None] = ContextVar("cuda_tiles", default=None)


def choose(weight: Weight, rows: int, target: Target) -> Tiles:
    """Tiles for ``rows`` of activations."""
    decide = _DECIDES.get()
    return known(weight, rows, target) if decide is None else decide(weight, rows, target)


def splits_in_graph(weight: Weight, rows: int | SymInt, target: Target) -> int:
    """Splits that become part of a graph; 0 for an unknown number of rows, for which each launch chooses.

    Of that one tiles are chosen too, for the rows that the graph is traced with: if any are to be measured, then now.
    """
    splits = choose(weight, hint(rows), target).splits if hint(rows) else 0
    return 0 if isinstance(rows, SymInt) else splits


@contextmanager
def decided_by(decide: Callable[[Weight, int, Target], Tiles]) -> Iterator[None]:
    """Within, ``choose`` asks ``decide``: to measure tiles, or to measure with them."""
    token = _DECIDES.set(decide)
    try:
        yield
    finally:
        _DECIDES.reset(token)


def known(weight: Weight, rows: int, target: Target) -> Tiles:
    """What is in a table, or else the rule's."""
    return _known(weight, rows, target, tables.generation())


@functools.lru_cache(maxsize=4096)
def _known(weight: Weight, rows: int, target: Target, generation: int) -> Tiles:
    return tuned(weight, rows, target) or rule(weight, rows, target)


def tuned(weight: Weight, rows: int, target: Target) -> Tiles | None:
    """What was measured on this GPU. Tiles of a table that do not fit the product are reported, and not used."""
    key = weight.key(rows)
    for entry, path in tables.find(target, key):
        chosen = of_entry(entry, weight, rows)
        reason = unfit(chosen, weight, rows, target)
        if not reason:
            return chosen
        tables.report(f"{path}: the tiles for {key!r} are not used: {reason}")
    return None


def of_entry(entry: tables.Entry, weight: Weight, rows: int) -> Tiles:
    """The tiles that a table holds, for this number of rows."""
    return Tiles(weight.mode(rows), **{name: getattr(entry, name) for name in SIZES})


def unfit(tiles: Tiles, weight: Weight, rows: int, target: Target) -> str:
    """Why no program may be launched with such tiles; "" if one may."""
    for name, allowed in SIZES.items():
        if getattr(tiles, name) not in allowed:
            return f"{name} is {getattr(tiles, name)}, none of {', '.join(map(str, allowed))}"
    if tiles.mode == EACH_ROW and tiles.bm != 16:
        return f"bm is {tiles.bm}, but a program has one row, and its tile 16"
    if weight.part and tiles.splits != 1:
        return f"splits is {tiles.splits}, but programs of {weight.part} go through all columns"
    if weight.out % tiles.bn:
        return f"bn is {tiles.bn}, which does not divide {weight.out} channels"
    if tiles.bk > weight.longest:
        return f"bk is {tiles.bk}, but {weight.group or weight.columns} columns allow steps of {weight.longest}"
    if weight.columns % (tiles.splits * tiles.bk):
        return f"{weight.columns} columns are not {tiles.splits} times a multiple of {tiles.bk} (splits, bk)"
    if tiles.bm * tiles.bn > 32 * tiles.warps * _most_sums(weight, tiles.warps, target):
        return f"{tiles.bm} x {tiles.bn} sums do not fit into the registers of {tiles.warps} warps"
    if (shared := shared_bytes(tiles, weight, target)) > target.shared:
        return f"they take {shared} bytes of shared memory, and a block of {target.name} has {target.shared}"
    return ""


def _most_sums(weight: Weight, warps: int, target: Target) -> int:
    """Of a thread, so that its 255 registers hold them: fewer where each step has sums of its own, or without wgmma."""
    twice = weight.x_bits == 8 and (weight.group > 0 or weight.kind == "fp8")
    return 128 if warps == 8 and target.has_wgmma and not twice else 64


def shared_bytes(tiles: Tiles, weight: Weight, target: Target) -> int:
    """At least the shared memory of a program: codes, activations and scales of each stage; or sums, while written."""
    codes, rows = tiles.bn * tiles.bk * weight.bits // 8, tiles.bm * tiles.bk * weight.x_bits // 8
    scales = 4 * tiles.bn * max(1, tiles.bk // weight.group) if weight.group else 0
    scales += 4 * tiles.bm if weight.group and weight.kind == "fp8" else 0
    stages = tiles.stages - 1 if target.arch else tiles.stages  # Triton has one of AMD's in registers
    return max(stages * (codes + rows + scales), 4 * tiles.bm * tiles.bn)


# -------------------------------------------------------------------------------------------------------- the rules


def rule(weight: Weight, rows: int, target: Target) -> Tiles:
    """Tiles of a product that nobody has measured."""
    mode, experts, out, columns = weight.mode(rows), weight.experts, weight.out, weight.columns
    each = rows if mode == DENSE else 1 if mode == EACH_ROW else -(-rows // experts)
    whole, narrow = weight.longest, 1024 // weight.x_bits
    if each > 64:
        return _many_rows(weight, mode, each, min(whole, narrow if target.has_wgmma else 64), target)
    bm = max(16, bucket(each))
    bk = whole if target.has_wgmma or bm <= FEW_ROWS else min(whole, narrow)
    bn = 128 if out % 128 == 0 and out * columns >= 2**25 else 64
    blocks = -(-each // bm) if mode == DENSE else rows
    splits = 1 if weight.part else _splits(blocks * (out // bn), columns, bk, target)
    return Tiles(mode, bm, bn, bk, splits, 4 if target.has_wgmma or weight.bits == 4 else 3, 4)


def each_row(rows: int, experts: int) -> bool:
    """Whether rows of experts are so few that hardly any two of them share one."""
    return 2 * rows <= experts


def expert_splits(tokens: int, chosen: int, out: int, target: Target) -> int:
    """How many programs share the ``chosen`` experts of a token and 64 of its ``out`` channels."""
    splits = 1
    while (
        tokens * (out // 64) * splits < 2 * target.multiprocessors
        and splits < MOST_SPLITS
        and not chosen % (2 * splits)
    ):
        splits *= 2
    return splits


def _many_rows(weight: Weight, mode: int, each: int, bk: int, target: Target) -> Tiles:
    bn = 128 if weight.out % 128 == 0 else 64
    if target.has_wgmma and each >= 512 and mode == DENSE and 256 * bn <= 32 * 8 * _most_sums(weight, 8, target):
        return Tiles(mode, 256, bn, bk, 1, 4, 8)
    return Tiles(mode, 128, bn, bk, 1, 4 if target.has_wgmma else 3, 8)


def _splits(programs: int, columns: int, bk: int, target: Target) -> int:
    """How many programs share the input features of a tile, so that there are two for each multiprocessor."""
    splits = 1
    while programs * splits < 2 * target.multiprocessors and splits < MOST_SPLITS:
        if columns % (2 * splits * bk) or columns // (2 * splits) < 2 * bk:
            break
        splits *= 2
    return splits


def grid_blocks(tiles: Tiles, rows: int, experts: int) -> int:
    """Programs along the rows: enough for every expert to have a last block that is not full."""
    if tiles.mode == EACH_ROW:
        return rows
    return math.ceil(rows / tiles.bm) if tiles.mode == DENSE else rows // tiles.bm + min(rows, experts)
