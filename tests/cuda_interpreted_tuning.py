"""Tiles that are tried on a GPU, in the interpreter, run as ``cuda_interpreted.py`` is: all give the same result."""

import ptx
import pytest
from cuda_cases import kernel_for  # noqa: F401  (registers the ops)

from qcompile.backends.cuda import targets, tiles, tuning
from qcompile.backends.cuda.tiles import Weight

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
    tried = {name: {getattr(one, name) for one in found.times} for name in tuning.STEPS}
    assert tried["bn"] == {64, 128}
    assert len(tried["stages"]) > 1
    assert len(tried["splits"]) > 1 or weight.part
    assert found.rule == tiles.rule(weight, tiles.bucket(rows), gpu)
