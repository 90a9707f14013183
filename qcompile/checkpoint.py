"""Quantized checkpoints: saved whole or not at all, loaded site by site, inspected without reading weights."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import plugins, skeleton
from .errors import ConfigError, FormatError, UnsupportedError
from .formats import Format, StoredSite
from .kernels import Backend, choose
from .modules import QuantLinear, quantized_modules, state_of
from .planning import find_backend
from .progress import progress_bar
from .storage import CONFIG, DTYPES, PLAIN_CONFIG, Folder, ShardWriter, new_folder, shortened, write_json
from .trace import walk
from .types import PackedWeight, Plan, PlannedSite, Report, Site, SiteResult, State

_STORED = "stored"


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

    A transformers model gets config.json, generation_config.json and the tokenizer files of where it came from; any
    other module gets qcompile.json, and ``load`` needs the float module. Float parts keep their dtype.

    Tensors are written one by one. The folder appears under its name when it is complete; until then an old one stays
    as it was, whatever happens. Raises ConfigError when ``path`` exists and ``overwrite`` is not set, UnsupportedError
    when the format cannot express a weight, OSError when the disk is full.
    """
    model = getattr(model, "_orig_mod", model)
    writer_format, modules = _find_format(format), quantized_modules(model)
    for name, module in modules.items():
        if reason := writer_format.refuses(module.scheme):
            raise UnsupportedError(f"{name} ({module.scheme}) cannot be saved as {format}: {reason}")
    is_transformers = skeleton.is_transformers(model)
    if is_transformers:
        skeleton.check_names(model)
    floats = skeleton.float_tensors(model)
    if on_meta := [name for name, tensor in floats.items() if tensor.is_meta]:
        raise ConfigError(f"{shortened(on_meta)} is on the meta device: load the weights before saving")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    room = 4096 + sum(len(name) + 200 for name in floats) + 8 * sum(len(name) + 200 for name in modules)

    with new_folder(Path(path), overwrite) as folder:
        writer = ShardWriter(folder, shard_bytes, room)
        try:
            sites = _write_tensors(writer, writer_format, floats, modules, progress)
        finally:
            writer.close()
        section = writer_format.quantization_config(sites, linears) if sites else None
        if is_transformers:
            skeleton.copy_companions(model, folder)
            skeleton.write_config(model, folder, section, untied=_head_name(model) in modules)
        else:
            described = {"model": type(model).__name__, **({"quantization_config": section} if section else {})}
            write_json(folder / PLAIN_CONFIG, described)
    return Path(path)


def _write_tensors(
    writer: ShardWriter,
    format: Format,
    floats: dict[str, Tensor],
    modules: dict[str, QuantLinear],
    progress: bool | None,
) -> list[StoredSite]:
    sites = []
    with progress_bar("saving", len(floats) + len(modules), progress) as advance:
        for name, tensor in floats.items():
            writer.add(name, tensor)
            advance(name)
        for name, module in modules.items():
            packed = _to(module.packed(), "cpu")
            if reason := format.refuses(module.scheme, packed):
                raise UnsupportedError(f"{name} ({module.scheme}) cannot be saved as {format.name}: {reason}")
            tensors = format.write(name, packed)
            for stored, tensor in tensors.items():
                writer.add(stored, tensor)
            if module.bias is not None:
                writer.add(f"{name}.bias", module.bias)
            sites.append(StoredSite(name, module.scheme, packed.shape, tuple(tensors)))
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
        results = survey.load_sites(progress)
        survey.load_floats()
    model = survey.model
    model.eval().requires_grad_(False)
    report = Report(type(model).__name__, survey.plan, results, time.perf_counter() - started)
    model._qcompile = State(survey.plan, report)  # type: ignore[assignment]
    return model


def inspect(
    path: str | Path, *, device: str = "cpu", model: nn.Module | None = None, allow_download: bool = False
) -> Plan:
    """What ``load`` would do, from config and tensor headers alone; the device need not be there.

    Raises what ``load`` would raise for them.
    """
    backend = plugins.find("backends", device.partition(":")[0])
    with Folder(skeleton.resolve(path, allow_download)) as folder:
        return _Survey(folder, backend, device, model, None).plan


