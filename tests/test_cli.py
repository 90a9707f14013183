"""The command line: exit codes, streams, JSON, and that each command does what the Python API does."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from typer.testing import CliRunner

import qcompile
from qcompile import cli, demo
from qcompile.config import QuantConfig
from qcompile.errors import ConfigError

COMMANDS = ("demo", "inspect", "quantize", "convert", "generate", "eval", "report", "graph", "bench", "schema")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_tokenizer) -> Path:
    """A random two-layer model with a byte-level tokenizer and held-out ids."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    tiny_model(vocab_size=320).save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    save_file({"input_ids": torch.randint(3, 259, (600,), dtype=torch.int16)}, path / "heldout.safetensors")
    return path


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "w4"
    result = invoke("quantize", folder, path, "--config", "w4a16_g32")
    assert result.exit_code == 0, result.output
    return path


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def shell(*arguments, **environment) -> subprocess.CompletedProcess:
    code = "from qcompile.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


class TestHelp:
    def test_lists_commands(self):
        output = invoke("--help").output
        assert all(command in output for command in COMMANDS)
        assert "qcompile demo" in output

    @pytest.mark.parametrize("command", COMMANDS)
    def test_shows_an_example(self, command):
        result = invoke(command, "--help")
        assert result.exit_code == 0
        assert f"Example: qcompile {command}" in result.output

    def test_is_fast(self):
        code = "import sys; from qcompile import cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"

    def test_version(self):
        assert invoke("--version").output.strip() == qcompile.__version__


class TestExitCodes:
    def test_explained_error_is_one_line_and_1(self, tmp_path):
        result = shell("inspect", tmp_path / "nowhere", NO_COLOR="1")
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert "\x1b" not in result.stderr

    def test_usage_error_is_2(self):
        assert shell("quantize").returncode == 2
        assert shell("no-such-command").returncode == 2

    @pytest.mark.skipif(sys.platform == "win32", reason="signals")
    def test_interrupt_is_130(self, folder):
        code = "from qcompile.cli import main; main()"
        arguments = ["generate", str(folder), "--prompt", "a b " * 5, "--max-new-tokens", "100000"]
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a background job's children
        )
        assert process.stdout is not None
        assert process.stdout.read(1)  # the text streams, also into a pipe
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130

    def test_error_inside_a_compilation_is_found(self):
        wrapped = RuntimeError("backend failed")
        wrapped.inner_exception = ConfigError("the reason")
        assert str(cli._explained(wrapped)) == "the reason"
        assert cli._explained(RuntimeError("a bug")) is None


class TestQuantize:
    def test_writes_what_load_reads(self, quantized, folder):
        assert (quantized / "tokenizer.json").is_file()
        model = qcompile.load(quantized)
        assert len(qcompile.report(model).plan.quantized) == 14

    def test_json_and_report(self, folder, tmp_path):
        page = tmp_path / "report.html"
        result = invoke("quantize", folder, tmp_path / "out", "--config", "w8a8", "--report", page, "--json")
        facts = json.loads(result.stdout)
        assert facts["sites_quantized"] == 14
        assert facts["path"] == str(tmp_path / "out")
        assert page.read_text().startswith("<!doctype html>")

    def test_calibrates_on_a_file_and_resumes(self, folder, tmp_path):
        arguments = ("--config", "gptq", "--data", folder / "heldout.safetensors", "--samples", 2, "--sequence", 64)
        results = [
            invoke("quantize", folder, tmp_path / name, *arguments, "--resume", tmp_path / "state", "--json")
            for name in ("first", "second")
        ]
        for result in results:
            facts = json.loads(result.stdout)
            assert facts["sites_quantized"] == 14
            assert facts["notes"][0] == "calibrated on 2 sequences of 64 tokens"
        files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
        assert files[0] == files[1]

    def test_says_that_data_is_missing(self, folder, tmp_path):
        result = invoke("quantize", folder, tmp_path / "out", "--config", "w8a8_static")
        assert result.exit_code == 1
        assert "Pass data=" in str(result.exception)

    def test_refuses_an_existing_folder_before_any_work(self, tmp_path):
        (tmp_path / "out").mkdir()
        result = invoke("quantize", tmp_path / "no-model", tmp_path / "out")
        assert result.exit_code == 1
        assert "--overwrite" in str(result.exception)

    def test_overwrites_on_request(self, folder, tmp_path):
        (tmp_path / "out").mkdir()
        assert invoke("quantize", folder, tmp_path / "out", "--overwrite").exit_code == 0
        assert (tmp_path / "out" / "config.json").is_file()

    @pytest.mark.parametrize("arguments", [["--config", "w9"], ["--report", "no-folder/report.html"]])
    def test_wrong_options_are_explained_before_any_work(self, arguments, tmp_path):
        result = invoke("quantize", tmp_path / "no-model", tmp_path / "out", *arguments)
        assert result.exit_code == 1
        assert isinstance(result.exception, ConfigError)
        assert "no-model" not in str(result.exception)

    def test_config_file(self, folder, tmp_path):
        config = tmp_path / "config.yaml"
        config.write_text("scheme: w8a16\nrules:\n- {match: '*.down_proj', scheme: float}\n")
        facts = json.loads(invoke("quantize", folder, tmp_path / "out", "--config", config, "--json").stdout)
        assert facts["sites_quantized"] == 12


