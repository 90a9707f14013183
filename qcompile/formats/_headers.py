"""Headers of quantized modules against what their scheme needs, and numbers that every format refuses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from ..errors import FormatError, UnsupportedError, shortened
from . import StoredSite, TensorHeader

FLOATS = ("F16", "BF16", "F32", "F64")

Stored = Mapping[str, TensorHeader]  # the tensors of one module, by the last part of their name
Wanted = Mapping[str, tuple]  # (dtypes, shape, other shapes ...) of each


class Missing(FormatError):
    """A tensor that a module needs is not there; ``every`` gathers these into one message."""

    def __init__(self, message: str, names: Iterable[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


def by_module(headers: Mapping[str, TensorHeader], linears: Collection[str], marks: Iterable[str]) -> dict[str, Stored]:
    """Headers by module and last part of the name; UnsupportedError for a quantized module that is no Linear."""
    marks = frozenset(marks)
    modules: dict[str, dict[str, TensorHeader]] = {}
    for header in headers.values():
        module, _, suffix = header.name.rpartition(".")
        modules.setdefault(module, {})[suffix] = header
        if suffix in marks and module not in linears:
            raise UnsupportedError(
                f"{header.file}: {header.name} belongs to a quantized module that is no Linear of this model; only "
                "Linears and experts are read in this format"
            )
    return dict(modules)


def every(linears: Iterable[str], find: Callable[[str], StoredSite | None]) -> tuple[StoredSite, ...]:
    """The sites that ``find`` makes of the Linears; one FormatError lists all tensors that are missing."""
    sites, missing = [], []
    for name in linears:
        try:
            site = find(name)
        except Missing as error:
            missing.append(error)
        else:
            sites += [site] if site else []
    if missing:
        names = shortened(name for error in missing for name in error.names)
        raise FormatError(str(missing[0]) + (f". Missing in all: {names}" if len(missing) > 1 else ""))
    return tuple(sites)


def fits(stored: Stored, wanted: Wanted) -> bool:
    """Whether the tensors of a module are all there, of a wanted dtype and shape."""
    found = ((stored.get(suffix), dtypes, shapes) for suffix, (dtypes, *shapes) in wanted.items())
    return all(header and header.dtype in dtypes and header.shape in shapes for header, dtypes, shapes in found)


def check(name: str, stored: Stored, wanted: Wanted, about: str) -> None:
    """FormatError that names file and tensor unless the module fits."""
    if fits(stored, wanted):
        return
    where = next(iter(stored.values())).file
    missing = [suffix for suffix in wanted if suffix not in stored]
    for suffix, (dtypes, *shapes) in wanted.items():
        header = stored.get(suffix)
        needed = f"{' or '.join(dtypes)} {' or '.join(str(list(shape)) for shape in shapes)}"
        if header is None:
            raise Missing(
                f"{where}: {name}.{suffix} is missing: {about}, which needs it as {needed}",
                [f"{name}.{suffix}" for suffix in missing],
            )
        if header.dtype not in dtypes or header.shape not in shapes:
            raise FormatError(
                f"{header.file}: {header.name} is {header.dtype} {list(header.shape)}, but must be {needed}: {about}"
            )


def finite(values: Tensor, name: str) -> Tensor:
    """``values``; FormatError where they are not finite."""
    if not torch.isfinite(values.float() if values.dtype.itemsize == 1 else values).all():
        raise FormatError(f"{name} holds NaN or infinity; the checkpoint is damaged")
    return values
