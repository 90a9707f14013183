"""Tuned tiles: files that hold them, what is wrong with some, how they are measured, and that kernels get them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_cases import error, exact, kernel_for, packed_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qcompile import compile as compiling
from qcompile.backends.cuda import samples, tables, targets, tiles, tuning
from qcompile.backends.cuda.targets import Target
from qcompile.backends.cuda.tiles import Tiles, Weight
from qcompile.cache import CACHE_VARIABLE
from qcompile.modules import QuantLinear
from qcompile.types import Scheme

GPU = Target((9, 0), "", 132, "NVIDIA H200")
WEIGHT = Weight("w4a16", 256, 1024, group=64)
ENTRY = tables.Entry(bm=16, bn=128, bk=64, splits=2, stages=5, warps=4, us=5.0, rule_us=6.5)
KINDS = (("w4a16", 64), ("w4a16", 0), ("w8a16", 0), ("int8", 0), ("int4", 64), ("fp8", 0), ("fp8", 128))


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Empty folders of the user and of the package."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    tables.forget()
    yield tmp_path
    monkeypatch.undo()
    tables.forget()


def changed(**sizes) -> tables.Entry:
    return ENTRY.model_copy(update=sizes)


def write(path: Path, entry: tables.Entry = ENTRY, key: str = WEIGHT.key(1)) -> Path:
    tables.merge(path, GPU, {key: entry})
    return path


# --------------------------------------------------------------------------------------------------------------- files


def test_the_users_table_comes_before_that_of_the_package_and_the_rule_after_both():
    rule = tiles.choose(WEIGHT, 1, GPU)
    assert rule == tiles.rule(WEIGHT, 1, GPU)
    write(tables.shipped_path(GPU))
    tables.forget()
    assert tiles.choose(WEIGHT, 1, GPU) == Tiles(tiles.DENSE, 16, 128, 64, 2, 5, 4)
    tables.remember(GPU, {WEIGHT.key(1): changed(stages=3)})
    assert tiles.choose(WEIGHT, 1, GPU).stages == 3
    assert tables.own_path(GPU).is_file()
    for other in (WEIGHT._replace(group=128), WEIGHT._replace(kind="w8a16"), WEIGHT._replace(out=512)):
        assert tiles.choose(other, 1, GPU) == tiles.rule(other, 1, GPU)
    assert tiles.choose(WEIGHT, 2, GPU) == tiles.rule(WEIGHT, 2, GPU)
    for gpu in (Target((9, 0), "", 132), Target((9, 0), "", 132, "NVIDIA H100")):
        assert tiles.choose(WEIGHT, 1, gpu) == rule


def test_numbers_of_rows_share_tiles_up_to_a_power_of_two():
    tables.remember(GPU, {WEIGHT.key(16): ENTRY})
    found = [rows for rows in range(1, 40) if tiles.choose(WEIGHT, rows, GPU).stages == 5]
    assert found == list(range(9, 17))


WEIGHTS = st.builds(
    Weight, st.sampled_from(["w4a16", "w8a16", "int4", "int8", "fp8"]), st.sampled_from([64, 640, 4096]),
    st.sampled_from([64, 640, 4096]), st.sampled_from([0, 5, 64, 128]), st.sampled_from([0, 64, 128]),
    st.sampled_from(["", "gate_up", "down"]),
)  # fmt: skip


@given(st.tuples(WEIGHTS, st.integers(1, 70000)), st.tuples(WEIGHTS, st.integers(1, 70000)))
def test_a_key_is_of_one_weight_mode_and_bucket(one, other):
    def described(weight, rows):
        return weight, weight.mode(rows), tiles.bucket(rows)

    assert (one[0].key(one[1]) == other[0].key(other[1])) == (described(*one) == described(*other))


SIZES = st.integers(-(2**40), 2**40)
ENTRIES = st.builds(tables.Entry, **dict.fromkeys(tuning.STEPS, SIZES), us=st.floats(0, 1e9), rule_us=st.floats(0, 1e9))


@settings(max_examples=15)  # files are written
@given(first=st.dictionaries(st.text(), ENTRIES, max_size=4), second=st.dictionaries(st.text(), ENTRIES, max_size=4))
def test_what_is_merged_is_read_again(tmp_path_factory, first, second):
    path = tmp_path_factory.mktemp("table") / "folder" / "table.json"
    tables.merge(path, GPU, first)
    tables.merge(path, GPU, second)
    found = tables.read(path)
    assert found.tiles == first | second
    assert (found.device, found.arch, found.kernels) == ("NVIDIA H200", "sm_90", tables.kernels())
    assert sorted(p.name for p in path.parent.iterdir()) == ["table.json", "table.json.lock"]


def test_a_line_for_each_product():
    path = write(tables.own_path(GPU))
    assert f'  "w4a16 g64 256x1024: 1 rows": {json.dumps(ENTRY.model_dump())}' in path.read_text().splitlines()


WRITER = """
import sys
from qcompile.backends.cuda import tables, targets
gpu = targets.Target((9, 0), "", 132, "NVIDIA H200")
for i in range(40):
    entry = tables.Entry(bm=i, bn=128, bk=64, splits=2, stages=5, warps=4, us=1.0, rule_us=2.0)
    tables.remember(gpu, {f"{sys.argv[1]} {i}": entry})
