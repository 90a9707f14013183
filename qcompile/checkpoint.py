"""Quantized checkpoints: saved whole or not at all, loaded site by site, inspected without reading weights."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import plugins, skeleton
from .errors import ConfigError, FormatError, UnsupportedError, shortened
from .formats import Format, StoredSite
from .kernels import Backend, choose
from .modules import QuantWeight, module_of, quantized_modules, replace_module, set_state
from .planning import find_backend
from .progress import progress_bar
from .storage import CONFIG, DTYPES, PLAIN_CONFIG, Folder, ShardWriter, new_folder, read_json, write_json
from .trace import walk
from .types import PackedWeight, Plan, PlannedSite, Report, Scheme, Site, SiteResult, State

STORED = "stored"  # the method of a site that came from a checkpoint
_FLOATS = ("BF16", "F16", "F32", "F64")


# ------------------------------------------------------------------------------------------------------------ save


def save(
    model: nn.Module,
    path: str | Path,
    *,
    overwrite: bool = False,
    format: str = "compressed-tensors",
    shard_bytes: int = 5 * 1000**3,
    progress: bool | None = None,
) -> Path:
    """Write ``model`` into the folder ``path``, readable by ``load``, and in its format by transformers and vLLM.

    format: "compressed-tensors" stores every scheme; "awq" 4-bit weights of one group size; "gptq" 2, 3, 4 and 8 bits,
    "gptq_v2" the same with any zero point. The last three store float16 scales, and refuse others that it cannot hold.

    A transformers model gets config.json, generation_config.json and the tokenizer files of where it came from; any
    other module gets qcompile.json, and ``load`` needs the float module. Float parts keep their dtype. transformers
    5.23 reads asymmetric weights of anyone's making with ``CompressedTensorsConfig(dequantize=True)`` only.

    Tensors are written one by one. The folder appears under its name when it is complete; until then an old one stays
    as it was, whatever happens. Raises ConfigError when ``path`` exists and ``overwrite`` is not set, UnsupportedError
    when the format cannot express a weight, OSError when the disk is full.
    """
    model = getattr(model, "_orig_mod", model)
    writer_format, modules = _find_format(format), quantized_modules(model)
    for name, module in modules.items():
        if reason := writer_format.refuses(module.scheme, (module.out_features, module.in_features)):
            raise UnsupportedError(f"{name} ({module.scheme}) cannot be saved as {format}: {reason}")
    is_transformers = skeleton.is_transformers(model)
    if is_transformers:
        skeleton.check_names(model)
    floats = skeleton.float_tensors(model)
    if on_meta := [name for name, tensor in floats.items() if tensor.is_meta]:
        raise ConfigError(f"{shortened(on_meta)} is on the meta device: load the weights before saving")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if modules:
        planned = [StoredSite(n, m.scheme, (m.out_features, m.in_features), ()) for n, m in modules.items()]
        writer_format.quantization_config(planned, linears)
    room = 4096 + sum(len(name) + 200 for name in floats) + 8 * sum(len(name) + 200 for name in modules)

    with new_folder(Path(path), overwrite) as folder:
        writer = ShardWriter(folder, shard_bytes, room)
        try:
            sites = _write_tensors(writer, writer_format, floats, modules, progress)
        finally:
            writer.close()
        section = writer_format.quantization_config(sites, linears) if sites else None
        for side_file in writer_format.side_files[:1] if section else ():
            write_json(folder / side_file, section)
        if is_transformers:
            skeleton.copy_companions(model, folder)
            skeleton.write_config(model, folder, section, untied=skeleton.head_name(model) in modules)
        else:
            described = {"model": type(model).__name__, **({"quantization_config": section} if section else {})}
            write_json(folder / PLAIN_CONFIG, described)
    return Path(path)


def _write_tensors(
    writer: ShardWriter,
    format: Format,
    floats: dict[str, Tensor],
    modules: dict[str, QuantWeight],
    progress: bool | None,
) -> list[StoredSite]:
    sites = []
    with progress_bar("saving", len(floats) + len(modules), progress) as advance:
        for name, tensor in floats.items():
            writer.add(name, tensor)
            advance(name)
        for name, module in modules.items():
            packed = _to(module.packed(), "cpu")
            if reason := format.refuses(module.scheme, packed.shape, packed):
                raise UnsupportedError(f"{name} ({module.scheme}) cannot be saved as {format.name}: {reason}")
            tensors = format.write(name, packed)
            for stored, tensor in tensors.items():
                writer.add(stored, tensor)
            if module.bias is not None:
                writer.add(f"{name}.bias", module.bias)
            layout = {"permuted": packed.permutation is not None}
            sites.append(StoredSite(name, module.scheme, packed.shape, tuple(tensors), layout))
            advance(name)
    writer.finish()
    return sites


def _find_format(name: str) -> Format:
    return plugins.find("formats", name.replace("-", "_"))


# ------------------------------------------------------------------------------------------------------------ load


def load(
    path: str | Path,
    *,
    device: str = "cpu",
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    allow_download: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Load a checkpoint: the model of its config, in eval mode, with QuantLinear at the names of its quantized Linears.

    path: a folder, or a hub id in the local cache. model: the float module to fill, in place; needed for what is not
    a transformers model. dtype: of the float tensors (default: as stored). Float checkpoints load as well.

    Weights are read one by one, so memory holds the quantized model and one site. Every tensor of the files must find
    its place and every place its tensor: FormatError names those that do not, and the file of any damage.
    UnsupportedError names each module whose scheme neither qcompile nor a kernel of the device can run.
    """
    started = time.perf_counter()
    with Folder(skeleton.resolve(path, allow_download)) as folder:
        survey = _Survey(folder, find_backend(device), device, model, dtype)
        survey.load_floats()  # first, since QuantLinear takes over its Linear's bias
        results = survey.load_sites(progress)
    model = survey.model.to(device)  # buffers that no file holds
    if skeleton.head_name(model) in survey.stored:
        skeleton.untie(model)
    model.eval().requires_grad_(False)
    report = Report(type(model).__name__, survey.plan, results, time.perf_counter() - started)
    set_state(model, State(survey.plan, report))
    return model


