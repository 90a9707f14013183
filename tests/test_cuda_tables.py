"""Tables of tuned tiles: files of the user and of the package, and what is wrong with some."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_tuned import ENTRY, GPU, WEIGHT, WEIGHTS, folder  # noqa: F401  (a fixture)
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.backends.cuda import tables, tiles
from qcompile.backends.cuda.targets import Target
from qcompile.backends.cuda.tiles import Tiles, Weight
from qcompile.cache import CACHE_VARIABLE

pytestmark = pytest.mark.usefixtures("folder")


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
    assert tables.keys(GPU) == {WEIGHT.key(1)}
    for other in (WEIGHT._replace(group=128), WEIGHT._replace(kind="w8a16"), WEIGHT._replace(out=512)):
        assert tiles.choose(other, 1, GPU) == tiles.rule(other, 1, GPU)
    assert tiles.choose(WEIGHT, 2, GPU) == tiles.rule(WEIGHT, 2, GPU)
    for gpu in (Target((9, 0), "", 132), Target((9, 0), "", 132, "NVIDIA H100")):
        assert tiles.choose(WEIGHT, 1, gpu) == rule


def test_numbers_of_rows_share_tiles_up_to_a_power_of_two():
    tables.remember(GPU, {WEIGHT.key(16): ENTRY})
    found = [rows for rows in range(1, 40) if tiles.choose(WEIGHT, rows, GPU).stages == 5]
    assert found == list(range(9, 17))


@given(st.tuples(WEIGHTS, st.integers(1, 70000)), st.tuples(WEIGHTS, st.integers(1, 70000)))
def test_a_key_is_of_one_weight_mode_and_bucket(one, other):
    def described(weight, rows):
        return weight, weight.mode(rows), tiles.bucket(rows)

    weight, rows = one
    assert weight.key(weight.most(rows)) == weight.key(rows)
    assert weight.most(rows) >= min(rows, tiles.MOST_ROWS)
    assert (one[0].key(one[1]) == other[0].key(other[1])) == (described(*one) == described(*other))


SIZES = st.integers(-(2**40), 2**40)
ENTRIES = st.builds(
    tables.Entry,
    **dict.fromkeys(("bm", "bn", "bk", "splits", "stages", "warps"), SIZES),
    us=st.floats(0, 1e9),
    rule_us=st.floats(0, 1e9),
)


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


def test_where_nothing_can_be_written_this_process_still_has_its_tiles(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
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
