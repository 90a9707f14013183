"""Who this process is among the ranks: meshes of ``torch.distributed`` in, names of process groups out."""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..errors import ConfigError, ParallelError, shortened
from ..storage import Folder

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Ranks:
    """One rank: its number among all, and among those that divide its tensors.

    group: those that divide its tensors; narrow: those that divide the same experts; world: all.
    """

    rank: int = 0
    tensor: int = 0
    group: str = ""
    narrow: str = ""
    world: str = ""


def sizes_of(mesh: DeviceMesh, ep: int | None) -> tuple[int, int | None]:
    """(tp, ep) of a mesh: of one dimension all ranks divide tensors, of several those of the dimension "tp".

    ConfigError for a mesh without such a dimension, or with more ranks than tp and ep need.
    """
    if mesh.ndim == 1:
        return mesh.size(), ep
    names = mesh.mesh_dim_names or ()
    if "tp" not in names or mesh.ndim != 2 or names[1] != "tp":
        raise ConfigError(
            f"a mesh has one dimension, or two of which the second is called 'tp', not {names or mesh.ndim}"
        )
    tp, copies = mesh["tp"].size(), mesh.size() // mesh["tp"].size()
    if copies > 1 and ep not in (None, tp * copies):
        raise ConfigError(
            f"{copies} copies of {tp} ranks deal experts to all {tp * copies}: ep={tp * copies}, not {ep}"
        )
    return tp, tp * copies if copies > 1 else ep


def ranks_of(mesh: DeviceMesh, tp: int, ep: int) -> Ranks:
    """This process in a mesh whose experts are dealt in ``ep`` parts; called by all of its ranks."""
    own = mesh if mesh.ndim == 1 else mesh["tp"]
    group, tensor, ways = own.get_group(), own.get_local_rank(), max(1, tp // ep)
    narrow = ""
    if 1 < ways < tp:
        every = dist.get_process_group_ranks(group)
        for part in range(ep):
            made = dist.new_group(every[part * ways : (part + 1) * ways])
            narrow = made.group_name if tensor // ways == part else narrow
    world = dist.group.WORLD
    assert world is not None
    rank = tensor if mesh.ndim == 1 else mesh.get_rank()
    return Ranks(rank, tensor, group.group_name, group.group_name if ways == tp > 1 else narrow, world.group_name)


_SAMPLES, _SAMPLE = 64, 4096  # places of a file, the first and the last among them, and bytes at each to compare
_PACKAGES = ("qcompile", "torch", "transformers", "safetensors")


def agree(mesh: DeviceMesh, folder: Folder) -> None:
    """ParallelError unless all ranks see the same checkpoint and run the same versions; called by all of them.

    Compared are config, headers, sizes and samples of every file, not all of its bytes.
    """
    mesh = mesh if mesh.ndim == 1 else mesh["tp"]
    found = {"checkpoints": _digest_of(folder), "versions of " + ", ".join(_PACKAGES): _versions()}
    device = "cpu" if mesh.device_type == "cpu" else f"{mesh.device_type}:{mesh.get_local_rank()}"
    own = torch.stack([torch.frombuffer(bytearray(digest), dtype=torch.uint8) for digest in found.values()]).to(device)
    every = [torch.empty_like(own) for _ in range(mesh.size())]
    dist.all_gather(every, own, group=mesh.get_group())
    for index, what in enumerate(found):
        others = [
            f"rank {rank}" for rank, theirs in enumerate(every) if not torch.equal(theirs[index], every[0][index])
        ]
        if others:
            raise ParallelError(
                f"the ranks have different {what}: {shortened(others)} not those of rank 0 (here {folder.path}); give "
                "all ranks the same files and the same environment"
            )


def _digest_of(folder: Folder) -> bytes:
    digest = hashlib.sha256(repr(sorted((h.name, h.dtype, h.shape) for h in folder.headers.values())).encode())
    digest.update(repr(folder.config).encode())
    for name in sorted({header.file for header in folder.headers.values()}):
        digest.update(_sampled(folder.path / name))
    return digest.digest()


def _sampled(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for place in range(_SAMPLES):
            file.seek(max(size - _SAMPLE, 0) * place // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.digest()


def _versions() -> bytes:
    return hashlib.sha256(repr([importlib.metadata.version(name) for name in _PACKAGES]).encode()).digest()
