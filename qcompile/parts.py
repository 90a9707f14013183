"""Where the tensors of a model lie in a checkpoint: under other names, in parts, and the Linears of single experts.

transformers holds the experts of a layer in two tensors and stores each expert by itself. How, its conversion mapping
knows; so it is asked to store row numbers instead of weights, and what comes back says which rows are where.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import FormatError, UnsupportedError, shortened
from .experts import ExpertsLayout
from .formats import Shape, StoredSite
from .sites import block_name
from .skeleton import is_transformers
from .types import PackedWeight, Scheme, Site

NAMES = ("gate_proj", "up_proj", "down_proj")  # of the Linears of an expert, where transformers stores them fused


@dataclass(frozen=True)
class Part:
    """A stored tensor: rows ``start`` ... of a tensor of the model, whose dimensions but the last count as one."""

    name: str
    start: int
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """How many rows it holds; of a vector, elements."""
        return _rows(self.shape)


def stored_parts(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Part, ...]]:
    """Of the tensors of ``model``, named with their shapes, those that are stored otherwise: the parts, in their order.

    UnsupportedError for an architecture that stores something else than rows of its tensors.
    """
    if not is_transformers(model):
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    if not get_model_conversion_mapping(model, add_legacy=False):  # type: ignore[arg-type]
        return {}
    blocks: dict[str, list[str]] = {}
    for name in shapes:
        blocks.setdefault(block_name(name), []).append(name)
    parts: dict[str, tuple[Part, ...]] = {}
    known: dict[tuple, tuple[str, dict[str, tuple[Part, ...]]]] = {}  # by what a block holds: the first such block
    for block, names in blocks.items():
        kind = tuple((name.removeprefix(block), shapes[name]) for name in names)
        if kind not in known:
            known[kind] = block, _parts_of(model, names, shapes, revert_weight_conversion)
        first, found = known[kind]
        for name, own in found.items():
            moved = (dataclasses.replace(p, name=block + p.name.removeprefix(first)) for p in own)
            parts[block + name.removeprefix(first)] = own if block == first else tuple(moved)
    return parts


def _parts_of(
    model: nn.Module, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], store: Callable
) -> dict[str, tuple[Part, ...]]:
    """``stored_parts`` of the tensors of one decoder block, or of those outside of any."""
    starts, total = [], 0
    for name in names:
        starts.append(total)
        total += _rows(shapes[name]) + 1  # so that no run of numbers goes from one tensor to the next
    every = torch.arange(total)
    numbers = {}
    for name, start in zip(names, starts, strict=True):
        rows = every[start : start + _rows(shapes[name])]
        numbers[name] = rows.view(*shapes[name][:-1], 1) if len(shapes[name]) > 1 else rows.view(shapes[name])
    parts: dict[str, list[Part]] = {}
    for stored, rows in store(model, numbers).items():
        first, count = int(rows.flatten()[0]), rows.numel()
        place = bisect(starts, first) - 1
        owner = names[place]
        if not torch.equal(rows.flatten(), every[first : first + count]):
            raise UnsupportedError(
                f"{type(model).__name__} stores {stored} in a form that is not a part of {owner} or of any other "
                "tensor that it has; such models are not supported yet"
            )
        start = first - starts[place]
        shape = (*rows.shape[:-1], shapes[owner][-1]) if rows.dim() > 1 else tuple(rows.shape)
        if (stored, start, count) != (owner, 0, _rows(shapes[owner])):
            parts.setdefault(owner, []).append(Part(stored, start, shape))
    return {name: tuple(sorted(found, key=lambda part: part.start)) for name, found in parts.items()}


def _rows(shape: Sequence[int]) -> int:
    count = 1
    for size in shape[:-1] if len(shape) > 1 else shape:
        count *= size
    return count


def assemble(shape: tuple[int, ...], parts: Sequence[Part], read: Callable[[str], Tensor]) -> Tensor:
    """The tensor that parts make; they are read one by one into its memory."""
    first = read(parts[0].name)
    whole = first.new_empty(shape)
    rows = whole.view(-1, shape[-1]) if len(shape) > 1 else whole
    for part in parts:
        tensor = first if part is parts[0] else read(part.name)
        rows[part.start : part.start + part.rows] = tensor.view(part.rows, *rows.shape[1:])
    return whole


def take_apart(tensor: Tensor, parts: Sequence[Part]) -> Iterator[tuple[str, Tensor]]:
    """Stored names and tensors of a tensor of the model; the inverse of ``assemble``."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor
    for part in parts:
        yield part.name, rows[part.start : part.start + part.rows].view(part.shape)


# ------------------------------------------------------------------------------------------------------------ Linears


