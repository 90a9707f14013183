"""Checkpoints that other projects' tools wrote: weights bit for bit, logits, and what happens to them when saved.

Weights must be equal after one rounding to the peer's dtype, in which it multiplies. Logits are compared twice where
activations are quantized: ours with the peer's, and those of the peer's own arithmetic on what we have read. The models
are tiny and random, so that one step of a rounded activation shows in the logits; the second comparison tells that from
a wrong scale or zero point.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from helpers import logits, relative_error
from safetensors.torch import load_file
from stored import bits_of, golden
from torch import Tensor
from torch.nn import functional as F

import qcompile
from qcompile import numerics
from qcompile.errors import UnsupportedError
from qcompile.formats._groups import describe
from qcompile.modules import QuantWeight, quantized_modules
from qcompile.types import PackedWeight


@dataclass(frozen=True)
class Case:
    """format: the one to save in; logits: relative error that the peer's precision explains, None without a forward.

    dtype: to load in (default: as stored). imitated: the peer's arithmetic, whose logits are equal up to the order of
    sums. converts: the other formats that can hold it. rounded: relative error of weights whose scale is stored as a
    product only, which was rounded to bfloat16.
    """

    format: str
    logits: float | None
    dtype: torch.dtype | None = None
    imitated: Callable[[Tensor, PackedWeight], Tensor] | None = None
    converts: tuple[str, ...] = ()
    rounded: float = 0.0


def llm_compressor(x: Tensor, packed: PackedWeight) -> Tensor:
    """Activations as its own package imitates their quantization, in the dtype of the model."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    if packed.scheme.activation is None:
        return x
    arguments = describe(packed.scheme, False, [])["input_activations"]
    module = SimpleNamespace(quantization_status=QuantizationStatus.FROZEN)
    if packed.input_scale is not None:
        is_global = packed.scheme.weight.number == "nvfp4"
        scale = packed.input_scale if is_global else packed.input_scale.to(x.dtype)
        setattr(module, "input_global_scale" if is_global else "input_scale", scale)
    return forward_quantize(module, x, "input", QuantizationArgs.model_validate(arguments))


