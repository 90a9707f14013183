"""Quantized checkpoints: saved whole or not at all, loaded site by site, inspected without reading weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import parts, plugins, skeleton
from .calibrate import refuse_without_data
from .config import QuantConfig, as_config
from .errors import ConfigError, UnsupportedError, shortened
from .float_experts import held_tensors
from .formats import Format, StoredSite
from .memory import collection_paused
from .modules import FloatWeight, QuantExperts, QuantWeight, quantized_modules, set_state, state_of
from .planning import find_backend
from .progress import progress_bar
from .storage import Folder, ShardWriter, new_folder
from .survey import Survey, moved
from .types import Plan, Report, State

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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

    format: "compressed-tensors" stores every scheme; "modelslim" integers of 4 and 8 bits as Ascend's tools do;
    "cann-recipes" w8a8 Linears and w4a8 experts, clipped or not, as the CANN recipes do; "awq" 4-bit weights of one
    group size; "gptq" 2, 3, 4 and 8 bits, "gptq_v2" the same with any zero point. The last three store float16 scales,
    and refuse others that it cannot hold. Experts are stored one by one.

    A transformers model gets config.json, generation_config.json and the tokenizer files of where it came from; any
    other module gets qcompile.json, and ``load`` needs the float module. Float parts keep their dtype. transformers
    5.23 reads packed asymmetric weights only where config.json says ``dequantize``, as it does here, and of experts
    those of symmetric weights in compressed-tensors.

    Tensors are written one by one. The folder appears under its name when it is complete; until then an old one stays
    as it was, whatever happens. Raises ConfigError when ``path`` exists and ``overwrite`` is not set, UnsupportedError
    when the format cannot express a weight, OSError when the disk is full.
    """
    model = getattr(model, "_orig_mod", model)
    state = state_of(model)
    if state is not None and state.ranks > 1:
        raise ConfigError(
            f"this {type(model).__name__} holds the part of one of {state.ranks} ranks, which is no checkpoint: save "
            "it before it is divided, or load it without mesh="
        )
    writer_format = _find_format(format)
    contents = _Contents(model)
    contents.check(writer_format)
    room = 4096 + sum(len(name) + 200 for name in contents.float_names)
    room += 8 * sum(len(piece.name) + 200 for pieces in contents.pieces.values() for own in pieces for piece in own)

    with new_folder(Path(path), overwrite) as folder:
        writer = ShardWriter(folder, shard_bytes, room, writer_format.stem)
        try:
            sites = _write_tensors(writer, writer_format, contents, progress)
        finally:
            writer.close()
        section = None
        if sites:
            section = writer_format.quantization_config(sites, contents.float_modules, contents.float_names)
        skeleton.describe(model, folder, writer_format, section, untied=skeleton.head_name(model) in contents.modules)
    return Path(path)


