"""What the commands share: options that mean the same everywhere, and how progress and files are written."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import ConfigError

Checkpoint = Annotated[
    Path,
    typer.Argument(metavar="PATH", help="Folder of a checkpoint, or a hub id in the local cache.", show_default=False),
]
Device = Annotated[str, typer.Option(help="Where to run, or to plan for.")]
Soc = Annotated[str | None, typer.Option(help="Chip to plan for, such as Ascend910B (npu) or sm_80 (cuda).")]
TensorParallel = Annotated[int, typer.Option("--tp", min=1, help="Ranks that divide every layer (see torchrun).")]
ExpertParallel = Annotated[
    int | None,
    typer.Option("--ep", min=1, help="Parts that experts are dealt in (default: as --tp, where that divides them)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what exists at the output.")]


def stderr() -> Any:
    """A console for what is not a result."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True, highlight=False)


def progress() -> Any:
    """A bar on a terminal; in a pipe nothing until the result."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:36}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = stderr()
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def writable(file: Path) -> None:
    """Say before the work, not after it, that a file cannot be written."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        what = "is a folder" if file.is_dir() else f"cannot be written: there is no folder {file.absolute().parent}"
        raise ConfigError(f"{file} {what}; name a file in an existing folder")


def write(file: Path, text: str) -> None:
    """Write ``file`` whole or not at all."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(file)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}; choose another file") from error
    finally:
        unfinished.unlink(missing_ok=True)


def chip(device: str, soc: str | None) -> AbstractContextManager:
    """Plan for the chip ``soc`` of a device."""
    if soc is None:
        return nullcontext()
    from .planning import find_backend

    target = getattr(find_backend(device, to_run=False), "target", None)
    if target is None:
        raise ConfigError(f"--soc names a chip and goes with --device npu or cuda, not {device}")
    return target(soc=soc)
