"""The benchmarks that wait for a GPU, as far as none is needed: parts that fail, plots, what is to be tuned."""

import json
import sys
from pathlib import Path

import pytest
import torch

from qcompile.backends.cuda import targets, tiles, tuning

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports one, as it runs: from its folder."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str, *arguments: str):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        return __import__(name)

    yield load
    for name in [name for name in sys.modules if name.startswith("cuda_") and (FOLDER / f"{name}.py").is_file()]:
        del sys.modules[name]


def test_a_part_that_crashes_or_hangs_does_not_keep_the_others_from_running(benchmark, monkeypatch, tmp_path, capfd):
    every = benchmark("cuda_all", "--device", "cpu", "--out", str(tmp_path / "out"), "--tune", "5")
    assert all((FOLDER / f"{part}.py").is_file() for part in every.PARTS)
    assert sum(every.PARTS.values()) + every.PLOTS < 600
    write = "import sys; open(sys.argv[0] + '.ran', 'w').write(' '.join(sys.argv[1:]))"
    hang = f"{write}; import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    for name, code in {
        "cuda_tune": write, "crashes": f"{write}; raise SystemExit(3)", "hangs": hang, "cuda_plots": write,
    }.items():  # fmt: skip
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setattr(every, "FOLDER", tmp_path)
    monkeypatch.setattr(every, "PARTS", {"crashes": 5, "hangs": 2})
    with pytest.raises(SystemExit) as stopped:
        every.main()
    assert stopped.value.code == 1
    lines = capfd.readouterr().out.splitlines()[-4:]
    assert lines == ["cuda_tune: done", "crashes: exit code 3", "hangs: killed after 2 s", "cuda_plots: done"]
    given = (tmp_path / "hangs.py.ran").read_text()
    assert given.startswith("--device cpu --seconds 1 --out ")
    assert (tmp_path / "cuda_plots.py.ran").read_text() == f"--folder {tmp_path / 'out'}"


FACTS = {"torch": "2", "cuda": "13", "gpu": "none", "ceilings": {"read_tb_s": 4.0}}
LINEAR = [
    {"scheme": scheme, "rows": rows, "out": out, "in": 64, "ours": 2.0, "cublas": 3.0, "marlin": marlin,
     "ours_tb_s": 2.0}
    for scheme, marlin in (("w4a16_g128", 1.5), ("w8a16", None))
    for rows in (1, 16)
    for out in (64, 128, 192, 256)
]  # fmt: skip
EXPERTS = [{"scheme": "w8a8", "tokens": 1, "experts": 8, "chosen": 2, "ours": None, "grouped_mm": 3.0},
           {"scheme": "w8a8", "tokens": 4, "experts": 8, "chosen": 2, "ours": 1.0, "grouped_mm": 3.0}]  # fmt: skip
DECODE = [{"name": "bfloat16", "tokens_per_second": 100.0, "against_bfloat16": 1.0, "gigabytes": 1.0}]


def test_plots_of_the_newest_tables(benchmark, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name, rows in {
        "linear_2026-01-01": [], "linear_2026-01-02": LINEAR, "experts_2026-01-01": EXPERTS,
        "decode_2026-01-01": DECODE, "check_2026-01-01": [{"wrong": ""}],
    }.items():  # fmt: skip
        (tmp_path / f"cuda_{name}.json").write_text(json.dumps({**FACTS, "shape": "tiny", "rows": rows}))
    benchmark("cuda_plots", "--folder", str(tmp_path)).main()
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "cuda_linear_2026-01-02_w4a16_g128.png", "cuda_linear_2026-01-02_w8a16.png",
        "cuda_linear_2026-01-02_bandwidth.png", "cuda_experts_2026-01-01_8_experts.png",
        "cuda_decode_2026-01-01_tokens.png",
    }  # fmt: skip
    assert sorted(capsys.readouterr().out.split()) == sorted(map(str, tmp_path.glob("*.png")))


def test_where_there_is_no_table_nothing_is_plotted(benchmark, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit):
        benchmark("cuda_plots", "--folder", str(tmp_path)).main()
    assert f"{tmp_path} holds no tables" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_products_to_tune_are_of_their_own_and_have_tiles(arch, benchmark):
    gpu = targets.parse(arch)
    wanted = [one for one in benchmark("cuda_tune").products(gpu) if tuning.is_measured(*one)]
    assert len({weight.key(rows) for weight, rows in wanted}) == len(wanted) > 1000
    assert ("fp8" in {weight.kind for weight, _ in wanted}) == gpu.has_fp8
    for weight, rows in wanted:
        assert tiles.unfit(tiles.rule(weight, rows, gpu), weight, rows, gpu) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_goes_on_where_it_was_stopped(benchmark, tmp_path, capsys):
    path = tmp_path / "table.json"
    tune = benchmark("cuda_tune", "--device", "cpu", "--out", str(path), "--seconds", "0")
    tune.main()
    assert "8 are left" in capsys.readouterr().out
    monkey = list(tune.dry_products())
    tune.dry_products = lambda: iter(monkey[:1])
    sys.argv[-1] = "60"
    tune.main()
    tune.dry_products = lambda: iter(monkey[:2])
    tune.main()
    assert "1 of 2 products are to be measured" in capsys.readouterr().out
    assert set(json.loads(path.read_text())["tiles"]) == {weight.key(rows) for weight, rows in monkey[:2]}
