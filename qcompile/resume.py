"""A folder from which an interrupted calibration continues: packed weights of what is done, and what comes next reads.

    part-0000.safetensors    tensors "<site>|<tensor>" of the sites of the first part
    inputs.safetensors       what the next part begins with, and how many parts are done
    run.json                 what the run is made of

Every file is written beside its place and renamed, ``inputs.safetensors`` last: a killed run loses one part at most.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import ConfigError, FormatError
from .types import PackedWeight, PlannedSite

_INPUTS, _RUN, _SCALE = "inputs.safetensors", "run.json", "|scale|"


class ResumeFolder:
    """The state of a run in the folder ``path``, of which ``done`` parts are finished.

    run: what it is made of, hashes by name. ConfigError when the folder holds another run, or anything else.
    """

    def __init__(self, path: str | Path, run: Mapping[str, str]) -> None:
        self.path, self.done = Path(path), 0
        described = self.path / _RUN
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            known = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else None
            strangers = [file.name for file in self.path.iterdir() if not file.name.endswith(".partial")]
        except (OSError, ValueError) as error:
            raise ConfigError(f"resume={str(path)!r} cannot be used: {error}") from None
        if known is None and strangers:
            raise ConfigError(f"resume={str(path)!r} is a folder of other files; name an empty or a new one")
        if known is None:
            partial = described.with_name(_RUN + ".partial")
            partial.write_text(json.dumps(dict(run), indent=2) + "\n", encoding="utf-8")
            os.replace(partial, described)
        elif different := [name for name, value in run.items() if known.get(name) != value]:
            raise ConfigError(
                f"resume={str(path)!r} holds a run with another {' and '.join(different)}; name another folder, or "
                "delete this one"
            )
        if (self.path / _INPUTS).is_file():
            self.done = int(_read(self.path / _INPUTS)[0]["done"])

    def save(
        self, packed: Mapping[str, PackedWeight], facts: Any, inputs: Sequence[Any], scales: Mapping[str, Tensor] = {}
    ) -> None:
        """Finish one more part: packed weights of its sites, ``facts`` (JSON) about it, what the next one begins with.

        inputs: nests of dicts, lists and tuples with tensors, numbers and None in them. scales: by which values were
        scaled before the part was quantized, by name.
        """
        tensors = {
            f"{site}|{name}": tensor
            for site, weight in packed.items()
            for name, tensor in (weight.tensors() | weight.activation_tensors()).items()
        }
        tensors |= {f"{_SCALE}{name}": scale for name, scale in scales.items()}
        _write(self._part(self.done), tensors, {"facts": json.dumps(facts)})
        leaves, spec = pytree.tree_flatten(list(inputs))
        tensors = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        described = {"done": str(self.done + 1), "plain": json.dumps(plain), "spec": pytree.treespec_dumps(spec)}
        _write(self.path / _INPUTS, tensors, described)
        self.done += 1

    def packed(self, part: int, sites: Iterable[PlannedSite]) -> tuple[dict[str, PackedWeight], Any]:
        """What ``save`` was given for a part: packed weights by the names of ``sites``, and facts."""
        described, tensors = _read(self._part(part))
        found = {}
        for planned in sites:
            own = {key.partition("|")[2]: t for key, t in tensors.items() if key.partition("|")[0] == planned.site.name}
            if own and planned.scheme is not None:
                found[planned.site.name] = PackedWeight(planned.scheme, planned.site.shape, **own)
        return found, json.loads(described["facts"])

    def scales(self, part: int) -> dict[str, Tensor]:
        """The scales that ``save`` was given for a part."""
        tensors = _read(self._part(part))[1]
        return {key.removeprefix(_SCALE): tensor for key, tensor in tensors.items() if key.startswith(_SCALE)}

    def inputs(self, device: torch.device) -> list[Any]:
        """What the next part begins with, on ``device``."""
        described, tensors = _read(self.path / _INPUTS)
        leaves = json.loads(described["plain"])
        for index, tensor in tensors.items():
            leaves[int(index)] = tensor.to(device)
        return pytree.tree_unflatten(leaves, pytree.treespec_loads(described["spec"]))

    def _part(self, index: int) -> Path:
        return self.path / f"part-{index:04}.safetensors"


def digest(parts: Iterable[Any]) -> str:
    """A hash of texts, of tensors by all their bytes, and of tuples of these."""
    total = hashlib.sha256()
    for part in pytree.tree_leaves(list(parts)):
        if isinstance(part, Tensor):
            total.update(f"{part.dtype}{list(part.shape)}".encode())
            total.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            total.update(repr(part).encode())
    return total.hexdigest()


def sample(weight: Tensor, count: int = 1024) -> Tensor:
    """Some elements of a weight, evenly spaced, by which it is told from another one."""
    flat = weight.detach().reshape(-1) if weight.is_contiguous() else weight.detach()[..., :1].reshape(-1)
    return flat[:: max(1, len(flat) // count)]


def _write(path: Path, tensors: Mapping[str, Tensor], described: dict[str, str]) -> None:
    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        own[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(own[name].untyped_storage().data_ptr())
    partial = path.with_name(path.name + ".partial")
    save_file(own, partial, metadata=described)
    os.replace(partial, path)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} cannot be read ({error}); delete its folder to begin again") from None