def int8_with_zero_point(x: Tensor, packed: PackedWeight) -> Tensor:
    """Old versions of msmodelslim imitate symmetric activations by asymmetric ones, in float32."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-128 - low / scale)
    return ((torch.round(x / scale) + zero).clamp(-128, 127) - zero) * scale


HALF = torch.float16
CT, V1, V2, AWQ, MSM = TARGETS = ("compressed-tensors", "gptq", "gptq_v2", "awq", "modelslim")
CASES = {
    "ar-autoround-w4-g128-sym": Case(V1, 0.005, HALF, converts=(CT, V2, AWQ, MSM)),
    "awq-gemm-w4-g128-asym": Case(AWQ, 0.005, converts=(CT, V1, V2, MSM)),
    "awq-gemm-w4-g32-asym-moe": Case(AWQ, 0.005, converts=(CT, V1, V2, MSM)),
    "awq-gemv-w4-g64-asym": Case(AWQ, 0.005, converts=(CT, V1, V2, MSM)),
    "awq-gemvfast-w4-g128-asym": Case(AWQ, 0.005, converts=(CT, V1, V2, MSM)),
    "ct-fp8-static": Case(CT, 0.15, imitated=llm_compressor),
    "ct-mixed-w4-attn-w8-mlp": Case(CT, 0.1, imitated=llm_compressor, converts=(MSM,)),
    "ct-mxfp4": Case(CT, 0.6, imitated=llm_compressor, converts=(MSM,)),
    "ct-nvfp4": Case(CT, 0.35, imitated=llm_compressor),
    "ct-w4a16-asym-g128-awq": Case(CT, 0.02, imitated=llm_compressor, converts=(V1, V2, AWQ, MSM)),
    "ct-w4a16-sym-g128-gptq-actorder-group": Case(CT, 0.02, imitated=llm_compressor, converts=(V1, V2)),
    "ct-w4a16-sym-g128-rtn": Case(CT, 0.02, imitated=llm_compressor, converts=(V1, V2, AWQ, MSM)),
    "ct-w4a8-int-g128": Case(CT, 0.1, imitated=llm_compressor, converts=(MSM,)),
    "ct-w8a8-int8-dynamic-smoothquant-gptq-moe": Case(CT, 0.1, converts=(MSM,)),
    "ct-w8a8-int8-static": Case(CT, 0.15, imitated=llm_compressor, converts=(MSM,)),
    "gptq-v1-w3-g128-sym": Case(V1, 0.005, HALF, converts=(CT, V2)),
    "gptq-v1-w4-dynamic": Case(V1, 0.005, HALF, converts=(CT, V2)),
    "gptq-v1-w4-g128-asym": Case(V1, 0.005, HALF, converts=(CT, V2, AWQ, MSM)),
    "gptq-v1-w4-g128-asym-edgezero": Case(V2, 0.005, HALF, converts=(CT, AWQ, MSM)),  # has zero points of 0
    "gptq-v1-w4-g128-sym": Case(V1, 0.005, HALF, converts=(CT, V2, AWQ, MSM)),
    "gptq-v1-w4-g128-sym-moe": Case(V1, 0.005, HALF, converts=(CT, V2, AWQ, MSM)),
    "gptq-v1-w4-g32-sym-descact": Case(V1, 0.005, HALF, converts=(CT, V2)),
    "gptq-v1-w8-g128-sym": Case(V1, 0.005, HALF, converts=(CT, V2, MSM)),
    "gptq-v2-w4-g128-asym": Case(V2, 0.005, HALF, converts=(CT, V1, AWQ, MSM)),
    "gptqm-awq-gemm-w4-g128-sym": Case(AWQ, 0.02, converts=(CT, V1, V2, MSM)),
    "gptqm-awq-llmawq-w4-g128-asym": Case(AWQ, None, converts=(CT, V1, V2, MSM)),
    "msm-w4a4-dynamic-channel": Case(MSM, 0.65, converts=(CT,)),  # without quantized activations it is 0.71
    "msm-w4a8-dynamic": Case(MSM, None, converts=(CT,)),
    "msm-w8a8-dynamic-moe": Case(MSM, None, converts=(CT,)),
    "msm-w8a8-static": Case(MSM, 0.16, rounded=2**-8, converts=(CT,)),  # without quantized activations it is 0.2
    "msmv0-w8a8-dynamic": Case(MSM, 0.07, imitated=int8_with_zero_point, converts=(CT,)),
}
PARTIAL = ("msm-w8a8-dynamic-moe", "msmv0-w8a8-dynamic")  # whose reference leaves some weights out
EVERY = pytest.mark.parametrize("case", CASES)


def weights(model) -> dict[str, Tensor]:
    """Dequantized weights, exact in float32, by the name of their Linear; of experts, one by one."""
    found = {}
    for name, module in quantized_modules(model).items():
        packed = module.packed()
        weight = numerics.dequantize_packed(dataclasses.replace(packed, scales=packed.scales.float()))
        experts, _, projection = name.rpartition(".")
        for index, own in enumerate(weight if weight.dim() == 3 else ()):
            names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
            chunks = zip(names, own.chunk(len(names)), strict=True)
            found |= {f"{experts}.{index}.{part}.weight": chunk for part, chunk in chunks}
        if weight.dim() == 2:
            found[f"{name}.weight"] = weight
    return found


def stored_tensors(folder) -> dict[str, Tensor]:
    files = [f for f in folder.glob("*.safetensors") if f.name != "reference.safetensors"]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def reference(case: str) -> dict[str, Tensor]:
    return load_file(golden(case) / "reference.safetensors")


@pytest.fixture(scope="module")
def loaded():
    """Every model once; tests leave them as they are."""
    models: dict[str, torch.nn.Module] = {}

    def load(case: str) -> torch.nn.Module:
        if case not in models:
            models[case] = qcompile.load(golden(case), dtype=CASES[case].dtype, progress=False)
        return models[case]

    return load


@EVERY
def test_weights_are_equal_bit_for_bit(case, loaded):
    found = weights(loaded(case))
    expected = {name: tensor for name, tensor in reference(case).items() if name.endswith(".weight")}
    assert expected.keys() <= found.keys()
    assert expected.keys() == found.keys() or case in PARTIAL
    for name, tensor in expected.items() if not CASES[case].rounded else ():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name
    for name, tensor in expected.items():
        assert relative_error(found[name].to(tensor.dtype), tensor) <= CASES[case].rounded, name


@EVERY
def test_logits_are_those_of_the_peer(case, loaded):
    if CASES[case].logits is None:
        pytest.skip("the peer has no forward for it, or one that only its own arithmetic reproduces")
    expected = reference(case)
    assert relative_error(logits(loaded(case), expected["input_ids"]), expected["logits"]) < CASES[case].logits


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].imitated])
def test_logits_of_the_peers_arithmetic_are_equal(case, loaded, monkeypatch):
    imitated = CASES[case].imitated

    def forward(module: QuantWeight, x: Tensor) -> Tensor:
        packed = module.packed()
        return F.linear(imitated(x, packed), numerics.dequantize_packed(packed, x.dtype), module.bias)

    model, expected = loaded(case), reference(case)
    for kind in {type(module) for module in quantized_modules(model).values()}:
        monkeypatch.setattr(kind, "forward", forward)
    assert relative_error(logits(model, expected["input_ids"]), expected["logits"]) < 5e-3


LEFT_OUT = {  # stored tensors that are not written again, or not as they were, and why
    "ar-autoround-w4-g128-sym": ("g_idx",),  # AutoRound leaves them out
    "gptq-v1-w4-g128-asym-edgezero": ("qzeros",),  # of the other version
    "ct-w4a16-sym-g128-gptq-actorder-group": ("weight_g_idx",),  # one group has no order to keep
}

INEXACT = {"msm-w8a8-static": ".deq_scale"}  # a quotient times its divisor is not always the dividend


@EVERY
def test_saved_files_hold_the_same_tensors(case, loaded, tmp_path):
    """Read, then write: the identity on every tensor of the checkpoint, and the result loads."""
    folder, format = golden(case), CASES[case].format
    qcompile.save(loaded(case), tmp_path / "saved", format=format)
    before, after = stored_tensors(folder), stored_tensors(tmp_path / "saved")
    again = qcompile.load(tmp_path / "saved", dtype=CASES[case].dtype, progress=False)
    for name, weight in weights(loaded(case)).items():
        assert torch.equal(weights(again)[name], weight), name
    if format == "awq" and json.loads((folder / "config.json").read_text())["quantization_config"].get(
        "version", "gemm"
    ).lower() not in ("gemm",):
        return  # other layouts of AWQ are read only
    left_out = LEFT_OUT.get(case, ())
    differing = {name for name in before.keys() ^ after.keys() if not name.endswith(left_out)}
    assert not differing
    for name in before.keys() & after.keys():
        if not name.endswith(left_out):
            old, new = before[name], after[name]
            if CASES[case].dtype or format == "awq":  # float parts and scales in another dtype, of the same value
                old, new = old.to(new.dtype), new
            if name.endswith(INEXACT.get(case, "-")):
                torch.testing.assert_close(new, old, rtol=2**-23, atol=0)
            else:
                assert torch.equal(bits_of(old), bits_of(new)), name


@pytest.mark.parametrize(("case", "target"), [(case, t) for case in CASES for t in TARGETS if t != CASES[case].format])
def test_files_become_another_format_without_loss_or_not_at_all(case, target, loaded, tmp_path):
    if target not in CASES[case].converts:
        with pytest.raises(UnsupportedError, match=rf"cannot be saved as {target}: .*; (use|save as) "):
            qcompile.save(loaded(case), tmp_path / "converted", format=target)
        return
    qcompile.save(loaded(case), tmp_path / "converted", format=target)
    found = weights(qcompile.load(tmp_path / "converted", dtype=CASES[case].dtype, progress=False))
    for name, weight in weights(loaded(case)).items():
        assert torch.equal(found[name], weight), name
