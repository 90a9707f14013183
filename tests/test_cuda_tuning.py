"""Tuning: which tiles are tried and kept, that a graph is measured before it is lowered, and what is launched then."""

import pytest
import torch
from cuda_cases import error, exact, kernel_for, packed_weight
from cuda_tuned import ENTRY, GPU, WEIGHT, WEIGHTS, folder  # noqa: F401  (a fixture)
from hypothesis import given
from hypothesis import strategies as st

from qcompile import compile as compiling
from qcompile.backends.cuda import samples, tables, targets, tiles, tuning
from qcompile.backends.cuda.tiles import Weight
from qcompile.modules import QuantLinear
from qcompile.types import Scheme

KINDS = (("w4a16", 64), ("w4a16", 0), ("w8a16", 0), ("int8", 0), ("int4", 64), ("fp8", 0), ("fp8", 128))

pytestmark = pytest.mark.usefixtures("folder")


# ----------------------------------------------------------------------------------------------------------- measuring


def slower(goal: dict[str, int]):
    """A timer of which tiles with these sizes are the fastest; each step away costs a tenth."""

    def time(calls) -> float:
        one = tiles.choose(WEIGHT, 1, GPU)  # whatever the rows, the ones that are measured
        away = sum(
            abs(tiles.SIZES[name].index(getattr(one, name)) - tiles.SIZES[name].index(value))
            for name, value in goal.items()
        )
        return 10.0 * 1.1**away

    return time


@pytest.fixture
def easy(monkeypatch):
    """Products that all tiles compute alike."""
    monkeypatch.setattr(samples, "products", lambda *_: [lambda: torch.ones(2, 2)])


def test_the_search_walks_to_the_best_and_keeps_it(easy):
    goal = {"bn": 128, "bk": 64, "splits": 2, "stages": 6}
    found = tuning.measure(WEIGHT, 1, GPU, "cpu", slower(goal))
    assert {name: getattr(found.best, name) for name in goal} == goal
    assert found.entry().us == 10.0
    assert found.entry().rule_us == round(found.times[tiles.rule(WEIGHT, 1, GPU)], 3)
    assert len(found.times) < 40
    tables.remember(GPU, {WEIGHT.key(1): found.entry()})
    assert tiles.choose(WEIGHT, 1, GPU) == found.best


def test_a_gain_within_noise_keeps_the_rule(easy):
    steady = iter([100.0, 98.0, *[99.0] * 20])
    found = tuning.measure(WEIGHT, 1, GPU, "cpu", lambda calls: next(steady))
    assert found.best == tiles.rule(WEIGHT, 1, GPU)


@pytest.mark.parametrize("kind", ["raises", "is silent", "differs", "nan"])
def test_tiles_that_fail_or_compute_something_else_are_dropped(kind, monkeypatch):
    def call():
        if tiles.choose(WEIGHT, 1, GPU).bn == 64:
            return torch.ones(4)
        if kind == "raises":
            raise RuntimeError("out of resource: shared memory\nmore")
        if kind == "is silent":
            raise AssertionError
        return torch.full((4,), torch.nan if kind == "nan" else 1.1)

    monkeypatch.setattr(samples, "products", lambda *_: [call])
    found = tuning.measure(WEIGHT, 1, GPU, "cpu", slower({"bn": 128}))
    assert found.best.bn == 64
    assert found.dropped
    assert {one.bn for one in found.dropped} == {128}
    expected = {
        "raises": "RuntimeError: out of resource: shared memory",
        "is silent": "AssertionError: ",
        "differs": "off by 0.1",
        "nan": "off by nan",
    }
    assert all(why.endswith(expected[kind]) for why in found.dropped.values())
    assert expected[kind] in str(found)