def inspect(
    path: str | Path, *, device: str = "cpu", model: nn.Module | None = None, allow_download: bool = False
) -> Plan:
    """What ``load`` would do, from config and tensor headers alone; the device need not be there.

    Raises what ``load`` would raise for them.
    """
    backend = find_backend(device, to_run=False)
    with Folder(skeleton.resolve(path, allow_download)) as folder:
        return _Survey(folder, backend, device, model, None).plan


class _Survey:
    """A checkpoint and the model it belongs to: which tensor goes where, checked before any is read."""

    def __init__(
        self, folder: Folder, backend: Backend, device: str, model: nn.Module | None, cast: torch.dtype | None
    ) -> None:
        self.folder, self.device, self.cast = folder, device, cast
        self.dtype = cast or _main_dtype(folder)
        self.config = _with_side_file(folder)
        self.format = _detect(folder, self.config)
        if model is None and folder.is_plain:
            raise ConfigError(
                f"{folder.path} holds a plain module ({folder.config.get('model')}), not a transformers model: "
                "pass the float module as model="
            )
        self.model = model if model is not None else skeleton.build(folder.path, self.dtype)
        if present := quantized_modules(self.model):
            raise ConfigError(f"the model to fill is quantized already ({shortened(present)}); pass the float one")
        walked = [dataclasses.replace(site, dtype=self.dtype) for site in walk(self.model)]
        linears = {site.name: (site.out_features, site.in_features) for site in walked}
        try:
            stored = self.format.sites(self.config, folder.headers, linears) if self.format else ()
        except (FormatError, UnsupportedError) as error:
            raise type(error)(f"{folder.path}: {error}") from None
        self.stored = {site.name: site for site in stored}
        self.empty_biases: list[str] = []
        self.slots = skeleton.slots(self.model, {self.model.get_submodule(name) for name in self.stored})
        notes = self._check_names()
        self.plan = self._plan(walked, backend, notes)

    def _check_names(self) -> tuple[str, ...]:
        """FormatError unless every stored tensor has a place of its shape, and every place a tensor."""
        headers, path = self.folder.headers, self.folder.path
        expected = {name: slot for slot in self.slots for name in slot.names}
        consumed = {name for site in self.stored.values() for name in site.tensors}
        patterns = [re.compile(pattern) for pattern in skeleton.ignored_patterns(self.model)]
        unknown = headers.keys() - consumed - expected.keys()
        self.empty_biases = [name for site in self.stored if (name := f"{site}.bias") in unknown]  # AutoGPTQ's zeros
        unknown -= set(self.empty_biases)
        ignored = {name for name in unknown if any(pattern.search(name) for pattern in patterns)}
        missing = [slot.names[0] for slot in self.slots if not headers.keys() & set(slot.names)]
        problems = [f"missing: {shortened(missing)}"] if missing else []
        if unknown := unknown - ignored:
            problems.append(f"unknown to {type(self.model).__name__} or its format: {shortened(unknown)}")
        if problems:
            raise FormatError(f"the tensors in {path} are not those of the model: {'; '.join(problems)}")
        for name in expected.keys() & headers.keys():
            header, wanted = headers[name], expected[name].tensor
            dtype = DTYPES[header.dtype]
            alike = header.dtype in _FLOATS if wanted.is_floating_point() else dtype == wanted.dtype
            if header.shape != tuple(wanted.shape) or not alike:
                kind = "float" if wanted.is_floating_point() else str(wanted.dtype)
                raise FormatError(
                    f"{path / header.file}: {name} is {header.dtype} {list(header.shape)}, but must be {kind} "
                    f"{list(wanted.shape)} in {type(self.model).__name__}"
                )
        return (f"not part of the model, as transformers has it: {shortened(ignored)}",) if ignored else ()

    def _plan(self, sites: Sequence[Site], backend: Backend, notes: tuple[str, ...]) -> Plan:
        planned, refusals, rounded = [], [], Counter[str]()
        for site in sites:
            stored = self.stored.get(site.name)
            if stored is None or self.format is None:
                planned.append(PlannedSite(site, None, "float in the checkpoint", bytes_after=site.float_bytes))
                continue
            kernel, why_not = choose(backend, site, stored.scheme)
            if kernel is None:
                refusals.append(f"{site.name} ({stored.scheme}): {why_not}")
                continue
            reason = f"stored as {self.format.name}" + (f"; {why_not}" if why_not else "")
            name, size = f"{backend.name}.{kernel.name}", kernel.nbytes(site, stored.scheme)
            if _takes_scales(name, stored.scheme):
                kinds = {self.folder.headers[tensor].dtype for tensor in stored.tensors}
                rounded.update(kind for kind in kinds.intersection(_FLOATS) if DTYPES[kind] != site.dtype)
            planned.append(PlannedSite(site, stored.scheme, reason, method=STORED, kernel=name, bytes_after=size))
        if refusals:
            raise UnsupportedError(
                f"{self.folder.path}: {backend.name} cannot run {len(refusals)} of {len(sites)} sites: "
                + "; ".join(refusals[:5])
                + (" ..." if len(refusals) > 5 else "")
            )
        notes += tuple(
            f"the {kind} scales of {count} sites are rounded to {self.dtype}, in which the model computes; load with "
            f"dtype={DTYPES[kind]} to keep them"
            for kind, count in rounded.items()
        )
        tensors = {id(t): t for t in [*self.model.parameters(), *self.model.buffers()]}
        total = sum(t.numel() * (self.dtype if t.is_floating_point() else t.dtype).itemsize for t in tensors.values())
        return Plan(self.device, tuple(planned), total - sum(site.float_bytes for site in sites), notes)

    def load_floats(self) -> None:
        """Read every tensor that belongs to no quantized site."""
        for name in self.empty_biases:
            if self.folder.read(name).any():
                file = self.folder.path / self.folder.headers[name].file
                raise FormatError(f"{file}: {name} is not zero, but that Linear of the model has no bias")
        for slot in self.slots:
            name, *copies = [name for name in slot.names if name in self.folder.headers]
            tensor = self.folder.read(name)
            for other in copies:
                if not torch.equal(tensor, self.folder.read(other)):
                    raise FormatError(
                        f"{self.folder.path}: {name} and {other} differ, but are one tensor in the model; "
                        f"if they are meant to, set tie_word_embeddings to false in {CONFIG}"
                    )
            if self.cast and tensor.is_floating_point():
                tensor = tensor.to(self.cast)
            slot.fill(tensor.to(self.device))

    def load_sites(self, progress: bool | None) -> tuple[SiteResult, ...]:
        """Read the quantized sites one by one and put a QuantLinear in the place of each Linear."""
        results = []
        with progress_bar("loading", len(self.plan.quantized), progress) as advance:
            for planned in self.plan:
                if not planned.quantized:
                    results.append(SiteResult(planned, planned.bytes_after))
                    continue
                module = self._load_site(planned)
                size = sum(t.numel() * t.element_size() for t in module.tensors())
                results.append(SiteResult(planned, size))
                advance(planned.site.name)
        return tuple(results)

    def _load_site(self, planned: PlannedSite) -> QuantWeight:
        name = planned.site.name
        stored, linear = self.stored[name], self.model.get_submodule(name)
        assert self.format is not None
        assert isinstance(linear, nn.Linear)
        try:
            packed = _fit(self.format.read(stored, self.folder.read), planned)
        except (FormatError, UnsupportedError) as error:
            file = self.folder.headers[stored.tensors[0]].file
            raise type(error)(f"{self.folder.path / file}: {error}") from None
        quantized = module_of(planned, _to(packed, self.device), linear.bias)
        replace_module(self.model, linear, quantized)
        return quantized


