"""The gate on compiled code: every kernel is cross-compiled, disassembled and held to a table, without a GPU.

In the main loop nothing may be spilled, moved between threads or written to shared memory; weights come 16 bytes at a
time; the tensor-core instruction is that of the numbers; and instructions per weight stay within a tenth of
``cuda_sass.json``. ``python tests/test_cuda_sass.py`` writes that table anew.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from cuda_cases import ARCHS, Case, cases

from qcompile.backends.cuda import targets, tiles
from qcompile.types import Scheme

TABLE = Path(__file__).with_name("cuda_sass.json")

SHARED = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448}  # bytes of a block, CUDA programming guide

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def loop_of(case: Case):
    import sass

    return sass.compiled(
        case.kernel(), case.capability, case.types, case.constants(), case.tiles.warps, case.tiles.stages
    )


def per_weight(case: Case, instructions: int) -> float:
    """Instructions of a thread for each weight that its program multiplies."""
    return round(instructions * 32 * case.tiles.warps / (case.tiles.bn * case.tiles.bk), 2)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.label)
def test_compiled_code_is_as_good_as_the_table_says(case):
    loop, expected = loop_of(case), json.loads(TABLE.read_text())[case.label]
    assert loop.spills == 0
    assert loop.count("SHFL", "STS", "STSM", "LDG") == 0  # loads are asynchronous copies
    assert loop.wide("LDGSTS") > 0
    assert loop.tensor_core == expected["tensor_core"]
    assert loop.registers <= 255
    assert loop.shared <= SHARED[case.arch]
    found = per_weight(case, loop.instructions)
    assert found <= 1.1 * expected["per_weight"], f"{found} instructions per weight"
    assert (loop.wide("LDS") > 0) == expected["wide_shared_loads"]
    if case.path["PDL"]:
        check_overlap(loop.kernel, prefetches=not case.experts)
    else:
        assert not {"ACQBULK", "PREEXIT", "CCTL"} & set(loop.kernel)


def check_overlap(kernel: tuple[str, ...], prefetches: bool) -> None:
    """Every program waits for earlier kernels, once, and does nothing before but prefetch; then the next may start."""
    wait = kernel.index("ACQBULK")
    assert kernel.count("ACQBULK") == kernel.count("PREEXIT") == 1
    assert kernel.index("PREEXIT") > wait
    before = set(kernel[:wait])
    assert not {"LDG", "LDGSTS", "STG", "LDS", "STS", "BAR", "BRA", "EXIT", "ATOM", "RED"} & before
    assert ("CCTL" in before) == prefetches
    assert "CCTL" not in kernel[wait:]


TIGHTEST = [  # bm, bn, bk, stages, warps: what tuning may try that takes the most registers
    ("sm_90", "w4a16_g32_asym", (64, 128, 128, 5, 4)), ("sm_90", "w8a8", (256, 128, 128, 4, 8)),
    ("sm_90", "w4a8_g128", (128, 128, 128, 5, 8)), ("sm_90", "wfp8afp8_b128x128", (64, 128, 128, 6, 4)),
    ("sm_80", "w4a16_g32_asym", (128, 128, 64, 3, 8)),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "scheme", "sizes"), TIGHTEST)
def test_tiles_that_tuning_may_try_fit_without_spills(arch, scheme, sizes):
    bm, bn, bk, stages, warps = sizes
    tried = tiles.Tiles(tiles.DENSE, bm, bn, bk, 1, stages, warps)
    case = Case("", arch, Scheme.parse(scheme), "bf16", bm, 0, 24576, 4096, forced=tried)
    gpu = targets.parse(arch)
    assert tiles.unfit(tried, case.weight, bm, gpu) == ""
    loop = loop_of(case)
    assert loop.spills == 0
    assert loop.shared <= tiles.shared_bytes(tried, case.weight, gpu) <= SHARED[arch]
    assert loop.count("SHFL", "STS", "STSM", "LDG") == 0


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group", "centered"), [(0, True), (32, False), (128, True)])
def test_the_kernel_that_dequantizes_compiles_without_spills(arch, bits, group, centered):
    import sass

    from qcompile.backends.cuda.device.dequantize import dequantize

    types = {"codes": "*u8", "words": "*i32", "y": "*bf16"}
    constants = {"BITS": bits, "WGMMA": arch == "sm_90", "GROUP": group, "CENTERED": centered}
    constants |= {"BN": 64, "BK": 64, "PTX": True}
    made = sass.compiled(dequantize, int(arch.removeprefix("sm_")), types, constants, 4, 3)
    assert made.spills == 0
    assert made.count("STG") > 0


def test_the_weighted_sum_of_experts_overlaps_with_earlier_kernels():
    import sass

    from qcompile.backends.cuda.device.expert_products import sum_pairs

    types = {"rows": "*bf16", "routing": "*fp32", "ids": "*i64", "y": "*bf16"}
    made = sass.compiled(sum_pairs, 90, types, {"K": 8, "BLOCK": 1024, "PDL": True}, 4, 3)
    check_overlap(made.kernel, prefetches=False)


def test_the_table_has_no_other_lines():
    assert set(json.loads(TABLE.read_text())) == {case.label for case in cases()}


if __name__ == "__main__":
    table = {}
    for one in cases():
        found = loop_of(one)
        line = {
            "per_weight": per_weight(one, found.instructions),
            "tensor_core": found.tensor_core,
            "wide_shared_loads": found.wide("LDS") > 0,
        }
        moved = found.count("SHFL", "STS", "STSM", "LDG")
        print(one.label, line, f"spills {found.spills}, moved {moved}, registers {found.registers}", file=sys.stderr)
        table[one.label] = line
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
