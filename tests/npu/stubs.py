"""Builds the libraries of Ascend's CANN toolkit that torch_npu is linked to, so that it runs on a machine without one.

Nothing of CANN is used. Which libraries and which symbols are wanted is read from the files of the installed torch_npu;
cann/runtime.cpp and cann/opapi.c define those that have to do something, and all others return 0. Needs g++ and nm,
readelf of binutils. ``python stubs.py FOLDER``: some seconds.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SYSTEM = ("libc.so.6", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2", "librt.so.1")
OPERATION = re.compile(rb"(aclnn[A-Z]\w+)GetWorkspaceSize")
LOOKED_UP = re.compile(rb"acl(?:rt|mdl|op|prof)?[A-Z][A-Za-z0-9]+")
OF_OPERATIONS = ("aclnn", "aclCreate", "aclDestroy", "aclGetViewShape")  # in libopapi.so
NOT_THERE = {  # without them torch_npu does what it does with an older CANN, which needs no answers from the runtime
    "aclrtGetErrorVerbose", "aclrtGetLastError", "aclrtPeekAtLastError", "aclrtDeviceGetUuid", "aclrtGetMemUsageInfo",
    "aclrtGetDeviceUtilizationRate", "aclrtGetPrimaryCtxState", "aclsysGetVersionStr", "aclGetCannAttribute",
    "aclGetCannAttributeList", "aclrtGetResInCurrentThread", "aclrtGetStreamResLimit", "aclrtGetDeviceResLimit",
    "aclrtMemcpyBatchAsync", "aclrtMemcpyBatch", "aclrtMallocHostWithCfg", "aclrtMallocPhysical",
    "aclrtReserveMemAddress",
}  # fmt: skip


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is not installed in {sys.prefix}")
    return Path(spec.origin).parent


def symbols(library: Path, kind: str) -> set[str]:
    """Names that a library defines ("--defined-only") or wants ("--undefined-only"), without weak ones."""
    found = set()
    for line in run("nm", "-D", kind, library).splitlines():
        *_, letter, name = line.split()
        if letter not in "wv" or kind == "--defined-only":
            found.add(name.partition("@")[0])
    return found


def wanted_libraries(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", library)))


def definition(symbol: str) -> str:
    """A function that returns 0; a constructor of the graph engine makes an object of zeros (a null pointer)."""
    if symbol.startswith("_ZN2ge") and ("C1E" in symbol or "C2E" in symbol):
        return f"void {symbol}(void *made) {{ memset(made, 0, 16); }}"
    return f"long {symbol}(void) {{ return 0; }}"


def build(folder: Path) -> None:
    """Write the libraries into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    own = [*package("torch_npu").rglob("*.so")]
    others = [*(package("torch") / "lib").glob("*.so*")]
    system = [Path(run("g++", f"-print-file-name={name}").strip()) for name in SYSTEM]
    there = {file.name for file in (*own, *others)} | {*SYSTEM, "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    defined = set().union(*(symbols(file, "--defined-only") for file in (*own, *others, *system) if file.is_absolute()))
    code = next(file for file in own if file.name == "libtorch_npu.so").read_bytes()
    looked_up = {name.decode() for name in re.findall(rb"\w{5,80}", code) if LOOKED_UP.fullmatch(name)}
    wanted = {name for name in looked_up - NOT_THERE if not name.startswith(OF_OPERATIONS)}
    for file in own:
        wanted |= {name for name in symbols(file, "--undefined-only") if not name.startswith(("Py", "_Py"))}

    _build_runtime(folder, wanted - defined)
    empty = folder / "empty.c"
    empty.write_text("/* nothing */\n")
    for name in set().union(*map(wanted_libraries, own)) - there - {"libascendcl.so"}:
        # each finds everything in libascendcl.so, whichever of them torch_npu looks a symbol up in
        run("gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-Wl,--no-as-needed", empty, f"-L{folder}", "-lascendcl",
            "-Wl,-rpath,$ORIGIN", "-o", folder / name)  # fmt: skip
    _build_operations(folder, {name.decode() for name in OPERATION.findall(code)})


def _build_runtime(folder: Path, wanted: set[str]) -> None:
    written = folder / "runtime.o"
    run("g++", "-c", "-fPIC", "-O1", "-w", HERE / "cann" / "runtime.cpp", "-o", written)
    has = {line.split()[-1] for line in run("nm", "--defined-only", written).splitlines()}
    rest = folder / "rest.c"
    rest.write_text("#include <string.h>\n" + "\n".join(map(definition, sorted(wanted - has))))
    run("gcc", "-c", "-fPIC", "-w", rest, "-o", folder / "rest.o")
    run("g++", "-shared", "-Wl,-soname,libascendcl.so", written, folder / "rest.o", "-o", folder / "libascendcl.so")


def _build_operations(folder: Path, names: set[str]) -> None:
    source = folder / "opapi.c"
    source.write_text(
        (HERE / "cann" / "opapi.c").read_text() + "\n" + "\n".join(f"OPERATION({name})" for name in sorted(names))
    )
    run("gcc", "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libopapi.so", f"-I{HERE / 'cann'}", source, f"-L{folder}",
        "-lascendcl", "-Wl,-rpath,$ORIGIN", "-o", folder / "libopapi.so")  # fmt: skip


if __name__ == "__main__":
    build(Path(sys.argv[1]))
