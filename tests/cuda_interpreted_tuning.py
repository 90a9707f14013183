"""Tiles that are tried on a GPU, in the interpreter, run as ``cuda_interpreted.py`` is: all give the same result."""

import ptx
import pytest
import torch
from cuda_cases import error, exact, exact_experts, expert_layer, kernel_for, packed_weight, run, run_experts

from qcompile.backends.cuda import BACKEND, targets, tiles, tuning
from qcompile.backends.cuda.tiles import Tiles, Weight
from qcompile.types import Scheme

ptx.install()


@pytest.mark.parametrize(
    ("weight", "rows"),
    [
        (Weight("w4a16", 128, 512, group=64), 2), (Weight("w8a16", 128, 256), 17),
        (Weight("int4", 128, 512, group=128), 2),
        (Weight("fp8", 128, 512, group=128), 2),
        (Weight("w4a16", 128, 256, 4, 128, "gate_up"), 2), (Weight("int8", 128, 256, 4, 0, "down"), 8),
    ],
)  # fmt: skip
def test_all_tiles_that_are_tried_compute_the_same(weight, rows):
    gpu, times = targets.parse("sm_90"), iter([10.0, *[9.0] * 100])  # one step, then nothing is better
    found = tuning.measure(weight, rows, gpu, "cpu", lambda calls: next(times))
    assert found.dropped == {}
    tried = {name: {getattr(one, name) for one in found.times} for name in tiles.SIZES}
    assert tried["bn"] == {64, 128}
    assert len(tried["stages"]) > 1
    assert len(tried["splits"]) > 1 or weight.part
    assert found.rule == tiles.rule(weight, tiles.bucket(rows), gpu)


@pytest.fixture
def asked():
    """Which products tiles are asked for, one call after the other; all get tiles that no rule gives."""
    found = []

    def decide(weight, rows, target):
        found.append((weight, rows))
        one = Tiles(weight.mode(rows), 16, 64, 64, 1 if weight.part else 2, 5, 4)
        assert one != tiles.rule(weight, rows, target)
        return one

    with tiles.decided_by(decide):
        yield found


@pytest.mark.parametrize(("scheme", "kind", "group"), [("w4a16_g64", "w4a16", 64), ("w8a16", "w8a16", 0),
                                                       ("w4a8_g128", "int4", 128), ("w8a8", "int8", 0)])  # fmt: skip
def test_a_graph_and_a_launch_ask_for_the_same_tiles_and_get_them(scheme, kind, group, asked):
    parsed = Scheme.parse(scheme)
    for experts in (0, 4):
        packed = packed_weight(parsed, (*([experts] if experts else []), 64, 512), torch.float16)
        kernel, x = kernel_for(parsed, "sm_90", torch.float16, experts), torch.randn(2, 512).half()
        if experts:
            ends = torch.tensor([0, 1, 2, 2], dtype=torch.int32)
            result, expected = run_experts(kernel, packed, x, ends), exact_experts(packed, x, ends)
        else:
            result, expected = run(kernel, packed, x), exact(packed, x)
        assert error(result, expected) < 5e-4
        assert asked == [(Weight(kind, 64, 512, experts, group), 2)] * 2
        asked.clear()


@pytest.mark.parametrize(("scheme", "kind", "group"), [("w4a16_g64", "w4a16", 64), ("wfp8afp8", "fp8", 0)])
def test_so_do_a_graph_and_the_launches_of_experts(scheme, kind, group, asked):
    layer = expert_layer(scheme, (4, 2, 128, 64), torch.float16, "sm_90")
    ids, routing = torch.tensor([[1, 3], [0, 1], [2, 3]]), torch.rand(3, 2)
    BACKEND.operations["quant_experts"].compute(*layer.arguments(torch.randn(3, 128).half(), ids, routing))
    both = [(Weight(kind, 128, 128, 4, group, "gate_up"), 6), (Weight(kind, 128, 64, 4, group, "down"), 6)]
    assert asked == both * 2