"""


def test_processes_that_write_at_once_lose_nothing():
    running = [subprocess.Popen([sys.executable, "-c", WRITER, name], stderr=subprocess.PIPE) for name in ("a", "b")]
    for process in running:
        assert process.communicate()[1] == b""
    found = tables.read(tables.own_path(GPU))
    assert {key: one.bm for key, one in found.tiles.items()} == {f"{n} {i}": i for n in "ab" for i in range(40)}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "Invalid JSON"),
        (lambda text: "", "Invalid JSON"),
        (lambda text: "[]", "Input should be an object"),
        (lambda text: "\0" * 100, "Invalid JSON"),
        (lambda text: text.replace('"bm": 16', '"bm": "16"'), "bm: Input should be a valid integer"),
        (lambda text: text.replace('"bm": 16, ', ""), "bm: Field required"),
        (lambda text: text.replace('"bm"', '"ba"'), "bm: Field required"),
        (lambda text: text.replace('"arch"', '"run"'), "arch: Field required"),
    ],
)
def test_a_damaged_file_is_named_once_and_not_used(damage, said, capsys):
    path = write(tables.own_path(GPU))
    path.write_text(damage(path.read_text()))
    tables.forget()
    for rows in (1, 2, 1000):
        assert tiles.choose(WEIGHT, rows, GPU) == tiles.rule(WEIGHT, rows, GPU)
    printed = capsys.readouterr().err
    assert printed.count(str(path)) == 1
    assert f"{path} is damaged" in printed
    assert said in printed
    tables.remember(GPU, {WEIGHT.key(1): ENTRY})  # takes its place
    tables.forget()
    assert tiles.choose(WEIGHT, 1, GPU).stages == 5
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("place", [tables.own_path, tables.shipped_path])
def test_tiles_of_other_kernels_are_not_used(place, capsys):
    path = place(GPU)
    write(path)
    path.write_text(path.read_text().replace(tables.kernels(), "0" * 20))
    tables.forget()
    for _ in range(2):
        assert tiles.choose(WEIGHT, 1, GPU) == tiles.rule(WEIGHT, 1, GPU)
    assert capsys.readouterr().err.count(f"{path} was made for other kernels (0000") == 1


def test_a_changed_kernel_has_another_hash_and_what_launches_it_has_none(monkeypatch, tmp_path):
    for name in ("product.py", "launch_product.py"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(tables, "_DEVICE", tmp_path)
    hashes = [tables.kernels.__wrapped__()]
    for name in ("launch_product.py", "product.py"):
        (tmp_path / name).write_text("2")
        hashes.append(tables.kernels.__wrapped__())
    assert hashes[0] == hashes[1] != hashes[2]


def test_where_nothing_can_be_written_this_process_still_has_its_tiles(folder, monkeypatch, capsys):
    (folder / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(folder / "file"))
    for rows in (1, 2):
        tables.remember(GPU, {WEIGHT.key(rows): ENTRY})
        assert tiles.choose(WEIGHT, rows, GPU).stages == 5
    printed = capsys.readouterr().err
    assert printed.count("cannot be kept for other processes") == 1
    assert CACHE_VARIABLE in printed


def test_a_folder_in_place_of_the_file_is_named(capsys):
    tables.own_path(GPU).mkdir(parents=True)
    assert tiles.choose(WEIGHT, 1, GPU) == tiles.rule(WEIGHT, 1, GPU)
    assert f"{tables.own_path(GPU)}: tuned tiles cannot be read" in capsys.readouterr().err


def test_the_tables_of_the_package_are_of_its_kernels(monkeypatch, capsys):
    monkeypatch.undo()
    for path in tables.SHIPPED.glob("*.json"):
        table = tables.read(path)
        assert table is not None, capsys.readouterr().err
        assert path.stem == tables.file_name(Target((9, 0), table.arch, 1, table.device))
        assert table.tiles
    assert "backends/cuda/tuned/*.json" in (Path(__file__).parents[1] / "pyproject.toml").read_text()


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("weight", "rows", "entry", "reason"),
    [
        (WEIGHT, 1, changed(bn=96), "bn is 96, none of 64, 128"),
        (WEIGHT, 1, changed(bm=0), "bm is 0, none of 16"),
        (WEIGHT, 1, changed(splits=3), "splits is 3, none of 1, 2, 4, 8"),
        (WEIGHT, 1, changed(stages=40), "stages is 40"),
        (WEIGHT._replace(out=192), 1, ENTRY, "bn is 128, which does not divide 192 channels"),
        (WEIGHT._replace(columns=192), 1, changed(splits=2), "192 columns are not 2 times a multiple of 64"),
        (WEIGHT._replace(columns=192), 1, changed(bk=128), "bk is 128, but 64 columns allow steps of 64"),
        (Weight("int4", 256, 1024, group=64), 1, changed(bk=128), "bk is 128, but 64 columns allow steps of 64"),
        (Weight("w4a16", 256, 1024, 128), 8, changed(bm=32), "bm is 32, but a program has one row"),
        (Weight("int8", 256, 1024, 8, 0, "down"), 8, ENTRY, "splits is 2, but programs of down go through all columns"),
        (Weight("int8", 256, 1024), 256, changed(bm=128, splits=1), "128 x 128 sums do not fit into the registers"),
        (Weight("w8a16", 256, 1024), 256, changed(bm=256, warps=8, bk=128), "bytes of shared memory, and a block of"),
    ],
)  # fmt: skip
def test_tiles_that_do_not_fit_are_refused_by_name(weight, rows, entry, reason, capsys):
    tables.remember(GPU, {weight.key(rows): entry})
    for _ in range(2):
        assert tiles.choose(weight, rows, GPU) == tiles.rule(weight, rows, GPU)
        tiles._known.cache_clear()
    printed = capsys.readouterr().err
    assert printed.count(f"{tables.own_path(GPU)}: the tiles for {weight.key(rows)!r} are not used: ") == 1
    assert reason in printed


def test_tiles_of_the_package_are_used_where_the_users_do_not_fit(capsys):
    write(tables.shipped_path(GPU))
    tables.remember(GPU, {WEIGHT.key(1): changed(bn=7)})
    assert tiles.choose(WEIGHT, 1, GPU).bn == 128
    assert "bn is 7" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- measuring


def slower(goal: dict[str, int]):
    """A timer of which tiles with these sizes are the fastest; each step away costs a tenth."""

    def time(calls) -> float:
        one = tiles.choose(WEIGHT, 1, GPU)
        away = sum(
            abs(tuning.STEPS[name].index(getattr(one, name)) - tuning.STEPS[name].index(value))
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


@pytest.mark.parametrize("kind", ["raises", "differs", "nan"])
def test_tiles_that_fail_or_compute_something_else_are_dropped(kind, monkeypatch):
    def call():
        if tiles.choose(WEIGHT, 1, GPU).bn == 64:
            return torch.ones(4)
        if kind == "raises":
            raise RuntimeError("out of resource: shared memory\nmore")
        return torch.full((4,), torch.nan if kind == "nan" else 1.1)

    monkeypatch.setattr(samples, "products", lambda *_: [call])
    found = tuning.measure(WEIGHT, 1, GPU, "cpu", slower({"bn": 128}))
    assert found.best.bn == 64
    assert found.dropped
    assert {one.bn for one in found.dropped} == {128}
    expected = {"raises": "RuntimeError: out of resource: shared memory", "differs": "off by 0.1", "nan": "off by nan"}
    assert all(why.endswith(expected[kind]) for why in found.dropped.values())
    assert expected[kind] in str(found)


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
@pytest.mark.parametrize("rows", [2, 32])
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


def test_a_product_that_cannot_be_measured_is_named_and_compiled_by_the_rule(
    attached, monkeypatch, fresh_dynamo, capsys
):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(samples, "products", full)
    monkeypatch.setattr(tuning, "_FAILED", set())
    model, graphs = nn.Sequential(quantized_linear()), []
    options = {"max_autotune": True, "post_grad_custom_post_pass": graphs.append}
    with torch.no_grad():
        torch.compile(model, backend="qcompile", options=options)(torch.randn(1, 1024).bfloat16())
    assert splits_of(graphs[0]) == [4]
    printed = capsys.readouterr().err
    assert "tiles for 'w4a16 g64 256x1024: 1 rows' were not tuned: OutOfMemoryError: no room" in printed
