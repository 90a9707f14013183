"""Which launches overlap (programmatic dependent launch); what the code does about it is in ``test_cuda_sass.py``."""

import importlib.util

import pytest
import torch
from cuda_cases import expert_layer, kernel_for, packed_weight, quantized

from qcompile.backends.cuda import targets
from qcompile.types import Scheme

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize(("gpu", "can"), [("sm_80", False), ("sm_89", False), ("sm_90", True), ("sm_100", True),
                                          ("sm_120", True), ("gfx942", False)])  # fmt: skip
def test_they_do_where_a_gpu_can(gpu, can, monkeypatch):
    from qcompile.backends.cuda.device import launch

    monkeypatch.setattr(launch, "_attached", lambda index: targets.parse(gpu))
    expected = {"PDL": True, "launch_pdl": True} if can else {"PDL": False}  # AMD's compiler knows no launch_pdl
    assert launch.overlap(torch.device("cuda", 0)) == expected
    assert launch.overlap(torch.device("cpu")) == {"PDL": False}
    monkeypatch.setattr(launch, "OVERLAP", False)
    assert launch.overlap(torch.device("cuda", 0)) == {"PDL": False}


class Launched:
    """In the place of a kernel: keeps what it is launched with."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.calls.append(options)


@pytest.fixture
def launched(monkeypatch) -> dict[str, Launched]:
    """Every product, on a GPU whose launches overlap."""
    from qcompile.backends.cuda.device import launch, launch_experts

    monkeypatch.setattr(launch, "overlap", lambda device: {"PDL": True, "launch_pdl": True})
    kernels = {}
    for module, name in ((launch, "float_product"), (launch, "scaled_product"), (launch_experts, "gate_up_kernel"),
                         (launch_experts, "down_kernel"), (launch_experts, "sum_pairs")):  # fmt: skip
        kernels[name] = Launched()
        monkeypatch.setattr(module, name, kernels[name])
    return kernels


def test_every_product_is_told(launched):
    from qcompile.backends.cuda.device import launch, launch_experts

    x = torch.randn(3, 128).bfloat16()
    for name in ("w4a16_g64", "w8a8"):
        packed = packed_weight(Scheme.parse(name), (64, 128), torch.bfloat16)
        codes, scales = kernel_for(packed.scheme, "sm_90").prepare(packed)
        if name == "w8a8":
            parts = quantized(x, packed)
            launch.scaled_linear(*parts, codes, scales, None, None, "int8", 0, 1, False, 64, 0, x.dtype)
        else:
            launch.float_linear(x, codes, scales, None, None, 4, True, 64, True, 64, 0)
    layer = expert_layer("w8a8", (4, 2, 128, 64), torch.bfloat16, "sm_90")
    ids, kernel = torch.zeros(3, 2, dtype=torch.int64), kernel_for(layer.scheme, "sm_90", experts=4)
    given = (ids, ids, ids, layer.tensors[0], layer.scheme, kernel)
    rows = launch_experts.gate_up(quantized(x, layer.up), *given, 64, "silu", x.dtype)
    given = (ids, ids, ids, ids, layer.tensors[1], layer.scheme, kernel)
    launch_experts.down(quantized(rows, layer.down), *given, 128, 0, x.dtype)
    for name, kernel in launched.items():
        assert [call["PDL"] and call["launch_pdl"] for call in kernel.calls] == [True], name
