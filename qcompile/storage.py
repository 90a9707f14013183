"""Folders of safetensors: read with suspicion, written tensor by tensor, replaced as a whole.

Layout of a file (safetensors 0.x): 8 bytes, the header's length, little-endian; the header, JSON that maps names to
dtype, shape and data offsets, padded with spaces; the data. The package safetensors validates every header that is
read; its data are read plainly rather than mapped, so that memory holds what was asked for and no more.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import ConfigError, FormatError, UnsupportedError, shortened
from .formats import TensorHeader

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STEM, _SUFFIX, _INDEX = "model", ".safetensors", ".safetensors.index.json"
_SINGLE, _PICKLE_INDEX = _STEM + _SUFFIX, "pytorch_model.bin.index.json"
_PATTERNS = (_STEM, f"{_STEM}-*", "quant_model_weight*", "gptq_model*", "*")  # names of files without index, in turn
CONFIG, PLAIN_CONFIG = "config.json", "qcompile.json"
_UNFINISHED, _REPLACED = ".qcompile-partial", ".qcompile-replaced"


# -------------------------------------------------------------------------------------------------------- reading


class Folder:
    """A checkpoint folder: its config, and the headers of its tensors. Use as a context manager.

    allow_pickle: also take weights that torch pickled, read by ``torch.load(weights_only=True)``. FormatError names the
    file of anything that is missing, truncated, contradictory or outside.
    """

    def __init__(self, path: Path, allow_pickle: bool = False) -> None:
        self.path = path
        _refuse_leftovers(path)
        named = [name for name in (CONFIG, PLAIN_CONFIG) if (path / name).is_file()]
        if not named:
            raise FormatError(f"{path} holds no {CONFIG}: is it the folder of a checkpoint?")
        self.is_plain = named[0] == PLAIN_CONFIG
        self.config = read_json(path / named[0])
        self.headers: dict[str, TensorHeader] = {}
        self._offsets: dict[str, int] = {}
        self._open: dict[str, BinaryIO] = {}
        self._pickles: dict[str, dict[str, Tensor]] = {}
        self.bytes_read = 0
        for file, expected in _tensor_files(path, allow_pickle).items():
            self._add(file, expected)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()
        self._pickles.clear()

    @property
    def size(self) -> tuple[int, int]:
        """How many tensors there are, and their bytes."""
        each = (math.prod(header.shape) * DTYPES[header.dtype].itemsize for header in self.headers.values())
        return len(self.headers), sum(each)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Load one tensor, or what it has at ``index`` of its first dimension, into memory of its own."""
        header = self.headers[name]
        dtype, shape = DTYPES[header.dtype], header.shape if index is None else header.shape[1:]
        size = math.prod(shape) * dtype.itemsize
        self.bytes_read += size
        if header.file in self._pickles:
            tensor = self._pickles[header.file][name]
            return (tensor if index is None else tensor[index]).clone(memory_format=torch.contiguous_format)
        if not size:
            return torch.empty(shape, dtype=dtype)
        data = torch.empty(size, dtype=torch.uint8)  # a bytearray would be filled with zeros first
        self._read_into(data.numpy().data, name, (index or 0) * size)
        return data.view(dtype).view(shape)

    def read_slice(self, name: str, cuts: Sequence[Sequence[tuple[int, int]] | None]) -> Tensor:
        """Load of one tensor what lies in the runs [start, stop) of each dimension (None: all), and nothing else."""
        header = self.headers[name]
        if all(runs is None for runs in cuts) or header.file in self._pickles:
            tensor = self.read(name)
            for dim, runs in enumerate(cuts):
                if runs is not None:
                    tensor = torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in runs], dim)
            return tensor.contiguous()
        every = [((0, size),) if runs is None else runs for size, runs in zip(header.shape, cuts, strict=True)]
        shape = [sum(stop - start for start, stop in runs) for runs in every]
        dtype = DTYPES[header.dtype]
        data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        view, place = data.numpy().data, 0
        for first, count in _extents(header.shape, every):
            size = count * dtype.itemsize
            self._read_into(view[place : place + size], name, first * dtype.itemsize)
            place += size
        self.bytes_read += place
        return data.view(dtype).view(shape)

    def _read_into(self, memory: memoryview, name: str, start: int) -> None:
        """Fill ``memory`` with the bytes of a tensor from ``start`` on."""
        where = self.headers[name].file
        if where not in self._open:
            self._open[where] = (self.path / where).open("rb")
        file = self._open[where]
        file.seek(self._offsets[name] + start)
        if file.readinto(memory) != len(memory):  # type: ignore[attr-defined]
            raise FormatError(f"{self.path / where} ends within {name}: the file was cut while it was read")

    def _add(self, file: str, expected: set[str] | None) -> None:
        path = self.path / file
        if file.endswith(_SUFFIX):
            entries, data = _header(path)
            found = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
            self._offsets |= {name: data + entry["data_offsets"][0] for name, entry in entries.items()}
        else:
            self._pickles[file] = _unpickled(path)
            named = self._pickles[file].items()
            found = {name: (_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)) for name, tensor in named}
        if expected is not None and (wrong := expected ^ found.keys()):
            raise FormatError(f"{path} and its index disagree about {shortened(wrong)}")
        for name, (dtype, shape) in found.items():
            if name in self.headers:
                raise FormatError(f"{name} is stored twice: in {self.headers[name].file} and in {file}")
            if dtype not in DTYPES:
                raise FormatError(f"{path}: {name} has the dtype {dtype}, which this torch does not have")
            self.headers[name] = TensorHeader(name, dtype, shape, file)


