"""Damage of any kind to config, index and header: an error that qcompile explains, or a model; nothing else."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quantize_linears, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import qcompile
from qcompile.errors import QcompileError

FORMATS = ("compressed-tensors", "gptq", "awq", "modelslim")
SECONDS, BYTES = 60, 2**30  # that one attempt may take; the files have 100 kB, and torch's own threads some stacks

NUMBERS = st.one_of(
    st.integers(-2, 5),
    st.sampled_from([8, 31, 32, 33, 127, 128, 256, 2**31, 2**32 + 1, 2**53, 2**63 - 1, 2**64, 10**30, -(2**63)]),
)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=8),
        st.sampled_from(["re:(", "Linear", "I32", "F8_E4M3", "int", "float", "group", "fp8", "gptq", "../x", "W8A8"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A small checkpoint in every format, and a place for damaged copies."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("fuzz")
    model = quantize_linears(tiny_model(dtype=torch.float16), "w4a16_g32")
    for format in FORMATS:
        qcompile.save(model, root / format, format=format)
    return {format: root / format for format in FORMATS}


@contextlib.contextmanager
def damaged(folder: Path) -> Iterator[Path]:
    """A copy to be damaged; what is done with it has limits in time and memory, and may raise what is explained."""
    copied = Path(shutil.copytree(folder, folder.with_name("damaged"), dirs_exist_ok=False))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def stop(*_: object) -> None:
        raise TimeoutError(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, hard))
    try:
        with contextlib.suppress(QcompileError):
            yield copied
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(copied)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a JSON value."""
    found = []
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *places(value[key])]
    return found


def damage(draw: Any, value: Any) -> Any:
    """A copy of a JSON value in which one to three places hold something else, or nothing."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        if found := places(value):
            container, key = found[draw(st.integers(0, len(found) - 1))]
            if draw(st.booleans()) and draw(st.booleans()):
                del container[key]
            else:
                container[key] = draw(VALUES)
    return value


def section_file(folder: Path) -> Path:
    description = folder / "quant_model_description.json"
    return description if description.exists() else folder / "config.json"


FUZZ = settings(max_examples=20, deadline=None)


@pytest.mark.parametrize("format", FORMATS)
@FUZZ
@given(data=st.data())
def test_any_quantization_section(format, folders, data):
    with damaged(folders[format]) as folder:
        file = section_file(folder)
        config = json.loads(file.read_text())
        section = config.get("quantization_config", config)
        changed = damage(data.draw, section)
        file.write_text(json.dumps(changed if section is config else config | {"quantization_config": changed}))
        qcompile.load(folder, progress=False)


@FUZZ
@given(data=st.data())
def test_any_config(folders, data):
    with damaged(folders["compressed-tensors"]) as folder:
        config = damage(data.draw, json.loads((folder / "config.json").read_text()))
        (folder / "config.json").write_text(json.dumps(config))
        qcompile.load(folder, progress=False)


@FUZZ
@given(data=st.data())
def test_any_index(folders, data):
    with damaged(folders["modelslim"]) as folder:
        (index,) = folder.glob("*.index.json")
        index.write_text(json.dumps(damage(data.draw, json.loads(index.read_text()))))
        qcompile.load(folder, progress=False)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
@FUZZ
@given(data=st.data())
def test_any_header(format, folders, data):
    """Entries of the header are damaged; or bytes of it; or its length."""
    with damaged(folders[format]) as folder:
        file = folder / "model.safetensors"
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header, rest = raw[8 : 8 + length], raw[8 + length :]
        kind = data.draw(st.sampled_from(["entries", "bytes", "length", "cut"]))
        if kind == "entries":
            header = json.dumps(damage(data.draw, json.loads(header))).encode()
            length = len(header)
        elif kind == "bytes":
            start = data.draw(st.integers(0, length - 1))
            header = header[:start] + data.draw(st.binary(min_size=1, max_size=4)) + header[start + 4 :]
        elif kind == "length":
            length = data.draw(st.integers(0, 2**64 - 1) | st.integers(0, 2 * length))
        else:
            rest = rest[: data.draw(st.integers(0, len(rest)))]
        file.write_bytes(length.to_bytes(8, "little") + header + rest)
        qcompile.load(folder, progress=False)
