"""From one checkpoint format to another, stored Linear by stored Linear: no kernel, no model, no rounding between."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from . import plugins, skeleton
from .errors import ConfigError, UnsupportedError, shortened
from .formats import Format, StoredSite
from .planning import find_backend
from .progress import progress_bar
from .storage import Folder, ShardWriter, new_folder
from .survey import Survey


def convert(
    path: str | Path,
    out: str | Path,
    *,
    format: str,
    model: nn.Module | None = None,
    overwrite: bool = False,
    shard_bytes: int = 5 * 1000**3,
    allow_download: bool = False,
    allow_pickle: bool = False,
    progress: bool | None = None,
) -> Path:
    """Write the quantized checkpoint ``path`` as another ``format`` into the folder ``out``; returns ``out``.

    format: as for ``save``. Codes, scales and zero points stay what they are: UnsupportedError names the first weight
    that the format cannot hold, and why, and nothing is written. A warning names tensors that transformers leaves out
    of the model, and that are left out here. One stored Linear is in memory at a time. model: the
    float module, for what is not a transformers model. Other arguments are those of ``load`` and ``save``.
    """
    target: Format = plugins.find("formats", format.replace("-", "_"))
    out = Path(out)
    with Folder(skeleton.resolve(path, allow_download), allow_pickle) as folder:
        survey = Survey(folder, find_backend("cpu"), "cpu", model, None)
        if survey.format is None:
            raise ConfigError(f"{folder.path} is a float checkpoint: quantize it, then save it in the format wanted")
        source = _Source(survey, target)
        source.check()
        if survey.ignored:
            names = shortened(survey.ignored)
            warnings.warn(f"left out, for they are no part of the model: {names}", stacklevel=2)
        room = 4096 + sum(len(name) + 200 for name in folder.headers) * 8
        with new_folder(out, overwrite) as unfinished:
            writer = ShardWriter(unfinished, shard_bytes, room, target.stem)
            try:
                sites = list(source.write(writer, progress))
                writer.finish()
            finally:
                writer.close()
            section = target.quantization_config(sites, source.float_modules, source.floats)
            head = skeleton.head_name(survey.model)
            skeleton.describe(survey.model, unfinished, target, section, untied=bool(head) and head in survey.weights)
    return out


class _Source:
    """What is read of a checkpoint, under the names that it gets in the other one."""

    def __init__(self, survey: Survey, target: Format) -> None:
        self.survey, self.target = survey, target
        self.stored = {name: own for weight in survey.weights.values() for name, own in weight.stored.items()}
        plain = {name: f"{name}.bias" for name, own in self.stored.items() if not own.owns_bias}
        self._biases = {name: bias for name, bias in plain.items() if bias in survey.folder.headers}
        self.floats = [name for name in survey.float_names() if name not in self._biases.values()]
        headers, stored = survey.folder.headers, survey.renamed
        embeddings = {f"{n}.weight" for n, m in survey.model.named_modules() if isinstance(m, nn.Embedding)}
        matrices = [name for name in self.floats if len(headers[stored.get(name, name)].shape) == 2]
        self.float_modules = [name.removesuffix(".weight") for name in matrices if name not in embeddings]

    def check(self) -> None:
        """UnsupportedError for what the target cannot express, as far as config and headers show it."""
        target = self.target
        if (shifted := skeleton.shifted_norms(self.survey.model)) and not target.stores_norm_biases:
            raise UnsupportedError(
                f"{shortened(shifted)} adds a bias that its class does not have; only format='modelslim' stores that"
            )
        for name, site in self.stored.items():
            if reason := target.refuses(site.scheme, site.shape):
                raise UnsupportedError(f"{name} ({site.scheme}) cannot be converted to {target.name}: {reason}")
        target.quantization_config(list(self.stored.values()), self.float_modules, self.floats)

    def write(self, writer: ShardWriter, progress: bool | None) -> Iterator[StoredSite]:
        """Write float tensors, then the stored Linears one by one."""
        survey, target = self.survey, self.target
        with progress_bar("converting", len(self.floats) + len(self.stored), progress) as advance:
            for name in self.floats:
                writer.add(name, survey.folder.read(survey.renamed.get(name, name)))
                advance(name)
            for name, site in self.stored.items():
                packed = survey.read_stored(site)
                if reason := target.refuses(packed.scheme, packed.shape, packed):
                    raise UnsupportedError(f"{name} ({site.scheme}) cannot be converted to {target.name}: {reason}")
                tensors = target.write(name, packed, survey.dtype)
                tensors |= target.write_bias(name, packed, self._bias(site))
                for stored, tensor in tensors.items():
                    writer.add(stored, tensor)
                layout = {"permuted": packed.permutation is not None}
                yield StoredSite(name, packed.scheme, site.shape, tuple(tensors), layout)
                advance(name)

    def _bias(self, site: StoredSite) -> Tensor | None:
        """The float bias of a stored Linear; zeros that were written for a Linear without one are left out."""
        survey = self.survey
        if site.owns_bias and survey.format is not None:
            bias = survey.format.read_bias(site, survey.folder.read)
        else:
            bias = survey.folder.read(self._biases[site.name]) if site.name in self._biases else None
        extra = bias is not None and f"{site.name}.bias" in survey.extra_biases and not bias.any()
        return None if extra else bias