def test_rows_are_measured_in_the_way_in_which_they_are_computed():
    """Up to 30 of 60 experts each have a program: those tiles are no use to 31 or 32, which are in the same bucket."""
    weight = Weight("w4a16", 128, 256, 60, 64, "down")
    found = tuning.measure(weight, 30, GPU, "cpu", lambda calls: 1.0)
    assert {(one.mode, one.bm) for one in found.times} == {(tiles.EACH_ROW, 16)}
    tables.remember(GPU, {weight.key(17): found.entry()})
    assert tiles.tuned(weight, 30, GPU) == found.best
    assert tiles.tuned(weight, 31, GPU) is None


def test_the_rules_own_failure_is_raised(monkeypatch):
    def fail():
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(samples, "products", lambda *_: [fail])
    with pytest.raises(torch.OutOfMemoryError):
        tuning.measure(WEIGHT, 1, GPU, "cpu", lambda calls: 1.0)


@given(WEIGHTS, st.integers(1, 5000), st.sampled_from(["sm_80", "sm_89", "sm_90", "gfx942"]))
def test_candidates_fit(weight, rows, arch):
    gpu = targets.parse(arch)
    if weight.part and not weight.experts:
        return
    rule = tiles.rule(weight, rows, gpu)
    for one in tuning.neighbours(rule, weight, rows, gpu):
        assert one != rule
        assert tiles.unfit(one, weight, rows, gpu) == ""
        assert one.mode == weight.mode(rows)


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize(("experts", "part"), [(0, ""), (8, ""), (8, "gate_up"), (8, "down")])
@pytest.mark.parametrize("rows", [2, 31])
def test_products_to_measure_are_those_of_a_graph(kind, group, experts, part, rows):
    weight = Weight(kind, 128, 256, experts, group, part)
    calls = samples.products(weight, rows, GPU, "cpu")
    assert len(calls) == 2
    first, second = (call() for call in calls)
    width = 64 if part == "gate_up" else 128
    assert first.shape[1] == width
    assert first.isfinite().all()
    assert not torch.equal(first, second)
    again = samples.products(weight, rows, GPU, "cpu")[0]()
    assert torch.equal(first, again)


# ------------------------------------------------------------------------------------------ what is traced and launched


class Recorder:
    """In place of a kernel: what it was launched with."""

    def __getitem__(self, grid):
        self.grid = grid
        return self

    def __call__(self, *arguments, **constants):
        self.arguments, self.constants = arguments, constants


@pytest.fixture
def attached(monkeypatch):
    """A GPU that is there by its name only; numbers are on the CPU."""
    monkeypatch.setattr(targets, "attached", lambda: GPU)
    monkeypatch.setattr(tuning, "attached", lambda: GPU)
    monkeypatch.setattr(tuning, "DEVICE", "cpu")
    monkeypatch.setattr(compiling, "_device", lambda tensors: "cuda")


def quantized_linear() -> QuantLinear:
    packed = packed_weight(Scheme.parse("w4a16_g64"), (256, 1024), torch.bfloat16)
    return QuantLinear(packed, None, f"cuda.{kernel_for(packed.scheme, 'sm_90').name}", torch.bfloat16)


@pytest.mark.parametrize(("scheme", "kind", "group"), [("w4a16_g64", "w4a16", 64), ("w8a8", "int8", 0)])
def test_tuned_tiles_are_what_is_launched(scheme, kind, group, attached, monkeypatch):
    pytest.importorskip("triton")
    from qcompile.backends.cuda.device import launch

    recorder = Recorder()
    monkeypatch.setattr(launch, "float_product" if kind == "w4a16" else "scaled_product", recorder)
    parsed, weight = Scheme.parse(scheme), Weight(kind, 256, 1024, group=group)
    tensors = kernel_for(parsed, "sm_90").prepare(packed_weight(parsed, (256, 1024), torch.bfloat16))

    def launched(splits: int) -> Recorder:
        if kind == "w4a16":
            launch.float_linear(torch.zeros(1, 1024).bfloat16(), *tensors, None, None, 4, True, 64, True, 256, splits)
        else:
            x, after = torch.zeros(1, 1024, dtype=torch.int8), ("int8", 0, 1, False, 256, splits, torch.bfloat16)
            launch.scaled_linear(x, None, *tensors, None, None, *after)
        return recorder

    before = launched(4).constants
    assert (before["BN"], before["STAGES"]) == (64, 4)
    tables.remember(GPU, {weight.key(1): ENTRY})
    after = launched(2)
    assert (after.constants["BN"], after.constants["BK"], after.constants["STAGES"]) == (128, 64, 5)
    assert after.constants["num_stages"] == 5
    assert after.grid == (2, 1, 2)


