"""A process that torchrun started, as one rank: the mesh it belongs to, and what happens when another one is gone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ConfigError, ParallelError, QcompileError, shortened

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
_TIMEOUT = "QCOMPILE_TIMEOUT"  # seconds that a rank waits for the others
_GRACE = 3.0  # seconds in which ranks that are alive say so, after one was lost


@contextmanager
def launched(tp: int, ep: int | None, device: str) -> Iterator[tuple[Any, str, bool]]:
    """(mesh or None, the device of this rank, whether it is the first) of a process.

    One rank needs no launcher. Of several, all are started by ``torchrun --nproc-per-node N``; ConfigError when they
    are not as many as tp and ep need. ParallelError names the ranks that are gone when a collective fails; a rank waits
    for the others no longer than the environment variable QCOMPILE_TIMEOUT says, 300 seconds by default.
    """
    ranks, started = max(tp, ep or 1), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks != started:
        command = f"torchrun --nproc-per-node {ranks} -m qcompile ... --tp {tp}" + (f" --ep {ep}" if ep else "")
        running = f"{started} were started by torchrun" if started > 1 else "this is one"
        raise ConfigError(f"tp={tp} and ep={ep} need {ranks} processes, but {running}: run {command}")
    if ranks == 1:
        yield None, device, True
        return
    kind = device.partition(":")[0]
    own = device if kind == "cpu" else f"{kind}:{os.environ.get('LOCAL_RANK', '0')}"
    if kind != "cpu":
        getattr(torch, kind).set_device(own)
    seconds = float(os.environ.get(_TIMEOUT, "300"))
    try:
        dist.init_process_group(BACKENDS[kind], timeout=timedelta(seconds=seconds))
    except RuntimeError as error:
        which = f"rank {os.environ.get('RANK')} of {ranks}"
        first = str(error).splitlines()[0][:200]
        raise ParallelError(f"{which} waited {seconds:.0f} seconds for ranks that did not come: {first}") from error
    try:
        shape, names = ((ranks,), ("tp",)) if ranks == tp else ((ranks // tp, tp), ("copies", "tp"))
        mesh = dist.init_device_mesh(kind, shape, mesh_dim_names=names)
        yield mesh, own, dist.get_rank() == 0
    except RuntimeError as error:
        if isinstance(error, QcompileError):
            raise
        raise ParallelError(f"{_who_is_gone()}: {str(error).splitlines()[0][:200]}") from error
    finally:
        dist.destroy_process_group()


def _who_is_gone() -> str:
    """Ask the ranks that are still there, through the launcher's store."""
    store, rank, ranks = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    try:
        store.set(f"qcompile/alive/{rank}", "yes")
        missing = []
        for other in range(ranks):
            try:
                store.wait([f"qcompile/alive/{other}"], timedelta(seconds=_GRACE))
            except RuntimeError:
                missing.append(f"rank {other}")
    except RuntimeError:
        return f"rank {rank} lost the launcher, and with it the others"
    lost = (
        f"{shortened(missing)} is gone or does not answer"
        if missing
        else "all ranks are there, but do not understand each other"
    )
    return f"rank {rank} of {ranks} cannot go on, since {lost}"