class TestInspect:
    def test_text_and_json(self, quantized):
        assert "model.layers.{0,1}.self_attn.q_proj" in invoke("inspect", quantized).stdout
        facts = json.loads(invoke("inspect", quantized, "--json").stdout)
        assert (facts["device"], facts["sites_quantized"]) == ("cpu", 14)

    def test_how_a_float_checkpoint_would_be_quantized(self, folder, quantized):
        """Also for a device that is not there, and by a method whose data only quantizing needs."""
        facts = json.loads(invoke("inspect", folder, "--config", "awq", "--device", "npu", "--json").stdout)
        assert (facts["device"], facts["sites_quantized"]) == ("npu", 14)
        result = invoke("inspect", quantized, "--config", "w8a16")
        assert result.exit_code == 1
        assert "is quantized already, as compressed-tensors; leave out the config" in str(result.exception)

    def test_damage_is_1(self, quantized, tmp_path):
        import shutil

        broken = shutil.copytree(quantized, tmp_path / "broken")
        for file in broken.glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:100])
        assert invoke("inspect", broken).exit_code == 1


class TestEval:
    def test_reference_and_its_held_out_ids(self, quantized, folder):
        facts = json.loads(invoke("eval", quantized, "--reference", folder, "--json", "--sequence", "64").stdout)
        assert facts["tokens"] == 576
        assert 0 < facts["divergence"] < 0.5
        assert facts["perplexity"] == pytest.approx(facts["reference_perplexity"], rel=0.2)

    def test_text_file(self, folder, tmp_path):
        text = tmp_path / "text.txt"
        text.write_text("hello world " * 20)
        output = invoke("eval", folder, "--text", text, "--sequence", "32", "--max-tokens", "100").stdout
        assert re.match(r"perplexity [\d.]+ on 96 tokens in windows of 32\n", output)

    def test_no_text_is_explained(self, quantized):
        result = invoke("eval", quantized)
        assert result.exit_code == 1
        assert "--text" in str(result.exception)


class TestGenerate:
    @pytest.mark.parametrize("options", [[], ["--temperature", "0.8", "--seed", "3"]])
    def test_streams_the_prompt_and_more(self, quantized, options):
        first = invoke("generate", quantized, "--prompt", "hello", "--max-new-tokens", "8", *options)
        assert first.exit_code == 0
        assert first.stdout.startswith("hello")
        assert (
            first.stdout == invoke("generate", quantized, "--prompt", "hello", "--max-new-tokens", "8", *options).stdout
        )

    @pytest.mark.slow
    def test_compiled(self, quantized, fresh_dynamo):
        arguments = ["generate", quantized, "--prompt", "hello", "--max-new-tokens", "4"]
        assert invoke(*arguments, "--compile").stdout.startswith("hello")

    def test_empty_prompt(self, folder):
        assert isinstance(invoke("generate", folder, "--prompt", "").exception, ConfigError)


class TestReport:
    def test_text_json_and_html(self, quantized, tmp_path):
        page = tmp_path / "report.html"
        result = invoke("report", quantized, "--html", page, "--json")
        assert json.loads(result.stdout)["sites_quantized"] == 14
        assert page.read_text().startswith("<!doctype html>")
        assert list(tmp_path.iterdir()) == [page]  # nothing temporary is left
        assert "14 of 15 sites quantized" in invoke("report", quantized).stdout


class TestGraph:
    def test_writes_a_picture_and_tells_the_changes(self, folder, tmp_path):
        picture = tmp_path / "graph.svg"
        result = invoke("graph", folder, "--config", "w8a8", "--block", 1, "--out", picture)
        assert result.exit_code == 0, result.output
        assert "- qcompile.quantize" in result.stdout
        assert picture.read_text().startswith("<svg")

    def test_no_such_block_or_pass(self, quantized, tmp_path):
        for arguments, words in ((("--block", 9), "no decoder block 9"), (("--pass", "lowr"), "Did you mean 'lower'")):
            result = invoke("graph", quantized, "--out", tmp_path / "graph.svg", *arguments)
            assert result.exit_code == 1
            assert words in str(result.exception)
        assert not any(tmp_path.iterdir())


class TestBench:
    def test_measures(self, quantized):
        arguments = ("--no-compile", "--prompt-tokens", 4, "--new-tokens", 3, "--json")
        facts = json.loads(invoke("bench", quantized, *arguments).stdout)
        assert facts["eager_tokens_per_second"] > 0
        assert facts["bytes"] > 100_000


class TestShell:
    def test_schema_describes_every_option(self):
        described = json.loads(invoke("schema").stdout)
        assert described["properties"].keys() == QuantConfig.model_fields.keys()
        for part in (described, described["$defs"]["Rule"]):
            assert all("description" in option for option in part["properties"].values())
            assert part["additionalProperties"] is False

    def test_completes(self):
        environment = {"_QCOMPILE_COMPLETE": "complete_bash", "COMP_WORDS": "qcompile qu", "COMP_CWORD": "1"}
        assert shell(**environment).stdout.split() == ["quantize"]

    def test_a_reader_that_leaves_is_no_error(self, quantized):
        code = "import sys; from qcompile.cli import main; sys.argv[0] = 'qcompile'; main()"
        line = f'{sys.executable} -c "{code}" inspect {quantized} --json | head -c 1'
        result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
        assert (result.stdout, result.stderr) == ("{", "")


class TestDemo:
    def test_no_model_is_explained(self, tmp_path):
        result = invoke("demo", "--model", tmp_path)
        assert result.exit_code == 1
        assert "no model in" in str(result.exception)

    @pytest.mark.slow
    def test_table_and_report(self, folder, tmp_path, monkeypatch, fresh_dynamo):
        monkeypatch.setattr(demo, "SCHEMES", ("w8a16",))
        monkeypatch.setattr(demo, "NEW_TOKENS", 4)
        page = tmp_path / "report.html"
        result = invoke("demo", "--model", folder, "--out", page)
        assert result.exit_code == 0, result.output
        assert all(word in result.stdout for word in ("float", "w8a16", "perplexity", "compiled tok/s", str(page)))
        assert "Coverage" in page.read_text()
