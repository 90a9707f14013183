"""Checkpoints on several ranks of this machine beside one: logits, tokens, bytes read, and memory.

    torchrun --nproc-per-node 2 benchmarks/parallel_table.py FOLDER ... [--ep 2]

Prints a table in Markdown: the relative difference of logits (in the dtype of the checkpoint) from those of one rank,
whether 8 greedy tokens are equal, what all ranks read together of what is stored, the bytes that a rank holds, and by
how much its memory rose at most while it loaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import qcompile
from qcompile import checkpoint
from qcompile.errors import QcompileError
from qcompile.storage import Folder

READ: dict[str, int] = {}


class CountedFolder(Folder):
    """Remembers what was read when it is closed."""

    def __exit__(self, *error: object) -> None:
        READ.update(bytes=self.bytes_read, size=self.size[1])
        super().__exit__(*error)


def memory(key: str) -> int:
    """VmRSS (now) or VmHWM (the most since it was reset) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def results(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two sequences, and eight tokens after a prompt."""
    ids = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits.float(), model.generate(ids[:1, :8], max_new_tokens=8, do_sample=False)  # type: ignore[operator]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--ep", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    checkpoint.Folder = CountedFolder  # type: ignore[misc]
    say = print if dist.get_rank() == 0 else lambda *_, **__: None
    say("| checkpoint | difference | tokens | read | a rank holds | memory rose by |\n|---|---|---|---|---|---|")
    for folder in options.folders:
        try:
            wanted, tokens = results(qcompile.load(folder, progress=False))
            Path("/proc/self/clear_refs").write_text("5")  # the most is counted from here
            before = memory("VmRSS")
            model = qcompile.load(folder, mesh=mesh, ep=options.ep, progress=False)
        except QcompileError as error:  # on all ranks alike
            say(f"| {folder.name} | {error} |")
            continue
        rose = memory("VmHWM") - before
        found, made = results(model)
        read = torch.tensor([READ["bytes"]])
        dist.all_reduce(read)
        held = {id(t): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
        difference = ((found - wanted).norm() / wanted.norm()).item()
        say(
            f"| {folder.name} | {difference:.1e} | {'equal' if torch.equal(made, tokens) else 'differ'} | "
            f"{read.item() / READ['size']:.2f} x | {sum(held.values()) / 1e6:.1f} MB | {rose / 1e6:.1f} MB |",
            flush=True,
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
