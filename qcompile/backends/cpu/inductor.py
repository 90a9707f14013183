"""What is asked of Inductor while it compiles the pieces of a graph for a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def kernels_side_by_side() -> Iterator[None]:
    """Within, no piece waits for the C++ compiler: the next one is lowered meanwhile, and all are waited for last.

    Nothing that is compiled within may be called within. Inductor starts its compilers when it loads the wrapper of a
    graph, which then waits for them; Dynamo's lock keeps other threads from compiling at the same time.
    """
    from torch._inductor.async_compile import AsyncCompile

    wait, waiting = AsyncCompile._wait_futures, list[tuple[AsyncCompile, dict[str, Any]]]()
    AsyncCompile._wait_futures = lambda self, scope: waiting.append((self, scope))  # type: ignore[method-assign]
    try:
        yield
    finally:
        AsyncCompile._wait_futures = wait  # type: ignore[method-assign]
    for compiler, scope in waiting:
        wait(compiler, scope)