def _extents(shape: Sequence[int], runs: Sequence[Sequence[tuple[int, int]]]) -> Iterator[tuple[int, int]]:
    """(first element, how many) of what lies next to each other in the runs of every dimension, in their order."""
    last = max((dim for dim, own in enumerate(runs) if tuple(own) != ((0, shape[dim]),)), default=0)
    inner = math.prod(shape[last + 1 :])
    outer = itertools.product(*(itertools.chain(*(range(*run) for run in own)) for own in runs[:last]))
    for index in outer:
        first = 0
        for size, place in zip(shape, index, strict=False):
            first = first * size + place
        for start, stop in runs[last]:
            yield (first * shape[last] + start) * inner, (stop - start) * inner


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; FormatError when it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _tensor_files(path: Path, allow_pickle: bool) -> dict[str, set[str] | None]:
    """The tensor files of a folder, with the names that an index expects in each (None without an index)."""
    indexes, single = sorted(path.glob(f"*{_INDEX}")), path / _SINGLE
    if indexes:
        index = next((index for index in indexes if index.name == _STEM + _INDEX), indexes[0])
        if len(indexes) > 1 and index.name != _STEM + _INDEX:
            raise FormatError(f"{path} holds several indexes: {shortened(index.name for index in indexes)}")
        files = _indexed(path, index, _SUFFIX)
        if single.is_file() and _SINGLE not in files:
            raise FormatError(f"{path} holds both {_SINGLE} and {index.name}, which does not mention it; delete it")
        return files
    for pattern in _PATTERNS:
        if found := sorted(file.name for file in path.glob(pattern + _SUFFIX)):
            return dict.fromkeys(_series(path, found), None)
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if not pickles:
        raise FormatError(f"{path} holds neither {_SINGLE} nor {_STEM}{_INDEX}")
    if not allow_pickle:
        raise FormatError(
            f"{path} holds its weights as pickles ({shortened(pickles)}), which can run any code when opened and are "
            "not read; save them as safetensors first, or pass allow_pickle=True to have torch.load(weights_only=True) "
            "read them"
        )
    index = path / _PICKLE_INDEX
    return _indexed(path, index, ".bin") if index.is_file() else dict.fromkeys(_series(path, pickles), None)


def _indexed(path: Path, index: Path, suffix: str) -> dict[str, set[str] | None]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, Mapping) or not names:
        raise FormatError(f"{index} has no weight_map")
    files: dict[str, set[str] | None] = {}
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(suffix):
            raise FormatError(f"{index} places {name} in {file!r}, which is not a {suffix[1:]} file of this folder")
        expected = files.setdefault(file, set())
        assert expected is not None
        expected.add(name)
    return dict(sorted(files.items()))


