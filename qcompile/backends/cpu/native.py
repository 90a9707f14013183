"""The C++ ops ``torch.ops.qcompile_cpu``: compiled from ``native/`` at first use, cached, loaded.

Libraries are kept in qcompile's cache folder (``cache.py``). They are found there by a hash of the sources, the flags,
the compiler's version and torch's: nothing stale is ever loaded, and processes share what one of them has compiled.

``QCOMPILE_CPU_ISA`` forces an instruction set (one of LEVELS that the CPU has), or "none": no C++ at all. Without it
the best one is taken.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ...cache import CACHE_VARIABLE, cache_folder
from ...errors import ConfigError, UnsupportedError, did_you_mean

LIBRARY = "qcompile_cpu"
ISA_VARIABLE = "QCOMPILE_CPU_ISA"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the ops compute."""

_AVX2 = ("mavx2", "mfma", "mf16c")
_AVX512 = (*_AVX2, "mavx512f", "mavx512dq", "mavx512vl", "mavx512bw", "DQCOMPILE_AVX512")
_VNNI = (*_AVX512, "mavx512vnni", "DQCOMPILE_VNNI")
LEVELS: dict[str, tuple[str, ...]] = {
    "amx": (*_VNNI, "DQCOMPILE_AMX"),  # the tiles themselves are oneDNN's affair
    "avx512_bf16": (*_VNNI, "mavx512bf16", "DQCOMPILE_BF16"),
    "avx512_vnni": _VNNI,
    "avx512": _AVX512,
    "avx2": _AVX2,
}
"""Instruction sets that the sources are written for, best first, with the compiler's flags."""

_FLAGS = ("O3", "std=c++20", "shared", "fPIC", "fopenmp", "fno-math-errno", "ffp-contract=fast", "DNDEBUG", "w")
_SOURCES = Path(__file__).parent / "native"
_LAST_LINES = 15  # of a failing compiler that are shown
_PATIENCE = 600  # seconds to wait for another process that compiles


@functools.cache
def unavailable() -> str:
    """Why the C++ ops cannot be used here; "" once they are loaded. The first call of all compiles them.

    Raises ConfigError or UnsupportedError for an instruction set that the user forces and that is unknown or missing.
    """
    level = instruction_set()
    if level not in LEVELS:
        return level
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        return f"no C++ compiler: {compiler!r} is not found (CXX names another)"
    try:
        torch.ops.load_library(_library(level, compiler))
    except _CompilerError as error:
        print(
            f"qcompile: {compiler} cannot compile its CPU kernels; ATen's are used instead.\n{error}", file=sys.stderr
        )
        return f"{compiler} cannot compile it"
    except OSError as error:
        return f"its library cannot be stored or loaded: {error} ({CACHE_VARIABLE} names another folder)"
    torch.library.register_fake(f"{LIBRARY}::linear", _fake)
    torch.library.register_fake(f"{LIBRARY}::scaled_linear", _fake)
    torch.library.register_fake(f"{LIBRARY}::linears", _fakes)
    torch.library.register_fake(f"{LIBRARY}::scaled_linears", _fakes)
    torch.library.register_fake(f"{LIBRARY}::attend", _fake_attention)
    return ""


def instruction_set() -> str:
    """The one of LEVELS to compile for, or why there is none."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"it is written for x86-64, not {platform.machine()}"
    if sys.platform == "win32":
        return "its C++ needs GCC or Clang, and this is Windows"
    has_avx512 = torch.cpu._is_avx512_supported()
    vnni = has_avx512 and torch.cpu._is_vnni_supported()
    onednn = vnni and torch.backends.mkldnn.is_available()
    present = {
        "amx": onednn and torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": onednn and torch.cpu._is_avx512_bf16_supported(),
        "avx512_vnni": vnni,
        "avx512": has_avx512,
        "avx2": torch.cpu._is_avx2_supported(),
    }
    forced = os.environ.get(ISA_VARIABLE)
    if forced == "none":
        return f"{ISA_VARIABLE} is 'none'"
    if forced:
        if forced not in LEVELS:
            raise ConfigError(f"{ISA_VARIABLE}={forced!r} is unknown.{did_you_mean(forced, [*LEVELS, 'none'])}")
        if not present[forced]:
            raise UnsupportedError(f"{ISA_VARIABLE}={forced!r}, but this CPU does not have it; unset the variable")
        return forced
    return next((level for level in LEVELS if present[level]), "this CPU has neither AVX512 nor AVX2")


class _CompilerError(Exception):
    """What the compiler said last."""


def _library(level: str, compiler: str) -> Path:
    """The compiled library, from the cache or compiled now."""
    from torch.utils._filelock import FileLock

    folder = cache_folder()
    path = folder / f"{LIBRARY}-{level}-{_key(level, compiler)}.so"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=_PATIENCE):
        if not path.is_file():
            print(
                f"qcompile: compiling CPU kernels for {level} (once; about half a minute)", file=sys.stderr, flush=True
            )
            started = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=folder, prefix=f".{path.name}.") as work:
                os.replace(_compile(level, compiler, Path(work)), path)  # whole or not at all
            print(f"qcompile: compiled in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return path


def _key(level: str, compiler: str) -> str:
    """A hash of everything that the library is made of."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [version, torch.__version__, str(torch.version.git_version), *LEVELS[level], *_FLAGS]
    parts += [path.name + path.read_text() for path in sorted(_SOURCES.iterdir())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _compile(level: str, compiler: str, folder: Path) -> Path:
    """Compile and link in ``folder``, with the command that Inductor would use for a library of torch's."""
    from torch._inductor.cpp_builder import BuildOptionsBase, CppBuilder
    from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

    options = BuildOptionsBase(
        compiler=shlex.quote(compiler),
        include_dirs=include_paths(),
        cflags=[*_FLAGS, *LEVELS[level]],
        libraries_dirs=[shlex.quote(TORCH_LIB_PATH)],
        libraries=["torch_cpu", "c10", "gomp"],
    )
    builder = CppBuilder(LIBRARY, shlex.quote(str(_SOURCES / "ops.cpp")), options)
    command = shlex.split(builder.get_command_line())
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).splitlines()
        raise _CompilerError("\n".join(said[-_LAST_LINES:]) or f"it returned {done.returncode} and said nothing")
    return folder / f"{LIBRARY}.so"


def _fake(x, *rest):
    out_features, dtype = rest[-2:]
    return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)


def _fakes(x, *rest):
    *_, out_features, dtype = rest
    return [x.new_empty((*x.shape[:-1], out), dtype=dtype) for out in out_features]


def _fake_attention(q, k, v, *rest):
    batch, heads, rows, _ = q.shape
    return q.new_empty((batch, rows, heads, v.shape[3])).transpose(1, 2)