@dataclass(frozen=True)
class Piece:
    """One stored Linear of a site: its name on disk, its rows [start, start + rows) of the site's, of one expert."""

    name: str
    start: int
    rows: int


Pieces = tuple[tuple[Piece, ...], ...]  # of each expert, or of the one Linear


def linear_pieces(name: str, out_features: int, parts: Mapping[str, Sequence[Part]]) -> Pieces:
    """The one stored Linear of the Linear ``name``."""
    own = [part.name for part in parts.get(f"{name}.weight", ())] or [f"{name}.weight"]
    if len(own) > 1 or not own[0].endswith(".weight"):
        raise UnsupportedError(f"{name} is stored as {shortened(own)}, so that it cannot be stored quantized")
    return ((Piece(own[0].removesuffix(".weight"), 0, out_features),),)


def expert_pieces(layout: ExpertsLayout, projection: int, parts: Mapping[str, Sequence[Part]]) -> Pieces:
    """The stored Linears of projection 0 (up, gate first) or 1 (down), for each expert."""
    form = layout.arithmetic
    rows = form.hidden if projection else form.rows
    own = form.weights[-1:] if projection else form.weights[:-1]
    names = [f"{layout.name}.{{}}.{name}" for name in own]
    found = () if layout.listed else parts.get(f"{layout.name}.{own[0]}", ())
    if found and all(part.rows <= rows for part in found):  # else all experts are stored in one tensor
        of_experts: list[list[Part]] = [[] for _ in range(layout.experts)]
        for part in found:
            of_experts[part.start // rows].append(part)
        return tuple(_of_expert(own, expert, rows) for expert, own in enumerate(of_experts))
    if not layout.listed:
        gate_up = NAMES[:2] if rows == 2 * form.intermediate else NAMES[1:2]
        names = [f"{layout.name}.{{}}.{name}" for name in (NAMES[2:] if projection else gate_up)]
    elif form.interleaved and not projection:
        raise UnsupportedError(
            f"{layout.name}: experts in a list whose gate and up rows alternate cannot be stored quantized"
        )
    size = rows // len(names)
    return tuple(
        tuple(Piece(name.format(expert), i * size, size) for i, name in enumerate(names))
        for expert in range(layout.experts)
    )


def _of_expert(own: Sequence[Part], expert: int, rows: int) -> tuple[Piece, ...]:
    if sum(part.rows for part in own) != rows or not all(part.name.endswith(".weight") for part in own):
        names = shortened(part.name for part in own)
        raise UnsupportedError(f"{names}: experts that are stored so cannot be read or written quantized")
    return tuple(Piece(part.name.removesuffix(".weight"), part.start - expert * rows, part.rows) for part in own)


# ----------------------------------------------------------------------------------------------------- stored weights


@dataclass(frozen=True)
class StoredWeight:
    """The quantized weight of a site: its scheme, and the stored Linears of each expert, or of the one Linear."""

    site: Site
    scheme: Scheme
    pieces: Pieces
    stored: Mapping[str, StoredSite]

    @property
    def tensors(self) -> Iterator[str]:
        """Names of all stored tensors."""
        return (tensor for stored in self.stored.values() for tensor in stored.tensors)


def gather(site: Site, pieces: Pieces, found: Mapping[str, StoredSite]) -> StoredWeight | None:
    """The stored weight of a site from what a format found; None when it is float.

    UnsupportedError for experts, or gate and up, that differ in their schemes, FormatError for some that are missing.
    """
    names = [piece.name for own in pieces for piece in own]
    stored = {name: found[name] for name in names if name in found}
    if not stored:
        return None
    if missing := [name for name in names if name not in stored]:
        raise FormatError(f"{site.name}: {shortened(missing)} is not quantized, or missing, while the others are there")
    schemes: dict[Scheme, list[str]] = {}
    for name in names:
        schemes.setdefault(_stacked(stored[name].scheme, len(pieces[0])), []).append(name)
    if len(schemes) > 1:
        listed = "; ".join(f"{shortened(alike)} is {scheme}" for scheme, alike in schemes.items())
        raise UnsupportedError(f"{site.name}: all experts, gate and up, must have one scheme, but {listed}")
    return StoredWeight(site, next(iter(schemes)), pieces, stored)


def _stacked(scheme: Scheme, pieces: int) -> Scheme:
    """The scheme of several weights above each other: scales of whole tensors become those of rows."""
    if pieces == 1 or not scheme.weight.per_tensor:
        return scheme
    return dataclasses.replace(scheme, weight=dataclasses.replace(scheme.weight, per_tensor=False))


def read_weight(weight: StoredWeight, read: Callable[[StoredSite], PackedWeight]) -> PackedWeight:
    """The canonical weight of a site; experts are read one by one into the memory of all."""
    if weight.site.kind == "linear":
        (stored,) = weight.stored.values()
        return read(stored)

    def read_piece(piece: Piece) -> PackedWeight:
        stored = weight.stored[piece.name]
        if (packed := read(stored)).scheme != stored.scheme:
            raise UnsupportedError(f"{piece.name}: experts whose g_idx has uneven groups are not supported")
        return packed

    parts = ([read_piece(piece) for piece in own] for own in weight.pieces)
    return stack((join(own, weight.scheme) for own in parts), weight.site.experts)


def join(parts: Sequence[PackedWeight], scheme: Scheme) -> PackedWeight:
    """Weights [out, in] above each other, such as gate and up; UnsupportedError where they do not go together."""
    first = parts[0]
    if len(parts) == 1:
        return first
    block = scheme.weight.block
    if block and any(part.shape[0] % block[0] for part in parts[:-1]):
        raise UnsupportedError(f"gate and up of {first.shape[0]} rows do not fill blocks of {block[0]}")
    shared = {}
    for name in ("permutation", "outer", "input_scale", "input_zero", "alpha"):
        tensors = [getattr(part, name) for part in parts]
        if any(
            (t is None) != (tensors[0] is None) or (t is not None and not torch.equal(t, tensors[0])) for t in tensors
        ):
            raise UnsupportedError(f"gate and up have different {name.replace('_', ' ')}s, but read the same input")
        shared[name] = tensors[0]
    scales = [part.scales.expand(part.shape[0], -1) if part.scheme.weight.per_tensor else part.scales for part in parts]
    return PackedWeight(
        scheme,
        (sum(part.shape[0] for part in parts), first.shape[1]),
        torch.cat([part.codes for part in parts]),
        torch.cat(scales),
        None if first.zeros is None else torch.cat([part.zeros for part in parts]),  # type: ignore[misc]
        **shared,
    )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def stack(experts: Iterable[PackedWeight], count: int) -> PackedWeight:
    """The weights of ``count`` experts as one; they are taken one by one, into memory that the first one sizes."""
    whole: dict[str, Tensor] = {}
    scheme: Scheme | None = None
    shape: tuple[int, ...] = ()
    for index, expert in enumerate(experts):
        tensors = expert.tensors()
        if "permutation" in whole and expert.permutation is None:
            tensors["permutation"] = torch.arange(expert.shape[1], dtype=torch.int32)
        elif "permutation" in tensors and "permutation" not in whole and index:
            whole["permutation"] = torch.arange(expert.shape[1], dtype=torch.int32).repeat(count, 1)
        params = expert.activation_tensors()
        if not index:
            scheme, shape = expert.scheme, (count, *expert.shape)
            whole = {name: t.new_empty((count, *t.shape)) for name, t in tensors.items()}
            whole |= {name: t.new_empty(count) for name, t in params.items()}
        for name, tensor in [*tensors.items(), *((name, tensor[0]) for name, tensor in params.items())]:
            whole[name][index] = tensor
    assert scheme is not None
    return PackedWeight(scheme, shape, **whole)


def cut(packed: PackedWeight, pieces: Pieces) -> Iterator[tuple[str, PackedWeight]]:
    """The stored Linears of a canonical weight by name; the inverse of ``read_weight``."""
    for index, own in enumerate(pieces):
        whole = packed if len(packed.shape) == 2 else packed.expert(index)
        for piece in own:
            yield piece.name, whole if piece.rows == whole.shape[0] else _row_slice(whole, piece)


def cut_bias(bias: Tensor, pieces: Pieces) -> Iterator[tuple[str, Tensor]]:
    """The biases of the stored Linears of a site by name, from its own [out] or [experts, out]."""
    for own, rows in zip(pieces, bias.detach().view(len(pieces), -1), strict=True):
        for piece in own:
            yield piece.name, rows[piece.start : piece.start + piece.rows].clone()


def _row_slice(packed: PackedWeight, piece: Piece) -> PackedWeight:
    weight = packed.scheme.weight
    height = weight.block[0] if weight.block else 1
    if piece.start % height:
        raise UnsupportedError(f"{piece.name} begins in row {piece.start}, within a block of {height} rows")
    rows = slice(piece.start, piece.start + piece.rows)
    above = slice(None) if weight.per_tensor else slice(piece.start // height, -(-rows.stop // height))
    zeros = None if packed.zeros is None else packed.zeros[above]
    return dataclasses.replace(
        packed, shape=(piece.rows, packed.shape[1]), codes=packed.codes[rows], scales=packed.scales[above], zeros=zeros
    )


def linear_shapes(pieces: Pieces, in_features: int) -> dict[str, Shape]:
    """Shape [out, in] of every stored Linear of a site."""
    return {piece.name: (piece.rows, in_features) for own in pieces for piece in own}
