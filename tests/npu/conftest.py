"""The device, and how its results are compared: up to the order of sums on a pretend one, in a table on a chip."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from npu_library import define
from torch import Tensor

ON_CHIP = os.environ.get("QCOMPILE_NPU") == "chip"
BOUND = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-3}  # of the norm of the difference, on a chip
ORDER = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}  # the same where sums have another order


@dataclass(frozen=True)
class Difference:
    """What a chip computed against the reference numerics."""

    name: str
    norm: float  # of the difference over that of the reference
    largest: float
    bound: float

    def __str__(self) -> str:
        verdict = "" if self.norm <= self.bound else "  <-- beyond its bound"
        return f"{self.name:80} {self.norm:9.2e} {self.largest:9.2e} {self.bound:9.2e}{verdict}"


_DIFFERENCES: list[Difference] = []


@pytest.fixture(scope="session", autouse=True)
def device():
    """The pretend NPU, or None on a chip."""
    define()  # the reference numerics as CPU kernels of torch_npu's operators
    if ON_CHIP:
        return None
    import aten_operations  # noqa: F401  (what the pretend NPU can compute)
    import npu_operations  # noqa: F401
    from pretend import Device

    return Device()


@pytest.fixture
def calls(device):
    """The aclnn calls of this test so far; nothing on a chip."""
    if device is None:
        pytest.skip("a chip does not say what it was asked for")
    device.calls.clear()
    return device.calls


@pytest.fixture
def compare(request):
    """``compare(actual, expected, what="")``: the same numbers; on a chip within a bound, and listed."""

    def check(actual: Tensor, expected: Tensor, what: str = "") -> None:
        actual = actual.cpu()
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        difference = actual.double() - expected.double()
        if not ON_CHIP:  # the same functions on the same numbers, but strides and alignment choose how sums are made
            allowed = ORDER.get(expected.dtype, 0) * expected.double().norm()
            assert (difference.norm() <= allowed).item(), (what, difference.abs().max().item())
            return
        largest = difference.abs().max().item() if difference.numel() else 0.0
        if expected.is_floating_point():
            norm, bound = (difference.norm() / expected.double().norm()).item(), BOUND[expected.dtype]
        else:  # codes of either side of a tie
            norm, bound = largest, 1.0
        name = request.node.nodeid.rpartition("/")[2]
        _DIFFERENCES.append(found := Difference(f"{name} {what}".strip(), norm, largest, bound))
        assert found.norm <= found.bound, str(found)

    return check


def pytest_terminal_summary(terminalreporter):
    if ON_CHIP:
        different = sorted((d for d in _DIFFERENCES if d.largest), key=lambda d: -d.norm / d.bound)
        terminalreporter.section("what the chip computed, against the reference numerics")
        terminalreporter.write_line(f"{len(_DIFFERENCES) - len(different)} of {len(_DIFFERENCES)} results are equal")
        terminalreporter.write_line(f"{'':80} {'norm':>9} {'largest':>9} {'bound':>9}")
        for difference in different:
            terminalreporter.write_line(str(difference))