def _series(path: Path, files: list[str]) -> list[str]:
    """``files``, which must be one, or all of a numbered series."""
    numbered = [re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.\w+", file) for file in files]
    series = {(match[1], int(match[3])) for match in numbered if match}
    if len(files) > 1 and not (all(numbered) and series == {(numbered[0][1], len(files))}):  # type: ignore[index]
        raise FormatError(f"{path} holds {shortened(files)}, but no index that says which of them belong together")
    return files


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors that torch pickled, mapped from the file where its format allows that; no code is run."""
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of old versions cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can make the unpickler raise anything
        raise FormatError(f"{path} is not a file of tensors alone: {error}") from None
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise FormatError(f"{path} must hold tensors by name, and nothing else")
    return dict(tensors)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries of a safetensors header and where the data begin, after the package has validated both."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path} is not a sound safetensors file: {error}") from None
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _refuse_leftovers(path: Path) -> None:
    if path.name.endswith(_UNFINISHED):
        raise FormatError(f"{path} was left by a save that did not finish; delete it and save again")
    if path.name.endswith(_REPLACED):
        raise FormatError(f"{path} is the old checkpoint that an interrupted save put aside; rename it to use it")
    if not path.is_dir():
        aside = sorted(path.parent.glob(f".{path.name}.*{_REPLACED}")) if path.parent.is_dir() else []
        hint = f"; an interrupted save put the old one aside as {aside[0]}" if aside else ""
        raise FormatError(f"{path} is not a folder{hint}")


# -------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes tensors one by one into safetensors files of about ``shard_bytes``, and an index when there are several.

    header_room: bytes kept for the header of each file, since it precedes data that are not known yet; a shard ends
    when either is full. Data stay aligned to 8 bytes: what has another size waits, in memory, for the shard's end.
    stem: how the files are called; a single one of the stem "model" needs neither number nor index.
    """

    def __init__(self, folder: Path, shard_bytes: int, header_room: int, stem: str = _STEM) -> None:
        self._folder, self._shard_bytes, self._room, self._stem = folder, shard_bytes, header_room, stem
        self._file: BinaryIO | None = None
        self._entries: dict[str, Any] = {}
        self._waiting: list[tuple[str, Tensor]] = []
        self._offset = self._header_bytes = self._planned = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; OSError when the disk is full."""
        if tensor.dtype not in _NAMES:
            raise UnsupportedError(f"{name} is {tensor.dtype}, which safetensors cannot store")
        size, described = tensor.numel() * tensor.element_size(), len(json.dumps(name)) + 120 + 21 * tensor.dim()
        if self._entries and (self._planned + size > self._shard_bytes or self._header_bytes + described > self._room):
            self._close()
        if self._file is None:
            self._header_bytes, self._planned = 128, 0
            self._data_start = -(-max(self._room, described + 128) // 8) * 8
            path = self._folder / f"shard-{len(self._shards) + 1}"
            self._file, self._offset = path.open("wb"), 0
            self._shards.append((path, []))
            self._file.seek(8 + self._data_start)
        self._planned += size
        self._header_bytes += described
        self._entries[name] = None  # its place in the header
        if size % 8:
            self._waiting.append((name, tensor.detach().cpu().clone()))
        else:
            self._write(name, tensor)

    def finish(self) -> None:
        """Close the last shard and give all of them their final names."""
        if self._file is None and not self._shards:
            raise ConfigError("there is no tensor to save")
        self._close()
        if len(self._shards) == 1 and self._stem == _STEM:
            self._shards[0][0].rename(self._folder / _SINGLE)
            return
        places = {}
        for i, (path, names) in enumerate(self._shards, 1):
            final = f"{self._stem}-{i:05}-of-{len(self._shards):05}{_SUFFIX}"
            path.rename(self._folder / final)
            places.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": places}
        write_json(self._folder / f"{self._stem}{_INDEX}", index)

    def close(self) -> None:
        """Let go of the open file, finished or not."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, name: str, tensor: Tensor) -> None:
        assert self._file is not None
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if data.numel():
            self._file.write(data.numpy().data)
        self._entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, self._offset + data.numel()],
        }
        self._offset += data.numel()

    def _close(self) -> None:
        if self._file is None:
            return
        for name, tensor in sorted(self._waiting, key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._entries}).encode()
        self._file.seek(0)
        self._file.write(self._data_start.to_bytes(8, "little") + header.ljust(self._data_start))
        self._shards[-1][1].extend(self._entries)
        self.total_bytes += self._offset
        self._waiting, self._entries = [], {}
        self.close()


def write_json(path: Path, value: Any) -> None:
    """Write JSON as transformers does: indented, one final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling that takes the place of ``path`` when the block ends well, and vanishes when it does not.

    An old checkpoint at ``path`` is touched only after the new one is complete and on disk: it is renamed aside, the
    new one is renamed in, the old one is deleted. After a kill the sibling stays behind; ``Folder`` refuses it.
    """
    target = path.resolve()
    if target.exists() and not overwrite:
        raise ConfigError(f"{path} exists; pass overwrite=True to replace it as a whole")
    if target.exists() and not (target.is_dir() and _may_be_replaced(target)):
        raise ConfigError(f"{path} is not the folder of a checkpoint, so it is not replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    unique = f".{target.name}.{uuid.uuid4().hex[:8]}"
    fresh, aside = target.with_name(unique + _UNFINISHED), target.with_name(unique + _REPLACED)
    fresh.mkdir()
    try:
        yield fresh
        for written in (*fresh.iterdir(), fresh):
            _sync(written)
        if target.exists():
            target.rename(aside)
        try:
            fresh.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def _may_be_replaced(folder: Path) -> bool:
    files = {file.name for file in folder.iterdir()}
    return not files or bool(files & {CONFIG, PLAIN_CONFIG, _SINGLE, _STEM + _INDEX})


def _sync(path: Path) -> None:
    """Have the disk confirm a file, or a folder's list of names, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return  # not every system opens folders
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
