"""What torch_npu asks of the device for each scheme, held to lists that were read once and are committed (snapshots/).

UPDATE_SNAPSHOTS=1 in the environment writes them anew.
"""

import pytest
import torch
from npu_cases import HALF, routed
from npu_modules import LoweredExperts, LoweredLinear
from snapshot import matches

LINEARS = (
    "w4a16_g32_asym", "w4a16", "w8a16", "w8a8", "w8a8_static", "w8a8_static_sym", "w4a8", "w4a8_g256", "w4a8_clip",
    "w4a4", "w4a8_g128",
)  # fmt: skip
EXPERTS = ("w4a16_g32", "w4a16_asym", "w8a16", "w8a8", "w8a8_static", "w4a8", "w4a8_g256", "w4a8_clip", "w4a4")


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("scheme", LINEARS)
def test_of_a_linear(scheme, dtype, calls):
    linear, x = LoweredLinear(scheme, dtype, "npu"), torch.randn(5, 256).to(dtype).npu()
    calls.clear()
    linear(x)
    assert matches("linear", f"{scheme} {str(dtype).removeprefix('torch.')}", calls)


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("scheme", EXPERTS)
def test_of_experts(scheme, dtype, calls):
    experts = LoweredExperts(scheme, dtype, "npu")
    (ids, routing), x = routed(5), torch.randn(5, 256).to(dtype).npu()
    ids, routing = ids.npu(), routing.npu()
    calls.clear()
    experts(x, ids, routing)
    assert matches("experts", f"{scheme} {str(dtype).removeprefix('torch.')}", calls)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a4", "w4a16_g32"])
def test_nothing_is_copied_or_cast_on_the_way_to_a_product(scheme, calls):
    """Weights are stored as the operation reads them: in its layout, its format and its dtypes."""
    linear, x = LoweredLinear(scheme, torch.bfloat16, "npu"), torch.randn(5, 256).bfloat16().npu()
    calls.clear()
    linear(x)
    copied = [str(call) for call in calls if "Copy" in call.name or "Cast" in call.name or call.name == "Identity"]
    assert len(copied) == (1 if scheme == "w4a8" else 0)  # its activations, which the operation overwrites