class _Contents:
    """What of a model goes into a checkpoint: its quantized weights in stored pieces, and its float tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.modules = model, quantized_modules(model)
        self.floats = skeleton.float_tensors(model)
        experts = {n: m for n, m in model.named_modules() if isinstance(m, QuantExperts)}
        origins = {name: vars(module)["origin"][0] for name, module in experts.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.floats.items()}
        for name, layout in origins.items():
            for i, projection in enumerate(layout.projections):
                module = experts[name].get_submodule(projection)
                if isinstance(module, FloatWeight):
                    self.floats |= {f"{name}.{own}": t for own, t in held_tensors(layout, i, module)}
                elif isinstance(module, QuantWeight) and not layout.listed:
                    shapes[f"{name}.{layout.arithmetic.weights[i]}"] = module.shape
        shapes |= {name: tuple(tensor.shape) for name, tensor in self.floats.items()}
        shapes |= {f"{name}.weight": module.shape for name, module in self.modules.items() if len(module.shape) == 2}
        self.parts = parts.stored_parts(model, shapes)
        self.pieces: dict[str, parts.Pieces] = {}
        for name, module in self.modules.items():
            owner, _, projection = name.rpartition(".")
            if owner in origins:
                layout = origins[owner]
                self.pieces[name] = parts.expert_pieces(layout, layout.projections.index(projection), self.parts)
            else:
                self.pieces[name] = parts.linear_pieces(name, module.out_features, self.parts)
        self.float_names = [stored for name in self.floats for stored in self._stored_names(name)]
        experts_apart = [name for name in self.floats if len(shapes[name]) == 3 and name in self.parts]
        matrices = [*skeleton.matrices(model), *experts_apart]
        self.float_modules = [
            stored.removesuffix(".weight") for name in matrices for stored in self._stored_names(name)
        ]

    def _stored_names(self, name: str) -> list[str]:
        return [part.name for part in self.parts[name]] if name in self.parts else [name]

    def float_tensors(self) -> Iterator[tuple[str, list[tuple[str, Tensor]]]]:
        """Each float tensor, with the stored tensors that it becomes."""
        for name, tensor in self.floats.items():
            own = self.parts.get(name)
            yield name, list(parts.take_apart(tensor, own)) if own else [(name, tensor)]

    def check(self, format: Format) -> None:
        """UnsupportedError for what the format cannot express, before anything is written."""
        for name, module in self.modules.items():
            for piece in {piece.rows: piece for own in self.pieces[name] for piece in own}.values():
                if reason := format.refuses(module.scheme, (piece.rows, module.in_features)):
                    raise UnsupportedError(f"{piece.name} ({module.scheme}) cannot be saved as {format.name}: {reason}")
        if on_meta := [name for name, tensor in self.floats.items() if tensor.is_meta]:
            raise ConfigError(f"{shortened(on_meta)} is on the meta device: load the weights before saving")
        shifted = skeleton.shifted_norms(self.model)
        if shifted and not format.stores_norm_biases:
            raise UnsupportedError(
                f"{shortened(shifted)} adds a bias that its class does not have; only format='modelslim' stores that"
            )
        planned = [
            StoredSite(piece.name, module.scheme, (piece.rows, module.in_features), ())
            for name, module in self.modules.items()
            for own in self.pieces[name]
            for piece in own
        ]
        try:
            if planned:
                format.quantization_config(planned, self.float_modules, self.float_names)
        except UnsupportedError as error:
            raise UnsupportedError(f"{type(self.model).__name__} cannot be saved as {format.name}: {error}") from None


def _write_tensors(writer: ShardWriter, format: Format, contents: _Contents, progress: bool | None) -> list[StoredSite]:
    sites: list[StoredSite] = []
    with progress_bar("saving", len(contents.floats) + len(contents.modules), progress) as advance:
        for name, stored in contents.float_tensors():
            for own, tensor in stored:
                writer.add(own, tensor)
            advance(name)
        for name, module in contents.modules.items():
            sites += _write_site(writer, format, module, contents.pieces[name])
            advance(name)
    writer.finish()
    return sites


def _write_site(writer: ShardWriter, format: Format, module: QuantWeight, pieces: parts.Pieces) -> Iterator[StoredSite]:
    """Write the stored Linears of one quantized weight."""
    biases = dict(parts.cut_bias(module.bias, pieces)) if module.bias is not None else {}
    for name, packed in parts.cut(moved(module.packed(), "cpu"), pieces):
        if reason := format.refuses(module.scheme, packed.shape, packed):
            raise UnsupportedError(f"{name} ({module.scheme}) cannot be saved as {format.name}: {reason}")
        tensors = format.write(name, packed, module.dtype) | format.write_bias(name, packed, biases.get(name))
        for stored, tensor in tensors.items():
            writer.add(stored, tensor)
        layout = {"permuted": packed.permutation is not None}
        yield StoredSite(name, module.scheme, packed.shape, tuple(tensors), layout)


def _find_format(name: str) -> Format:
    return plugins.find("formats", name.replace("-", "_"))


# ------------------------------------------------------------------------------------------------------------ load


def load(
    path: str | Path,
    *,
    device: str = "cpu",
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    config: QuantConfig | Mapping[str, Any] | str | Path | None = None,
    mesh: DeviceMesh | None = None,
    ep: int | None = None,
    allow_download: bool = False,
    allow_pickle: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Load a checkpoint: the model of its config, in eval mode, with QuantLinear at the names of its quantized Linears.

    path: a folder, or a hub id in the local cache. model: the float module to fill, in place; needed for what is not
    a transformers model. dtype: of the float tensors (default: as stored). Float checkpoints load as well. config: what
    to quantize of one while it is loaded, as for ``quantize``, by methods that need no data; the float weights are
    never all in memory. allow_pickle: read weights that are pickles, by torch's loader that runs no code.

    mesh: ranks that divide the model, a device mesh of one dimension; each reads its own part of every weight, and all
    must call this. Of a mesh ("copies", "tp"), copies of the model divide its experts among all ranks, and each has
    other tokens. ep: into how many parts experts are dealt (default: to every rank its own, where they can be).

    Weights are read one by one, experts too, so memory holds the quantized model and one site. Every tensor of the
    files must find its place and every place its tensor: FormatError names those that do not, and the file of any
    damage. UnsupportedError names each module whose scheme neither qcompile nor a kernel of the device can run.
    """
    started = time.perf_counter()
    with Folder(skeleton.resolve(path, allow_download), allow_pickle) as folder:
        backend = find_backend(device)
        survey = _survey(mesh, ep, folder, backend, device, model, dtype, _settings(config))
        if config is not None:
            refuse_without_data(survey.plan, "Load the float model, then call quantize with data=.")
        results = survey.load(progress)
    model = survey.model.to(device)  # buffers that no file holds
    if (head := skeleton.head_name(model)) and any(p.site.name == head for p in survey.plan.quantized):
        skeleton.untie(model)
    model.eval().requires_grad_(False)
    report = Report(type(model).__name__, survey.plan, results, time.perf_counter() - started)
    set_state(model, State(survey.plan, report, ranks=mesh.size() if mesh is not None else 1))
    return model


