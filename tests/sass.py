"""Compile Triton kernels for NVIDIA GPUs without one, and read what the main loop does.

ptxas, cuobjdump and nvdisasm come with Triton.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")
TENSOR_CORES = ("HGMMA", "HMMA", "IGMMA", "IMMA", "QGMMA", "QMMA")


@dataclass(frozen=True)
class Loop:
    """The main loop of a compiled kernel: instructions by name; and what the whole kernel takes."""

    instructions: int
    names: Counter[str]
    spills: int
    registers: int
    shared: int  # bytes
    kernel: tuple[str, ...]  # every instruction of it, in the order of the code, without variants

    def count(self, *instructions: str) -> int:
        """How many there are, in any variant: "LDG" counts "LDG.E.128" but not "LDGSTS"."""
        return sum(n for name, n in self.names.items() if name.partition(".")[0] in instructions)

    def wide(self, prefix: str) -> int:
        """Those of 128 bits."""
        return sum(n for name, n in self.names.items() if name.startswith(f"{prefix}.") and name.endswith("128"))

    @property
    def tensor_core(self) -> str:
        """Which tensor-core instruction it uses."""
        found = {name.partition(".")[0] for name in self.names if name.startswith(TENSOR_CORES)}
        return "+".join(sorted(found))


def compiled(kernel, capability: int, types: dict[str, str], constants: dict, warps: int, stages: int) -> Loop:
    """The main loop of ``kernel`` for sm_<capability>."""
    made = built(kernel, f"sm_{capability}", types, constants, warps, stages)
    return main_loop(made.asm["cubin"], made.metadata.shared)


def built(kernel, arch: str, types: dict[str, str], constants: dict, warps: int, stages: int):
    """What Triton makes of ``kernel`` for "sm_90", "gfx942" ...: its ``asm`` and ``metadata``.

    Pointers and sizes are multiples of 16, but for the number of rows.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    odd = ("rows", "pairs", "experts", *constants)
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n not in odd}
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    source = ASTSource(kernel, signature, constants, aligned)
    return compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def stack(cubin: bytes) -> int:
    """Bytes of local memory of a thread: what was spilled."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        usage = re.search(r"STACK:(\d+)", _tool("-res-usage", path))
    assert usage, "cuobjdump names no stack"
    return int(usage[1])


def main_loop(cubin: bytes, shared: int) -> Loop:
    """Of all loops that jump back, the one with the most tensor-core instructions; without any, everything."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        found = [(int(m[1], 16), m[2], m[3]) for m in map(LINE.match, _tool("-sass", path).splitlines()) if m]
        usage = re.search(r"REG:(\d+)", _tool("-res-usage", path))
    loops = []
    for address, name, arguments in found:
        target = re.search(r"0x([0-9a-f]+)", arguments)
        if name.startswith("BRA") and target and int(target[1], 16) < address:
            loops.append([i for i in found if int(target[1], 16) <= i[0] <= address])
    loop = max(loops or [found], key=lambda body: sum(name.startswith(TENSOR_CORES) for _, name, _ in body))
    kernel = tuple(name.partition(".")[0] for _, name, _ in found)
    spills = sum(name.startswith(("LDL", "STL")) for _, name, _ in found)
    names = Counter(name for _, name, _ in loop)
    return Loop(len(loop), names, spills, int(usage[1]) if usage else 0, shared, kernel)


def _tool(option: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
