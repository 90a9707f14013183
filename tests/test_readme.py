"""What the README shows is there."""

import ast
import re
import shlex
from pathlib import Path

import typer
import yaml

import qcompile
from qcompile.cli import app
from qcompile.config import as_config
from qcompile.types import Scheme

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_configuration_is_one():
    (text,) = blocks("yaml")
    config = as_config(yaml.safe_load(text))
    assert [rule.scheme for rule in config.rules] == ["w8a16", "w4a16_g32_asym", "float"]


def test_the_story_uses_what_is_public():
    code = "\n".join(blocks("python"))
    used = {
        node.attr
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qcompile"
    }
    assert {"plan", "quantize", "report", "save", "load", "export", "dequantize"} <= used <= set(qcompile.__all__)


def test_the_commands_exist_with_their_options():
    commands = typer.main.get_command(app).commands
    steps = [step.strip() for block in blocks("sh") for line in block.splitlines() for step in line.split("&&")]
    lines = [step for step in steps if step.startswith("qcompile ")]
    seen = set()
    for line in lines:
        _, name, *arguments = shlex.split(line, comments=True)
        seen.add(name)
        commands[name].make_context(name, arguments)  # parses, and runs nothing
    assert seen == {"demo", "inspect", "quantize", "convert", "generate", "eval", "report", "graph", "bench", "schema"}


def test_the_schemes_exist_and_have_those_kernels():
    rows = re.findall(r"^\| (`w\d.*|`w[a-z].*) \| .* \| .* \| `(\w+)` \|$", README, re.MULTILINE)
    names = [(name, kernel) for cell, kernel in rows for name in re.findall(r"`(w[^`]+)`", cell)]
    assert len(names) > 12
    for name, kernel in names:
        scheme = Scheme.parse(name)
        assert kernel in ("native", "reference")
        assert (scheme.weight.number == "int") == (kernel == "native")
