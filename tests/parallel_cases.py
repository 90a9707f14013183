"""What a rank does in the tests of ``qcompile.parallel``; ``torchrun`` starts it with the cases as arguments.

Every case prints one line of JSON per rank: what it found. One start serves many cases, since starting takes seconds.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import tiny_model
from moe_models import FAMILIES, tiny_moe
from torch.distributed.device_mesh import init_device_mesh

import qcompile
from qcompile.modules import quantized_modules
from qcompile.planning import find_backend
from qcompile.storage import Folder
from qcompile.trace import trace
from qcompile.types import Plan, PlannedSite

IDS = torch.arange(3, 51).view(2, 24)


def model_of(family: str):
    torch.manual_seed(0)
    return (tiny_moe if family in FAMILIES else tiny_model)(family, torch.float32)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits.float()


def difference(found, wanted) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def checkpoint(mesh, path: str, ep: str = "") -> dict:
    """Load a checkpoint whole and divided: logits, generated tokens, bytes read, and the kinds of shares."""
    whole = qcompile.load(path, dtype=torch.float32)
    wanted, tokens = logits(whole), generated(whole)
    held_whole = nbytes(whole)
    del whole
    read: dict[str, int] = {}
    leave = Folder.__exit__

    def leaving(folder: Folder, *error: object) -> None:
        read.update(bytes=folder.bytes_read, size=folder.size[1])
        leave(folder, *error)

    Folder.__exit__ = leaving  # type: ignore[method-assign]
    try:
        model = qcompile.load(path, dtype=torch.float32, mesh=mesh, ep=int(ep) if ep else None)
    finally:
        Folder.__exit__ = leave  # type: ignore[method-assign]
    plan = qcompile.report(model).plan
    return {
        "error": difference(logits(model), wanted),
        "tokens": torch.equal(generated(model), tokens),
        "read": read["bytes"],
        "size": read["size"],
        "held": nbytes(model),
        "held_whole": held_whole,
        "planned": plan.bytes_after,
        "reasons": [planned.reason for planned in plan],
    }


def stored(mesh, path: str, name: str, ep: str = "") -> dict:
    """A float checkpoint of transformers, whose experts are stored one by one, in parts of what a model holds."""
    if dist.get_rank() == 0:
        model_of(name).save_pretrained(path)
    dist.barrier()
    return checkpoint(mesh, path, ep)


def generated(model):
    return model.generate(IDS[:1, :8], max_new_tokens=6, do_sample=False)


def nbytes(model) -> int:
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def family(mesh, name: str, scheme: str, ep: str = "") -> dict:
    """Divide a model in memory, float ("float") or rounded to nearest."""
    from qcompile.parallel.applying import divide
    from qcompile.parallel.ranks import ranks_of
    from qcompile.parallel.sharding import local_plan, shard

    model = model_of(name)
    traced = trace(model)
    if scheme == "float":
        sites = tuple(PlannedSite(s, None, "float", bytes_after=s.float_bytes) for s in traced.sites)
        plan = Plan("cpu", sites)
    else:
        needs_data = "static" in scheme or "clip" in scheme
        qcompile.quantize(model, scheme, data=IDS.repeat(2, 2) if needs_data else None, rare_experts="rtn")
        plan = qcompile.report(model).plan
    wanted, backend = logits(model), find_backend("cpu")
    sharding = shard(plan, traced, model, backend, mesh.size(), int(ep) if ep else None)
    ranks = ranks_of(mesh, sharding.tp, sharding.ep)
    divide(model, local_plan(plan, sharding, backend, ranks.rank), sharding, ranks)
    return {"error": difference(logits(model), wanted), "kinds": sorted({s.kind for s in sharding.sites.values()})}


def calibrated(mesh, name: str, method: str, scheme: str) -> dict:
    """Quantize on one rank and on all of them."""
    data = torch.randint(3, 150, (7, 64), generator=torch.Generator().manual_seed(3))
    config = {"method": method, "scheme": scheme}
    alone = qcompile.quantize(model_of(name), config, data=data, rare_experts="rtn")
    together = qcompile.quantize(model_of(name), config, data=data, rare_experts="rtn", mesh=mesh)
    site = next(name for name in quantized_modules(together) if name.endswith("q_proj"))
    whole, part = (quantized_modules(model)[site].packed() for model in (alone, together))
    rows = slice(mesh.get_local_rank() * part.shape[0], (mesh.get_local_rank() + 1) * part.shape[0])
    alike = torch.equal(whole.codes[rows], part.codes) and torch.equal(whole.scales[rows], part.scales)
    return {"error": difference(logits(together), logits(alone)), "alike": alike}


def copies(mesh, path: str) -> dict:
    """Two copies of one rank each that deal the experts to both, and have different tokens."""
    whole = qcompile.load(path, dtype=torch.float32)
    ids = IDS[:, : 5 + 9 * dist.get_rank()]
    wanted = logits(whole, ids)
    mesh = init_device_mesh("cpu", (mesh.size(), 1), mesh_dim_names=("copies", "tp"))
    model = qcompile.load(path, dtype=torch.float32, mesh=mesh)
    return {"error": difference(logits(model, ids), wanted), "held": nbytes(model), "held_whole": nbytes(whole)}


def compiled(mesh, path: str) -> dict:
    """A divided model through ``torch.compile``: collectives are operations of its graph."""
    model = qcompile.load(path, dtype=torch.float32, mesh=mesh)
    wanted, tokens = logits(model), generated(model)
    fast = torch.compile(model, backend="qcompile")
    found = logits(fast)
    return {
        "error": difference(found, wanted),
        "tokens": torch.equal(fast.generate(IDS[:1, :8], max_new_tokens=6, do_sample=False), tokens),
        "graphs": len(qcompile.report(model).graphs),
    }


def refused(mesh, path: str, ep: str = "") -> dict:
    """The error of a load."""
    try:
        qcompile.load(path, mesh=mesh, ep=int(ep) if ep else None)
    except qcompile.QcompileError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": ""}


def lost(mesh, path: str) -> dict:
    """The last rank dies while the others need it."""
    model = qcompile.load(path, dtype=torch.float32, mesh=mesh)
    if dist.get_rank() == mesh.size() - 1:
        os._exit(9)
    logits(model)
    return {}


CASES = {f.__name__: f for f in (checkpoint, stored, family, calibrated, copies, compiled, refused, lost)}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for case in sys.argv[1:]:
        name, *arguments = case.split("|")
        found = CASES[name](mesh, *(a.format(rank=dist.get_rank()) for a in arguments))
        folder = Path(os.environ["FOUND"])
        with (folder / f"{dist.get_rank()}.jsonl").open("a") as file:
            file.write(json.dumps({"case": case, **found}) + "\n")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