def splits_of(graph) -> list[int]:
    op = torch.ops.qcompile_cuda.float_linear.default
    return [node.args[-1] for node in graph.nodes if node.target is op]


@pytest.mark.parametrize("tuned", [True, False])
def test_max_autotune_measures_before_splits_are_part_of_a_graph(tuned, attached, monkeypatch, fresh_dynamo, capsys):
    measured = []

    def timer(calls):
        measured.append(tiles.choose(WEIGHT, 1, GPU))
        assert type(calls[0]()) is torch.Tensor  # in the midst of a trace
        return slower({"splits": 1})(calls)

    monkeypatch.setattr(tuning, "microseconds", timer)
    layer, x, graphs = quantized_linear(), torch.randn(1, 1024).bfloat16(), []

    def compiled(**options) -> torch.Tensor:
        torch._dynamo.reset()
        options |= {"post_grad_custom_post_pass": graphs.append}
        with torch.no_grad():
            return torch.compile(layer, backend="qcompile", options=options)(x)

    result = compiled(max_autotune=tuned)
    packed = packed_weight(Scheme.parse("w4a16_g64"), (256, 1024), torch.bfloat16)
    assert error(result, exact(packed, x)) < 6e-3
    assert tiles.rule(WEIGHT, 1, GPU).splits == 4
    assert splits_of(graphs[0]) == [0 if tuned else 4]  # 0: not split
    assert bool(measured) == tuned
    printed = capsys.readouterr().err
    if not tuned:
        assert "tuned" not in printed
        assert not tables.own_path(GPU).exists()
        return
    assert "tuned 'w4a16 g64 256x1024: 1 rows' on NVIDIA H200: bm 16 bn 64 bk 128 splits 1" in printed
    measured.clear()
    compiled(max_autotune=True)
    tables.forget()  # as another process
    compiled()
    assert measured == []
    assert splits_of(graphs[1]) == splits_of(graphs[2]) == [0]


def test_a_graph_of_unknown_rows_is_measured_for_those_it_is_traced_with(attached, monkeypatch, fresh_dynamo):
    monkeypatch.setattr(tuning, "microseconds", slower({"splits": 1}))
    layer, graphs = quantized_linear(), []
    options = {"max_autotune": True, "post_grad_custom_post_pass": graphs.append}
    with torch.no_grad():
        compiled = torch.compile(layer, backend="qcompile", dynamic=True, options=options)
        for rows in (5, 9):
            x = torch.randn(rows, 1024).bfloat16()
            assert error(compiled(x), layer(x).double()) < 6e-3
    assert [splits_of(graph) for graph in graphs] == [[0]]
    assert tables.keys(GPU) == {WEIGHT.key(8)}


def test_a_product_that_cannot_be_measured_is_named_and_compiled_by_the_rule(
    attached, monkeypatch, fresh_dynamo, capsys
):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(samples, "products", full)
    monkeypatch.setattr(tuning, "_FAILED", set())
    layer, x = quantized_linear(), torch.randn(1, 1024).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="qcompile", mode="max-autotune-no-cudagraphs")
        assert error(compiled(x), layer(x).double()) < 6e-3
    said = "tiles for 'w4a16 g64 256x1024: 1 rows' were not tuned: OutOfMemoryError: no room"
    assert capsys.readouterr().err.count(said) == 1
    assert not tables.own_path(GPU).exists()
