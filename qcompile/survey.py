"""A checkpoint and the model it belongs to: which tensor goes where, checked before any is read, then read."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import parts, skeleton
from .config import QuantConfig
from .detection import detect_format, with_side_file
from .errors import ConfigError, FormatError, UnsupportedError, shortened
from .experts import find_experts
from .float_experts import fuse, projections, slots
from .formats import Shape, StoredSite, TensorHeader
from .kernels import Backend, choose
from .memory import return_memory
from .modules import FloatWeight, holders, module_of, quantized_modules
from .ops import find_kernel
from .progress import progress_bar
from .sites import walk_sites
from .skeleton import Slot
from .storage import CONFIG, DTYPES, Folder
from .streaming import plan_stream, quantize_stored
from .types import PackedWeight, Plan, PlannedSite, Scheme, Site, SiteResult

_PILE = 2**24  # bytes that are read before what was freed meanwhile goes back to the system
STORED = "stored"  # the method of a site that came from a checkpoint
_FLOATS = ("BF16", "F16", "F32", "F64")
# What a reader may stumble over in a section that holds other kinds of values than it ever should.
_STUMBLES = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Survey:
    """What a checkpoint holds for a model. Making one reads no weights; ``load`` does.

    settings: how to quantize a float checkpoint while it is read.
    """

    def __init__(
        self,
        folder: Folder,
        backend: Backend,
        device: str,
        model: nn.Module | None,
        cast: torch.dtype | None,
        settings: QuantConfig | None = None,
    ) -> None:
        self.folder, self.backend, self.device, self.cast = folder, backend, device, cast
        self.dtype = cast or _main_dtype(folder)
        config = with_side_file(folder)
        self.format = detect_format(folder, config)
        if model is None and folder.is_plain:
            raise ConfigError(
                f"{folder.path} holds a plain module ({folder.config.get('model')}), not a transformers model: "
                "pass the float module as model="
            )
        self.model = model if model is not None else skeleton.build(folder.path, self.dtype, *folder.size)
        if present := quantized_modules(self.model):
            raise ConfigError(f"the model to fill is quantized already ({shortened(present)}); pass the float one")
        self.layouts = find_experts(self.model)
        self.of_experts = projections(self.layouts)
        self.sites = [dataclasses.replace(site, dtype=self.dtype) for site in walk_sites(self.model, self.layouts)]
        self.renamed = self._add_biases(config)
        shapes = {name: tuple(slot.tensor.shape) for slot in skeleton.slots(self.model) for name in slot.names}
        self.parts = parts.stored_parts(self.model, shapes)
        self.pieces = {site.name: self._pieces_of(site) for site in self.sites}
        self._ignored = [re.compile(pattern) for pattern in skeleton.ignored_patterns(self.model)]
        self.weights = self._find_weights(config)
        self.slots = self._slots_without(self.weights)
        self.extra_biases: set[str] = set()
        self.ignored: set[str] = set()  # stored tensors that transformers leaves out of the model
        notes = self._check_names()
        if settings is None:
            self.plan = self._plan(backend, notes)
        else:
            self._by_name = {name: slot for slot in self.slots for name in slot.names}
            self.plan = plan_stream(self, settings)
            self.slots = self._slots_without(p.site.name for p in self.plan.quantized)

    # ---------------------------------------------------------------------------------------------------- what is there

    def _add_biases(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Give modules the biases that are stored for them; stored names of what they have, by names in the model."""
        if self.format is None:
            return {}
        renamed = dict(self.format.added_tensors(config, self.folder.headers))
        held = {name for slot in skeleton.slots(self.model) for name in slot.names}
        for name in renamed.keys() - held:
            module, _, leaf = name.rpartition(".")
            if leaf == "bias":
                skeleton.add_bias(self.model, module)
        return renamed

    def _pieces_of(self, site: Site) -> parts.Pieces:
        if site.kind == "linear":
            return parts.linear_pieces(site.name, site.out_features, self.parts)
        layout, projection = self.of_experts[site.name]
        return parts.expert_pieces(layout, projection, self.parts)

    def _find_weights(self, config: Mapping[str, Any]) -> dict[str, parts.StoredWeight]:
        """The quantized weights of the checkpoint, by site."""
        if self.format is None:
            return {}
        linears: dict[str, Shape] = {}
        experts: set[str] = set()
        for site in self.sites:
            shapes = parts.linear_shapes(self.pieces[site.name], site.in_features)
            linears |= shapes
            experts |= shapes.keys() if site.kind == "experts" else set()
        headers = {  # without those of layers that transformers leaves out, such as ones that predict further tokens
            name: header
            for name, header in self.folder.headers.items()
            if name.rpartition(".")[0] in linears or not self._is_ignored(name)
        }
        try:
            found = {stored.name: stored for stored in self.format.sites(config, headers, linears, experts)}
            weights = [parts.gather(site, self.pieces[site.name], found) for site in self.sites]
        except (FormatError, UnsupportedError) as error:
            raise type(error)(f"{self.folder.path}: {error}") from None
        except _STUMBLES as error:
            raise FormatError(
                f"{self.folder.path}: its quantization section cannot be understood as {self.format.name} "
                f"({type(error).__name__}: {error})"
            ) from error
        return {weight.site.name: weight for weight in weights if weight is not None}

    def _slots_without(self, names: Iterable[str]) -> list[Slot]:
        """The float tensors but for the weights of these sites, and for biases that are stored with these."""
        without: set[tuple[int, str]] = set()
        for name in names:
            weight = self.weights.get(name)
            owns_bias = weight is not None and any(stored.owns_bias for stored in weight.stored.values())
            if name not in self.of_experts:
                keys = ("weight", "bias") if owns_bias else ("weight",)
                without |= {(id(self.model.get_submodule(name)), key) for key in keys}
                continue
            layout, projection = self.of_experts[name]
            module = self.model.get_submodule(layout.name)
            without |= {(id(owner), key) for owner, key in slots(module, layout, projection, "weight")}
            if weight is not None and not self._has_fused_bias(weight):
                without |= {(id(owner), key) for owner, key in slots(module, layout, projection, "bias")}
        return skeleton.slots(self.model, without)

    def _has_fused_bias(self, weight: parts.StoredWeight) -> bool:
        """Whether the biases of all experts are stored in one tensor, as the model holds them."""
        layout, projection = self.of_experts[weight.site.name]
        own = () if layout.listed else layout.arithmetic.biases
        return any(f"{layout.name}.{bias}" in self.folder.headers for bias in (own[-1:] if projection else own[:-1]))

    # ------------------------------------------------------------------------------------------------------------ names

    def places(self, slot: Slot) -> tuple[list[str], Sequence[parts.Part]]:
        """Stored names of a whole tensor, those that are there; or, if none is, the parts that it is stored in."""
        names = [self.renamed.get(name, name) for name in slot.names]
        present = [name for name in names if name in self.folder.headers]
        stored = next((self.parts[name] for name in slot.names if name in self.parts), ())
        if not present and stored and (len(stored) > 1 or stored[0].name in self.folder.headers):
            return names, stored
        return present or names, ()

    def stored_name(self, name: str) -> str:
        """Where a whole tensor of the model is stored; "" where it is stored in several parts."""
        names, stored = self.places(self._by_name[name])
        return names[0] if not stored else stored[0].name if len(stored) == 1 else ""

    def _check_names(self) -> tuple[str, ...]:
        """FormatError unless every stored tensor has a place of its shape, and every place a tensor."""
        headers, path = self.folder.headers, self.folder.path
        wanted: dict[str, tuple[Slot, tuple[int, ...]]] = {}
        missing = []
        for slot in self.slots:
            names, stored = self.places(slot)
            places = {part.name: part.shape for part in stored} or dict.fromkeys(names, tuple(slot.tensor.shape))
            lacking = [name for name in places if name not in headers]
            if stored or len(lacking) == len(places):
                missing += lacking if stored else lacking[:1]
            wanted |= {name: (slot, shape) for name, shape in places.items()}
        consumed = {name for weight in self.weights.values() for name in weight.tensors}
        unknown = headers.keys() - consumed - wanted.keys()
        stored_linears = [name for weight in self.weights.values() for name in weight.stored]
        self.extra_biases = {name for linear in stored_linears if (name := f"{linear}.bias") in unknown}
        for weight in self.weights.values():
            if weight.site.kind == "experts" and weight.site.has_bias and not self._has_fused_bias(weight):
                names = [f"{name}.bias" for name, stored in weight.stored.items() if not stored.owns_bias]
                missing += [name for name in names if name not in self.extra_biases]
        unknown -= self.extra_biases
        self.ignored = ignored = {name for name in unknown if self._is_ignored(name)}
        problems = [f"missing: {shortened(missing)}"] if missing else []
        if unknown := unknown - ignored:
            problems.append(f"unknown to {type(self.model).__name__} or its format: {shortened(unknown)}")
        if problems:
            raise FormatError(f"the tensors in {path} are not those of the model: {'; '.join(problems)}")
        for name in wanted.keys() & headers.keys():
            self._check_header(headers[name], *wanted[name])
        notes = [f"not part of the model, as transformers has it: {shortened(ignored)}"] if ignored else []
        said: dict[str, list[str]] = {}
        for stored_site in (stored for weight in self.weights.values() for stored in weight.stored.values()):
            if stored_site.note:
                said.setdefault(stored_site.note, []).append(stored_site.name)
        return (*notes, *(f"{shortened(names)}: {note}" for note, names in said.items()))

    def _is_ignored(self, name: str) -> bool:
        return any(pattern.search(name) for pattern in self._ignored)

    def _check_header(self, header: TensorHeader, slot: Slot, shape: tuple[int, ...]) -> None:
        is_float = slot.tensor.is_floating_point()
        alike = header.dtype in _FLOATS if is_float else DTYPES[header.dtype] == slot.tensor.dtype
        if header.shape != shape or not alike:
            raise FormatError(
                f"{self.folder.path / header.file}: {header.name} is {header.dtype} {list(header.shape)}, but must be "
                f"{'float' if is_float else slot.tensor.dtype} {list(shape)} in {type(self.model).__name__}"
            )

    # ------------------------------------------------------------------------------------------------------------- plan

    def _plan(self, backend: Backend, notes: tuple[str, ...]) -> Plan:
        planned, refusals, rounded = [], [], Counter[str]()
        for site in self.sites:
            weight = self.weights.get(site.name)
            if weight is None or self.format is None:
                planned.append(PlannedSite(site, None, "float in the checkpoint", bytes_after=site.float_bytes))
                continue
            kernel, why_not = choose(backend, site, weight.scheme)
            if kernel is None:
                refusals.append(f"{site.name} ({weight.scheme}): {why_not}")
                continue
            reason = f"stored as {self.format.name}" + (f"; {why_not}" if why_not else "")
            name, size = f"{backend.name}.{kernel.name}", kernel.nbytes(site, weight.scheme)
            if kernel.scales_like_input and not weight.scheme.activation:
                kinds = {self.folder.headers[tensor].dtype for tensor in weight.tensors}
                rounded.update(kind for kind in kinds.intersection(_FLOATS) if DTYPES[kind] != site.dtype)
            planned.append(PlannedSite(site, weight.scheme, reason, method=STORED, kernel=name, bytes_after=size))
        if refusals:
            raise UnsupportedError(
                f"{self.folder.path}: {backend.name} cannot run {len(refusals)} of {len(self.sites)} sites: "
                + "; ".join(refusals[:5])
                + (" ..." if len(refusals) > 5 else "")
            )
        notes += tuple(
            f"the {kind} scales of {count} sites are rounded to {self.dtype}, in which the model computes; load with "
            f"dtype={DTYPES[kind]} to keep them"
            for kind, count in rounded.items()
        )
        return Plan(self.device, tuple(planned), self.other_bytes(), notes)

    def other_bytes(self) -> int:
        """Bytes of the parameters and buffers that belong to no site."""
        tensors = {id(t): t for t in [*self.model.parameters(), *self.model.buffers()]}
        total = sum(t.numel() * (self.dtype if t.is_floating_point() else t.dtype).itemsize for t in tensors.values())
        return total - sum(site.float_bytes for site in self.sites)

    def float_names(self) -> Iterator[str]:
        """Every stored tensor that belongs to no quantized site; the name in the model where only that differs."""
        renamed = {stored: name for name, stored in self.renamed.items()}
        for slot in self.slots:
            names, stored = self.places(slot)
            present = [part.name for part in stored] or names[:1]
            yield from (renamed.get(name, name) for name in present)

    # ---------------------------------------------------------------------------------------------------------- reading

    def load(self, progress: bool | None) -> tuple[SiteResult, ...]:
        """Fill the model; what became of each site."""
        with progress_bar("loading", self.folder.size[1], progress, in_bytes=True) as advance:
            self._load_floats(advance)  # first, since QuantLinear takes over its Linear's bias
            return self._load_sites(advance)

    def _load_floats(self, advance: Callable[..., None]) -> None:
        """Read every tensor that belongs to no quantized site, and make room for quantized experts."""
        for slot in self.slots:
            slot.fill(self._cast(self.read_slot(slot)).to(self.device))
            advance(slot.names[0], self.folder.bytes_read)
        quantized = {planned.site.name for planned in self.plan.quantized}
        fuse(self.model, [e for e in self.layouts if any(f"{e.name}.{p}" in quantized for p in e.projections)])

    def read_slot(self, slot: Slot) -> Tensor:
        """The float tensor of a slot."""
        names, stored = self.places(slot)
        if stored:
            return parts.assemble(tuple(slot.tensor.shape), stored, self.folder.read)
        return self._read_whole(names)

    def _read_whole(self, names: Sequence[str]) -> Tensor:
        """The tensor that is stored under these names; FormatError where they differ."""
        name, *copies = names
        tensor = self.folder.read(name)
        for other in copies:
            if not torch.equal(tensor, self.folder.read(other)):
                raise FormatError(
                    f"{self.folder.path}: {name} and {other} differ, but are one tensor in the model; "
                    f"if they are meant to, set tie_word_embeddings to false in {CONFIG}"
                )
        return tensor

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.cast) if self.cast and tensor.is_floating_point() else tensor

    def _load_sites(self, advance: Callable[..., None]) -> tuple[SiteResult, ...]:
        """Read the quantized sites one by one and put a quantized module in the place of each."""
        results, returned = [], self.folder.bytes_read
        self._holders = holders(self.model)  # found once, for thousands of sites
        for planned in self.plan:
            if not planned.quantized:
                results.append(SiteResult(planned, planned.bytes_after))
                continue
            results.append(self._load_site(planned))
            advance(planned.site.name, self.folder.bytes_read)
            if self.folder.bytes_read - returned > _PILE:
                returned = self.folder.bytes_read
                return_memory()
        self.plan = dataclasses.replace(self.plan, sites=tuple(result.planned for result in results))
        return tuple(results)

    def _load_site(self, planned: PlannedSite) -> SiteResult:
        module = self.model.get_submodule(planned.site.name)
        assert isinstance(module, nn.Linear | FloatWeight)
        weight, sqnr = self.weights.get(planned.site.name), None
        bias: Tensor | None = module.bias
        try:
            if weight is None:
                packed, sqnr = self.quantize_site(planned)
            else:
                packed = self.read_site(weight)
                if packed.scheme != planned.scheme:
                    planned = self._planned_again(planned, packed.scheme)
                packed = _fit(packed, planned)
                bias = self.read_bias(weight, module.bias)
        except (FormatError, UnsupportedError) as error:
            is_named = str(error).startswith(str(self.folder.path))
            file = f"/{self.folder.headers[next(weight.tensors)].file}" if weight else ""
            raise type(error)(str(error) if is_named else f"{self.folder.path}{file}: {error}") from None
        quantized = module_of(planned, moved(packed, self.device), bias)
        for parent, key in self._holders[id(module)]:
            setattr(parent, key, quantized)
        return SiteResult(planned, sum(t.numel() * t.element_size() for t in quantized.buffers()), sqnr)

    def quantize_site(self, planned: PlannedSite) -> tuple[PackedWeight, float]:
        """The packed weight of a site whose float weight is stored, and its signal-to-noise ratio in dB."""
        return quantize_stored(self, planned)

    def read_site(self, weight: parts.StoredWeight) -> PackedWeight:
        """The canonical weight of a site that is stored quantized."""
        return parts.read_weight(weight, self.read_stored)

    def _planned_again(self, planned: PlannedSite, scheme: Scheme) -> PlannedSite:
        """The plan for a weight of which only the tensors, not config and headers, show how small its groups are."""
        kernel, why_not = choose(self.backend, planned.site, scheme)
        if kernel is None:
            raise UnsupportedError(f"{planned.site.name} ({scheme}, for g_idx has uneven groups): {why_not}")
        reason = f"{planned.reason}; its g_idx has uneven groups, which {scheme} expresses"
        name, size = f"{self.backend.name}.{kernel.name}", kernel.nbytes(planned.site, scheme)
        return dataclasses.replace(planned, scheme=scheme, reason=reason, kernel=name, bytes_after=size)

    def read_stored(self, stored: StoredSite) -> PackedWeight:
        """The canonical weight of one stored Linear; errors name its file."""
        assert self.format is not None
        try:
            return self.format.read(stored, self.folder.read)
        except (FormatError, UnsupportedError) as error:
            file = self.folder.path / self.folder.headers[stored.tensors[0]].file
            raise type(error)(f"{file}: {error}") from None

    def read_bias(self, weight: parts.StoredWeight, loaded: Tensor | None) -> Tensor | None:
        """The bias of a quantized site: stored with its Linears, or else the one of the model that has been loaded.

        AutoGPTQ writes zeros for Linears without a bias; those are left out.
        """
        if not any(stored.owns_bias or f"{name}.bias" in self.extra_biases for name, stored in weight.stored.items()):
            return loaded
        rows = [[self.stored_bias(weight.stored[piece.name]) for piece in own] for own in weight.pieces]
        if all(bias is None or not bias.any() for own in rows for bias in own) and not weight.site.has_bias:
            return None
        zeros = torch.zeros(weight.site.out_features // len(rows[0]), dtype=self.dtype)
        joined = torch.stack([torch.cat([zeros if bias is None else bias for bias in own]) for own in rows])
        bias = joined if weight.site.kind == "experts" else joined[0]
        return bias.to(self.dtype).to(self.device)

    def stored_bias(self, stored: StoredSite) -> Tensor | None:
        assert self.format is not None
        if stored.owns_bias:
            return self.format.read_bias(stored, self.folder.read)
        name = f"{stored.name}.bias"
        return self.folder.read(name) if name in self.extra_biases else None


def _main_dtype(folder: Folder) -> torch.dtype:
    """The float dtype that most numbers of a checkpoint have."""
    count: Counter[str] = Counter()
    for header in folder.headers.values():
        if header.dtype in _FLOATS:
            count[header.dtype] += math.prod(header.shape)
    return DTYPES[count.most_common(1)[0][0]] if count else torch.get_default_dtype()


def _fit(packed: PackedWeight, planned: PlannedSite) -> PackedWeight:
    """Scales in the dtype of the activations, for kernels that have them so; others keep those of the checkpoint."""
    dtype = planned.site.dtype
    takes_any = packed.scheme.activation or not find_kernel(planned.kernel).scales_like_input
    if takes_any or packed.scales.dtype == dtype:
        return packed
    scales = packed.scales.to(dtype)
    if not torch.isfinite(scales).all():
        raise FormatError(f"scales of {planned.site.name} are too large for {dtype}; load with another dtype=")
    return dataclasses.replace(packed, scales=scales)


def moved(packed: PackedWeight, device: str) -> PackedWeight:
    """A weight on another device."""
    stored = packed.tensors() | packed.activation_tensors()
    return PackedWeight(packed.scheme, packed.shape, **{name: tensor.to(device) for name, tensor in stored.items()})
