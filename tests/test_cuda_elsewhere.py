"""Every kind of kernel compiles for GPUs whose main loop no table describes: AMD's and Blackwell."""

from __future__ import annotations

import importlib.util
import re

import pytest
from cuda_cases import Case, kernel_for

from qcompile.types import Scheme

SHARED = {  # bytes of a block
    "gfx942": 65536,  # LDS of a compute unit, AMD CDNA 3 ISA
    "sm_100": 232448,  # CUDA programming guide, as are the next
    "sm_120": 101376,
}
CORES = {  # by what activations are; instructions of the assembly that Triton writes
    "gfx942": {"bf16": r"v_mfma_f32_\d+x\d+x\d+_bf16", "int8": r"v_mfma_i32_\d+x\d+x\d+_i8"},
    "sm_100": {
        "bf16": r"tcgen05\.mma\S*kind::f16",
        "int8": r"tcgen05\.mma\S*kind::i8",
        "fp8": r"tcgen05\.mma\S*kind::f8f6f4",
    },
    "sm_120": {
        "bf16": r"mma\.sync\S*f32\.bf16\.bf16",
        "int8": r"mma\.sync\S*s32\.s8\.s8",
        "fp8": r"mma\.sync\S*e4m3\.e4m3",
    },
}
STACK = {("sm_100", "w4a8_g128", 1): 8}  # bytes of a thread that are spilled, outside of the loop; elsewhere none

KINDS = [  # scheme, rows or pairs, experts, stored weight, part of a layer of experts
    ("w4a16_g128", 1, 0, (4096, 4096), ""),
    ("w4a16_g32_asym", 64, 0, (4096, 4096), ""),
    ("w4a16_g128", 128, 0, (24576, 4096), ""),
    ("w8a16", 1, 0, (4096, 4096), ""),
    ("w8a8", 128, 0, (24576, 4096), ""),
    ("w4a8_g128", 1, 0, (24576, 4096), ""),
    ("w4a8_g32", 1, 0, (24576, 4096), ""),
    ("w8a8_g32", 128, 0, (24576, 4096), ""),
    ("wfp8afp8", 1, 0, (24576, 4096), ""),
    ("wfp8afp8_b128x128", 128, 0, (24576, 4096), ""),
    ("w4a16_g128", 512, 128, (1536, 2048), ""),
    ("w4a8_g128", 512, 128, (1536, 2048), "gate_up"),
    ("w4a16_g128", 64, 128, (2048, 768), "down"),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def numbers(scheme: Scheme) -> str:
    return "bf16" if scheme.activation is None else "fp8" if scheme.weight.number == "fp8" else "int8"


def planned() -> list[Case]:
    """Of the kinds, those that each GPU has tensor cores for."""
    return [
        Case(f"{arch} {name} {part} {rows}", arch, Scheme.parse(name), "bf16", rows, experts, *shape, part)
        for arch in SHARED
        for name, rows, experts, shape, part in KINDS
        if numbers(Scheme.parse(name)) in CORES[arch]
    ]


@pytest.mark.parametrize("case", planned(), ids=lambda case: case.label)
def test_it_compiles_and_fits(case):
    import sass

    amd = case.arch.startswith("gfx")
    kernel_for(case.scheme, case.arch, experts=case.experts)  # which is what would be planned there
    made = sass.built(case.kernel(), case.arch, case.types, case.constants(), case.tiles.warps, case.tiles.stages)
    code = made.asm["amdgcn" if amd else "ptx"]
    assert re.search(CORES[case.arch][numbers(case.scheme)], code)
    assert made.metadata.shared <= SHARED[case.arch]
    before, wait, after = code.partition("griddepcontrol.wait")
    assert bool(wait) == ("griddepcontrol.launch_dependents" in after) == (not amd)
    assert amd or not re.search(r"\b(ld|st|red|atom)\.global|cp\.async|\bret;", before)
    assert not (amd and "elementwise_inline_asm" in made.asm["ttir"])
    if amd:
        found = dict(re.findall(r"\.(private_segment_fixed_size|[sv]gpr_spill_count):\s+(\d+)", code))
        assert found == {"private_segment_fixed_size": "0", "sgpr_spill_count": "0", "vgpr_spill_count": "0"}
    else:
        allowed = STACK.get((case.arch, str(case.scheme), case.rows), 0)
        assert sass.stack(made.asm["cubin"]) <= allowed


def test_fp8_is_not_planned_for_amd():
    with pytest.raises(AssertionError, match="gfx942 does not multiply e4m3"):
        kernel_for(Scheme.parse("wfp8afp8"), "gfx942")
