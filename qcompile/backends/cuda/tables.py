"""Tuned tiles on disk: one JSON file per GPU, in the user's cache folder and in this package (``tuned/``).

A file is made for the kernels whose sources have its hash; for others its tiles may be wrong, and nothing of it is
used. Files of the cache have the hash in their names, so that versions of the package do not take turns replacing them.
What is wrong with a file is said once, by its name; no compilation fails because of it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ...cache import CACHE_VARIABLE, cache_folder
from .targets import Target

SHIPPED = Path(__file__).parent / "tuned"
_DEVICE = Path(__file__).parent / "device"
_PATIENCE = 60  # seconds to wait for another process that writes


class Entry(BaseModel):
    """Tiles of a product (``tiles.Tiles``), their microseconds, and those of the rule's tiles in the same run."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bm: int
    bn: int
    bk: int
    splits: int
    stages: int
    warps: int
    us: float
    rule_us: float


class Table(BaseModel):
    """A file. kernels: the hash of their sources; tiles: by ``tiles.Weight.key``; the rest says where it comes from."""

    model_config = ConfigDict(extra="forbid", strict=True)

    device: str
    arch: str
    kernels: str
    triton: str
    tiles: dict[str, Entry] = {}

    @classmethod
    def of(cls, target: Target) -> Table:
        """An empty one for this GPU and these kernels."""
        return cls(device=target.device, arch=target.name, kernels=kernels(), triton=_triton())


@functools.cache
def kernels() -> str:
    """A hash of the sources of the kernels; not of what launches them."""
    sources = sorted(path for path in _DEVICE.glob("*.py") if not path.name.startswith("launch"))
    text = "\0".join(path.name + path.read_text(encoding="utf-8") for path in sources)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def file_name(target: Target) -> str:
    """ "NVIDIA_H200_sm_90" """
    return re.sub(r"\W+", "_", f"{target.device} {target.name}")


def own_path(target: Target) -> Path:
    """The file of this GPU in the user's cache."""
    return cache_folder() / f"qcompile_cuda-tiles-{file_name(target)}-{kernels()}.json"


def shipped_path(target: Target) -> Path:
    """The file of this GPU that the package brings, if it has one."""
    return SHIPPED / f"{file_name(target)}.json"


# ---------------------------------------------------------------------------------------------------------- looking up

_READ: dict[Path, dict[str, Entry]] = {}  # files, and what was added to them here
_REPORTED: set[str] = set()
_generation = 0


def generation() -> int:
    """Another number whenever ``find`` may find something else."""
    return _generation


def find(target: Target, key: str) -> Iterator[tuple[Entry, Path]]:
    """Entries for ``key`` and where they are: the user's, then the package's. A GPU without a name has none."""
    for path in _paths(target):
        if key in (tiles := _tiles_of(path)):
            yield tiles[key], path


def keys(target: Target) -> set[str]:
    """All that has tuned tiles on this GPU."""
    return {key for path in _paths(target) for key in _tiles_of(path)}


def _paths(target: Target) -> tuple[Path, ...]:
    return (own_path(target), shipped_path(target)) if target.device else ()


def _tiles_of(path: Path) -> dict[str, Entry]:
    if path not in _READ:
        found = read(path)
        _READ[path] = found.tiles if found is not None else {}
    return _READ[path]


def read(path: Path) -> Table | None:
    """A file; None where there is none. One that is damaged, or made for other kernels, is reported and is none."""
    try:
        table = Table.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        report(f"{path}: tuned tiles cannot be read: {error}")
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        report(f"{path} is damaged, and its tuned tiles are not used: {where + ': ' if where else ''}{first['msg']}")
        return None
    if table.kernels != kernels():
        report(f"{path} was made for other kernels ({table.kernels}, not {kernels()}), and its tiles are not used")
        return None
    return table


def report(message: str) -> None:
    """Say what is wrong, once."""
    if message not in _REPORTED:
        _REPORTED.add(message)
        print(f"qcompile: {message}", file=sys.stderr, flush=True)


def forget() -> None:
    """Read files again."""
    global _generation
    _generation += 1
    _READ.clear()
    _REPORTED.clear()


# --------------------------------------------------------------------------------------------------------------- adding


def remember(target: Target, entries: Mapping[str, Entry]) -> None:
    """Keep entries in the user's cache. Where it cannot be written they are kept for this process, which is said."""
    global _generation
    path = own_path(target)
    _tiles_of(path).update(entries)
    _generation += 1
    try:
        merge(path, target, entries)
    except OSError as error:
        report(f"tuned tiles cannot be kept for other processes: {error} ({CACHE_VARIABLE} names another folder)")


def merge(path: Path, target: Target, entries: Mapping[str, Entry]) -> None:
    """Add entries to a file, whole or not at all; several processes may do so at once. OSError where it cannot be."""
    from torch.utils._filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=_PATIENCE):
        table = read(path) or Table.of(target)
        table.tiles.update(entries)
        partial = path.with_suffix(".partial")
        partial.write_text(_text(table), encoding="utf-8")
        os.replace(partial, path)


def _text(table: Table) -> str:
    """JSON with a line for each product."""
    lines = [f"  {json.dumps(key)}: {json.dumps(one.model_dump())}" for key, one in sorted(table.tiles.items())]
    facts = json.dumps(table.model_dump(exclude={"tiles"}), indent=1)
    return facts[: -len("\n}")] + ',\n "tiles": {\n' + ",\n".join(lines) + "\n }\n}\n"