def _formats() -> list[Format]:
    return [plugins.find("formats", name) for name in plugins.names("formats")]


def _with_side_file(folder: Folder) -> dict[str, Any]:
    """The config of a checkpoint, with the quantization section of a side file where it has none of its own."""
    config = folder.config
    text = config.get("text_config")
    if "quantization_config" in config or (isinstance(text, Mapping) and "quantization_config" in text):
        return config
    for format in _formats():
        for file in format.side_files:
            if (folder.path / file).is_file():
                return {**config, "quantization_config": {"quant_method": format.name, **read_json(folder.path / file)}}
    return config


def _detect(folder: Folder, config: Mapping[str, Any]) -> Format | None:
    """The format of a checkpoint, None for a float one."""
    formats = _formats()
    found = [format for format in formats if format.detect(config, folder.headers)]
    if len(found) > 1:
        raise FormatError(f"{folder.path} looks like {' and '.join(f.name for f in found)}; it can only be one")
    section = config.get("quantization_config")
    if not found and section:
        method = section.get("quant_method") if isinstance(section, dict) else None
        raise UnsupportedError(
            f"{folder.path}: quantization method {method!r} is not read; known formats: "
            + ", ".join(format.name for format in formats)
        )
    return found[0] if found else None


def _main_dtype(folder: Folder) -> torch.dtype:
    """The float dtype that most numbers of a checkpoint have."""
    count: Counter[str] = Counter()
    for header in folder.headers.values():
        if header.dtype in _FLOATS:
            count[header.dtype] += math.prod(header.shape)
    return DTYPES[count.most_common(1)[0][0]] if count else torch.get_default_dtype()


def _fit(packed: PackedWeight, planned: PlannedSite) -> PackedWeight:
    """Scales in the dtype of the activations, which fused weight-only kernels want.

    The reference kernel multiplies in the scales' own dtype, as the checkpoint's author did; so it keeps them.
    """
    dtype = planned.site.dtype
    if packed.scales.dtype == dtype or not _takes_scales(planned.kernel, packed.scheme):
        return packed
    scales = packed.scales.to(dtype)
    if not torch.isfinite(scales).all():
        raise FormatError(f"scales of {planned.site.name} are too large for {dtype}; load with another dtype=")
    return dataclasses.replace(packed, scales=scales)


def _takes_scales(kernel: str, scheme: Scheme) -> bool:
    """Whether a kernel wants its scales in the dtype of the activations."""
    return not scheme.activation and not kernel.endswith(".reference")


def _to(packed: PackedWeight, device: str) -> PackedWeight:
    stored = packed.tensors() | packed.activation_tensors()
    moved = {name: tensor.to(device) for name, tensor in stored.items()}
    return PackedWeight(packed.scheme, packed.shape, **moved)