class _Survey:
    """A checkpoint and the model it belongs to: which tensor goes where, checked before any is read."""

    def __init__(
        self, folder: Folder, backend: Backend, device: str, model: nn.Module | None, dtype: torch.dtype | None
    ) -> None:
        self.folder, self.device, self.cast = folder, device, dtype
        self.dtype = dtype or _main_dtype(folder)
        self.format = _detect(folder)
        if model is None and folder.is_plain:
            raise ConfigError(
                f"{folder.path} holds a plain module ({folder.config.get('model')}), not a transformers model: "
                "pass the float module as model="
            )
        self.model = model if model is not None else self._build()
        if present := quantized_modules(self.model):
            raise ConfigError(f"the model to fill is quantized already ({shortened(present)}); pass the float one")
        walked = walk(self.model)
        linears = {
            name: (module.out_features, module.in_features)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        }
        stored = self.format.sites(folder.config, folder.headers, linears) if self.format else ()
        self.stored = {site.name: site for site in stored}
        self.plan = self._plan(walked, backend)
        self.floats = self._match_floats()

    def _build(self) -> nn.Module:
        """The skeleton; output embeddings that are stored quantized are their own, even under a config that ties."""
        model = skeleton.build(self.folder.path, self.dtype, untied=False)
        head = _head_name(model)
        if head and getattr(model, "all_tied_weights_keys", None) and self.format:
            own = [name for name in self.folder.headers if name.rpartition(".")[0] == head]
            if own and own != [f"{head}.weight"]:
                return skeleton.build(self.folder.path, self.dtype, untied=True)
        return model

    def _plan(self, sites: Sequence[Site], backend: Backend) -> Plan:
        planned, refusals = [], []
        for site in (dataclasses.replace(site, dtype=self.dtype) for site in sites):
            stored = self.stored.get(site.name)
            if stored is None:
                planned.append(PlannedSite(site, None, "float in the checkpoint", bytes_after=site.float_bytes))
                continue
            assert self.format is not None
            kernel, why_not = choose(backend, site, stored.scheme)
            if kernel is None:
                refusals.append(f"{site.name} ({stored.scheme}): {why_not}")
                continue
            planned.append(
                PlannedSite(
                    site,
                    stored.scheme,
                    f"stored as {self.format.name}" + (f"; {why_not}" if why_not else ""),
                    method=_STORED,
                    kernel=f"{backend.name}.{kernel.name}",
                    bytes_after=kernel.nbytes(site, stored.scheme),
                )
            )
        if refusals:
            raise UnsupportedError(
                f"{self.folder.path}: no kernel of {backend.name} can run {len(refusals)} of {len(sites)} sites: "
                + "; ".join(refusals[:5])
                + (" ..." if len(refusals) > 5 else "")
            )
        float_weights = sum(p.site.float_bytes for p in planned)
        tensors = {id(t): t for t in [*self.model.parameters(), *self.model.buffers()]}
        total = sum(t.numel() * (self.dtype if t.is_floating_point() else t.dtype).itemsize for t in tensors.values())
        return Plan(self.device, tuple(planned), total - float_weights)

    def _match_floats(self) -> dict[str, list[tuple[nn.Module, str]]]:
        """Every tensor that no site consumes, with its places; FormatError for what is left over on either side."""
        consumed = {name for site in self.stored.values() for name in site.tensors}
        quantized = {f"{name}.weight" for name in self.stored}
        places = {name: found for name, found in skeleton.slots(self.model).items() if name not in quantized}
        given = self.folder.headers.keys() - consumed
        filled = {id(places[name]) for name in given & places.keys()}
        ignored = [re_.pattern for re_ in skeleton.ignored(self.model)]
        unexpected = {n for n in given - places.keys() if not any(re_.search(n) for re_ in skeleton.ignored(self.model))}
        missing = {name for name, found in places.items() if id(found) not in filled}
        problems = []
        if missing:
            problems.append(f"missing from the files: {shortened(missing)}")
        if unexpected:
            problems.append(f"unknown to {type(self.model).__name__}: {shortened(unexpected)}")
        return {}