def inspect(
    path: str | Path,
    *,
    device: str = "cpu",
    model: nn.Module | None = None,
    config: QuantConfig | Mapping[str, Any] | str | Path | None = None,
    tp: int = 1,
    ep: int | None = None,
    allow_download: bool = False,
    allow_pickle: bool = False,
) -> Plan:
    """What ``load`` would do, from config and tensor headers alone; the device need not be there.

    config: of a float checkpoint, what ``quantize`` with it would do, also by methods that need data. tp, ep: what one
    of so many ranks would hold; the notes tell the bytes of each rank, what the ranks tell each other for a token, and
    what stays whole and why. Raises what ``load`` would raise for config and headers.
    """
    backend = find_backend(device, to_run=False)
    with collection_paused(), Folder(skeleton.resolve(path, allow_download), allow_pickle) as folder:
        checkpoint = (folder, backend, device, model, None, _settings(config))
        if tp == 1 and ep in (None, 1):
            return Survey(*checkpoint).plan
        from .parallel.dry_run import plan_of_a_rank

        return plan_of_a_rank(*checkpoint, tp=tp, ep=ep)


def _survey(mesh: DeviceMesh | None, ep: int | None, *checkpoint: Any) -> Survey:
    """The survey of a checkpoint, for one rank of a mesh where there is one."""
    if mesh is None:
        if ep is not None:
            raise ConfigError(f"ep={ep} deals experts to the ranks of a mesh: pass mesh= as well")
        return Survey(*checkpoint)
    from .parallel.loading import DividedSurvey
    from .parallel.ranks import agree, ranks_of, sizes_of

    tp, ep = sizes_of(mesh, ep)
    agree(mesh, checkpoint[0])
    survey = DividedSurvey(*checkpoint, tp=tp, ep=ep)
    survey.hold(ranks_of(mesh, tp, survey.sharding.ep))
    return survey


def _settings(config: QuantConfig | Mapping[str, Any] | str | Path | None) -> QuantConfig | None:
    return None if config is None else as_config(dict(config) if isinstance(config, Mapping) else config)
