"""Random canonical weights, single sites as they are stored, and checkpoints that other tools wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qcompile import numerics
from qcompile.formats import Format, StoredSite, TensorHeader
from qcompile.storage import DTYPES
from qcompile.types import PackedWeight, Scheme

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def golden(case: str) -> Path:
    """The folder of a checkpoint that another tool wrote."""
    if not (GOLDEN / case).is_dir():
        pytest.skip(f"the golden checkpoint {case} is not on this machine (looked in {GOLDEN})")
    return GOLDEN / case


def random_packed(
    scheme: Scheme, out: int, inn: int, *, permuted: bool = False, smallest_zero: int = 0, dtype=torch.float16
) -> PackedWeight:
    """Any canonical weight: all codes, negative and zero scales, all zero points from ``smallest_zero``."""
    weight = scheme.weight
    codes = torch.randint(0, 2**weight.bits, (out, inn)).to(torch.uint8)
    scales = torch.randn(out, weight.groups(inn)).to(dtype)
    scales[0] = 0
    zeros = None
    if not weight.symmetric:
        zeros = torch.randint(smallest_zero, 2**weight.bits, scales.shape).to(torch.uint8)
    permutation = None
    if permuted:
        groups = torch.arange(inn) // (weight.group_size or inn)
        permutation = torch.argsort(groups[torch.randperm(inn)], stable=True).to(torch.int32)
    return PackedWeight(scheme, (out, inn), numerics.pack_codes(codes, weight.bits), scales, zeros, permutation)


def described(
    format: Format, tensors: dict[str, torch.Tensor], shape: tuple[int, int], section: dict
) -> tuple[StoredSite, ...]:
    """The sites that config and headers make of the tensors of the Linear "m" of that shape."""
    headers = {n: TensorHeader(n, _NAMES[t.dtype], tuple(t.shape), "model.safetensors") for n, t in tensors.items()}
    assert format.detect({"quantization_config": section}, headers)
    return format.sites({"quantization_config": section}, headers, {"m": shape, "lm_head": (8, 8)})


def written(format: Format, packed: PackedWeight) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and configuration of a model whose one quantized Linear is "m"."""
    tensors = format.write("m", packed)
    layout = {"permuted": packed.permutation is not None}
    site = StoredSite("m", packed.scheme, packed.shape, tuple(tensors), layout)
    return tensors, json.loads(json.dumps(format.quantization_config([site], ["lm_head"])))


def round_trip(format: Format, packed: PackedWeight) -> PackedWeight:
    """What is read of what was written."""
    assert not format.refuses(packed.scheme, packed.shape, packed)
    tensors, section = written(format, packed)
    (site,) = described(format, tensors, packed.shape, section)
    assert set(site.tensors) == set(tensors)
    return format.read(site, tensors.__getitem__)


def assert_same(actual: PackedWeight, expected: PackedWeight) -> None:
    """Every tensor is equal, bit for bit."""
    assert actual.scheme == expected.scheme
    assert actual.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        assert torch.equal(tensor, actual.tensors()[name]), name


def change(folder: Path, edit) -> None:
    """Let ``edit`` change the dict of a folder's tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes) -> None:
    """Change the quantization section of config.json; None removes a key."""
    config = json.loads((folder / "config.json").read_text())
    section = config["quantization_config"] | changes
    config["quantization_config"] = {key: value for key, value in section.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
