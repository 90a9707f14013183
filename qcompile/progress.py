"""Progress bars: on a terminal by default, silent in pipes and tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    title: str, total: int, show: bool | None = None, *, in_bytes: bool = False
) -> Iterator[Callable[..., None]]:
    """A bar with what is done (steps, or bytes) and the remaining time.

    Call what it yields after each step, with the step's name and, of bytes, how many are done in all.
    """
    if show is None:
        show = sys.stderr.isatty()
    if not show or not total:
        yield lambda name, done=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(name: str, done: int | None = None) -> None:
            if done is None:
                bar.update(task, advance=1, description=name)
            else:
                bar.update(task, completed=min(done, total), description=name)

        yield advance
