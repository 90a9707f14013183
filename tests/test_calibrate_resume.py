"""An interrupted calibration goes on where it was, with the same codes; another run's folder is refused."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TinyMLP, tiny_model
from moe_models import tiny_moe
from safetensors.torch import load_file

import qcompile
from qcompile import resume
from qcompile.errors import ConfigError, FormatError
from qcompile.modules import quantized_modules
from qcompile.resume import ResumeFolder, digest, sample

CONFIG = {
    "scheme": "w4a8_static",
    "method": "gptq",
    "rules": [{"match": "*.layers.1.self_attn.k_proj", "scheme": "w8a16", "method": "rtn"}],
}
PARTS = 8  # of two blocks: q, k, v; o; gate, up; down


def model_and_data(family: str = "qwen3"):
    torch.manual_seed(3)
    model = tiny_model(family) if family in ("qwen3", "llama") else tiny_moe(family)
    return model, torch.randint(3, 150, (8, 16))


def quantize(folder, family: str = "qwen3", config=CONFIG, **more):
    model, data = model_and_data(family)
    more = {"data": data, "sequence": 16, "progress": False, "expert_tokens": 1} | more
    return qcompile.quantize(model, config, resume=folder, **more)


def tensors(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, module in quantized_modules(model).items():
        packed = module.packed()
        found |= {f"{name}.{key}": t for key, t in (packed.tensors() | packed.activation_tensors()).items()}
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.fixture(scope="module")
def expected():
    """Of a run that was not interrupted and kept nothing."""
    return tensors(quantize(None))


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_calibrate_resume as run
from qcompile import resume
write, last, count = resume._write, int(sys.argv[3]), 0

def fatal(path, tensors, described):
    global count
    count += 1
    if count == last:
        path.with_name(path.name + ".partial").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, tensors, described)

resume._write = fatal
run.quantize(sys.argv[2])
"""


@pytest.mark.parametrize("writes", [1, 4, 7])
def test_a_killed_run_goes_on_with_the_same_codes(expected, tmp_path, writes, monkeypatch):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), str(writes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.glob("*.partial"))
    folder = tmp_path / "inputs.safetensors"
    assert folder.exists() == (writes > 2)

    original, parts = resume.ResumeFolder.save, []
    monkeypatch.setattr(ResumeFolder, "save", lambda self, *rest: (parts.append(self.done), original(self, *rest)))
    model = quantize(tmp_path)
    assert parts == list(range((writes - 1) // 2, PARTS))
    assert same(tensors(model), expected)
    modules = quantized_modules(model)
    for layer in (0, 1):
        first, *others = (modules[f"model.layers.{layer}.mlp.{name}_proj"] for name in ("gate", "up"))
        assert all(module.input_scale is first.input_scale for module in others)
    assert qcompile.report(model).coverage == 1.0


class TestFolder:
    def test_a_finished_run_is_read_again(self, expected, tmp_path, monkeypatch):
        assert same(tensors(quantize(tmp_path)), expected)
        size = (tmp_path / "inputs.safetensors").stat().st_size
        assert size < 1000  # what no part reads is not kept
        monkeypatch.setattr(qcompile.segments.Segments, "run", None)  # nothing is run
        model = quantize(tmp_path)
        assert same(tensors(model), expected)

    def test_experts_and_what_they_saw(self, tmp_path):
        config = {"scheme": "float", "rules": [{"match": "experts", "scheme": "w4a8_static"}]}
        models = [quantize(folder, "qwen3_moe", config) for folder in (None, tmp_path, tmp_path)]
        assert same(tensors(models[0]), tensors(models[1]))
        assert same(tensors(models[0]), tensors(models[2]))
        notes = [qcompile.report(model).notes for model in models]
        assert notes[0] == notes[1] == notes[2]
        assert "experts saw" in notes[0][1]

    def test_other_models(self, tmp_path):
        results = []
        for folder in (None, tmp_path, tmp_path):
            torch.manual_seed(0)
            model, x = TinyMLP(), torch.randn(5, 64)
            for tracing in ("export", "module_walk"):
                torch.manual_seed(0)
                model = TinyMLP()
                config = {"scheme": "w8a8_static", "tracing": tracing}
                place = folder and folder / tracing
                qcompile.quantize(model, config, example_inputs=(x,), data=[x], resume=place, progress=False)
                results.append(tensors(model))
        assert all(same(result, results[0]) for result in results)

    @pytest.fixture(scope="class")
    @staticmethod
    def begun(tmp_path_factory):
        """The folder of a run that has only begun."""
        folder = tmp_path_factory.mktemp("begun")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(qcompile.segments.Segments, "look", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                quantize(folder)
        return folder

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"config": "w8a8_static"}, "another plan;"),
            ({"data": torch.full((8, 16), 5)}, "another data;"),
            ({"samples": 3}, "another data;"),
            ({"family": "llama"}, "another model;"),
            ({"rare_experts": "rtn"}, "another choice for rare experts;"),
            ({"config": "w8a8_static", "samples": 3}, "another plan and data;"),
        ],
    )
    def test_another_run_is_refused_before_any_work(self, begun, change, message):
        with pytest.raises(ConfigError, match=message):
            quantize(begun, **change)

    def test_a_folder_of_other_files_is_refused(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("two years of work")
        with pytest.raises(ConfigError, match="a folder of other files"):
            quantize(tmp_path)
        with pytest.raises(ConfigError, match="cannot be used"):
            quantize(tmp_path / "thesis.txt")

    def test_damage_is_explained(self, tmp_path):
        quantize(tmp_path)
        (tmp_path / "part-0002.safetensors").write_bytes(b"damaged")
        with pytest.raises(FormatError, match=r"part-0002.safetensors cannot be read .* delete its folder"):
            quantize(tmp_path)

    def test_nothing_to_resume_is_said(self, tmp_path):
        model = quantize(tmp_path / "new", config="w8a8")
        assert not (tmp_path / "new").exists()
        assert any("nothing was kept for resuming" in note for note in qcompile.report(model).notes)


def test_all_kinds_of_values_come_back(tmp_path):
    x = torch.randn(4, 6)
    values = {"x": x, "view": x[:2], "list": [x.T, 3, None], "flag": True, "half": x.bfloat16()}
    folder = ResumeFolder(tmp_path, {"run": "1"})
    folder.save({}, {"any": [1, 2]}, [values, {}])
    again = ResumeFolder(tmp_path, {"run": "1"})
    assert again.done == 1
    assert again.packed(0, []) == ({}, {"any": [1, 2]})
    first, second = again.inputs(torch.device("cpu"))
    assert second == {}
    assert torch.equal(first["x"], x)
    assert torch.equal(first["view"], x[:2])
    assert torch.equal(first["list"][0], x.T)
    assert first["list"][1:] == [3, None]
    assert first["flag"] is True
    assert torch.equal(first["half"], x.bfloat16())
    assert len(load_file(tmp_path / "inputs.safetensors")) == 4


def test_hashes_tell_runs_apart():
    x = torch.randn(4, 5)
    assert digest([x, ("a", 1)]) == digest([x.clone(), ("a", 1)])
    assert len({digest([x]), digest([x + 1]), digest([x.T]), digest([x.bfloat16()]), digest(["x"])}) == 5
    assert len(sample(torch.randn(100, 100))) <= 1024 * 2
    assert torch.equal(sample(x), x.flatten())
