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
    scheme: Scheme | str,
    out: int,
    inn: int,
    *,
    permuted: bool = False,
    smallest_zero: int = 0,
    dtype: torch.dtype = torch.float16,
) -> PackedWeight:
    """Any canonical weight: all codes, negative and zero scales, all zero points from ``smallest_zero``."""
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    weight, activation = scheme.weight, scheme.activation
    codes = torch.randint(0, 2**weight.bits, (out, inn)).to(torch.uint8)
    if weight.number in ("fp8", "mxfp8"):
        codes = torch.where(codes & 0x7F == 0x7F, torch.zeros_like(codes), codes)  # the NaN of e4m3
    shape = (weight.scale_rows(out), weight.groups(inn))
    if weight.number in ("mxfp4", "mxfp8"):
        scales = torch.randint(100, 150, shape).to(torch.uint8).view(torch.float8_e8m0fnu)
    else:
        scales = torch.randn(shape).to(torch.float8_e4m3fn if weight.number == "nvfp4" else dtype)
        scales[0] = 0
    zeros = None
    if not weight.symmetric:
        zeros = torch.randint(smallest_zero, 2**weight.bits, scales.shape).to(torch.uint8)
    permutation = None
    if permuted:
        groups = torch.arange(inn) // (weight.group_size or inn)
        permutation = torch.argsort(groups[torch.randperm(inn)], stable=True).to(torch.int32)
    params = {
        "input_scale": torch.rand(1) + 0.01,
        "input_zero": torch.randint(-128, 128, (1,)).to(torch.int32),
        "alpha": torch.rand(1),
    }
    return PackedWeight(
        scheme,
        (out, inn),
        numerics.pack_codes(codes, weight.bits),
        scales,
        zeros,
        permutation,
        outer=torch.rand(1) * 1000 + 1 if weight.number == "nvfp4" else None,
        **{name: params[name] for name in (activation.params if activation else ())},
    )


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
    stored, wanted = (each.tensors() | each.activation_tensors() for each in (actual, expected))
    assert stored.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(bits_of(tensor), bits_of(stored[name])), name


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor, so that any two can be compared."""
    return tensor.contiguous().view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


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
