"""Passes of users: added, installed and left out; held to what they declare; never served stale."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qcompile.passes.base import Edit, Result, apply_rules, semantic_name
from qcompile.passes.pipeline import compile_passes
from test_passes_canonicalize import aot_graph
from torch import nn

import qcompile
from qcompile import compile as compiler
from qcompile.compile import parse_options
from qcompile.errors import ConfigError, PassError
from qcompile.verify import probe_inputs, run_pass

ROOT = Path(__file__).parents[1]


class Custom:
    """A pass whose every declaration can be given; ``change`` edits the graph."""

    level, numerics, expected = "aot", "lossy", None

    def __init__(self, change=None, **declared):
        self.name, self.change = "custom", change or (lambda graph: 1)
        self.__dict__.update(declared)

    def __call__(self, module):
        return Result(self.change(module.graph))


def mlp():
    return nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 8)).eval()


def quantized(scheme="w8a8"):
    return qcompile.quantize(mlp(), scheme, example_inputs=(torch.randn(3, 32),))


class TestOrder:
    def names(self, *asked):
        return [pass_.name for pass_ in compile_passes(None, asked)]

    def test_a_pass_runs_before_lower_or_where_it_says(self):
        assert self.names(Custom())[-2:] == ["custom", "lower"]
        assert self.names(Custom(before="fuse_norm_quant")).index("custom") + 1 == self.names(
            Custom(before="fuse_norm_quant")
        ).index("fuse_norm_quant")

    def test_a_class_makes_a_new_pass_for_every_graph(self):
        first, second = (compile_passes(None, [Custom])[-2] for _ in range(2))
        assert isinstance(first, Custom)
        assert first is not second

    def test_ours_can_be_left_out(self):
        assert "canonicalize" not in self.names("-canonicalize")

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ("-canonicalise", "there is no pass 'canonicalise' to leave out. Did you mean 'canonicalize'"),
            ("-lower", "'lower' cannot be left out"),
            ("mine", "no installed package offers a pass 'mine'"),
            (3, "3 is no pass: it has no name, level, numerics, expected"),
            (Custom(before="lowering"), "wants to run before 'lowering'. Did you mean 'lower'"),
            (Custom(numerics="roughly"), "declares numerics 'roughly', not exact, reorder or lossy"),
        ],
    )
    def test_what_is_no_pass_is_an_error_before_any_work(self, asked, message):
        with pytest.raises(ConfigError, match=message):
            parse_options(None, {"passes": [asked]})

    def test_other_wrong_options(self):
        with pytest.raises(ConfigError, match="option 'passes' must be a list"):
            parse_options(None, {"passes": Custom()})
        with pytest.raises(ConfigError, match="'verify' must be 'shapes' or 'numbers', not 'all'"):
            parse_options(None, {"verify": "all"})

    def test_an_installed_package_offers_passes_by_name(self, tmp_path, monkeypatch):
        (tmp_path / "their_pass.py").write_text(
            "from qcompile.passes.base import Result\n"
            "class Theirs:\n"
            "    name, level, numerics, expected = 'theirs', 'aot', 'exact', None\n"
            "    def __call__(self, module): return Result(7)\n"
        )
        info = tmp_path / "their_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[qcompile.passes]\ntheirs = their_pass:Theirs\n")
        monkeypatch.syspath_prepend(tmp_path)
        assert self.names("theirs")[-2:] == ["theirs", "lower"]
        with pytest.raises(ConfigError, match=r"a pass 'their'.*Did you mean 'theirs'"):
            self.names("their")


def last_call(graph):
    return [node for node in graph.nodes if node.op == "call_function"][-1]


def insert(graph, target, *more, value=None, replaces=True):
    """Put ``target(last, *more)`` behind the last node; says that its value is ``value``."""
    last = last_call(graph)
    with graph.inserting_after(last):
        new = graph.call_function(target, (last, *more))
    new.meta["val"] = last.meta["val"] if value is None else value(last.meta["val"])
    if replaces:
        last.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return 1


class Silent(Custom):
    def __call__(self, module):
        pass


BREACHES = {
    "a number": (
        Custom(lambda graph: insert(graph, torch.ops.aten.add.Tensor, 1.0), numerics="exact"),
        r"custom promises numerics 'exact', but the output add_tensor changed on the probe, by 1",
    ),
    "a shape": (
        Custom(lambda graph: insert(graph, torch.ops.aten.unsqueeze.default, 0, value=lambda v: v.unsqueeze(0))),
        r"custom changed the graph's output unsqueeze_default from .* to .*: shape, dtype and device must stay",
    ),
    "a lie": (
        Custom(lambda graph: insert(graph, torch.ops.aten.unsqueeze.default, 0)),
        r"custom inserted unsqueeze_default, a call of aten.unsqueeze.default, as .* but it computes",
    ),
    "nonsense": (
        Custom(lambda graph: insert(graph, torch.ops.aten.permute.default, [0, 0, 0])),
        r"custom inserted permute_default, which cannot run",
    ),
    "a mutation": (
        Custom(lambda graph: insert(graph, torch.ops.aten.mul_.Tensor, 1)),
        r"custom inserted mul__tensor, .* overwrites its inputs: .* or declare mutates = True",
    ),
    "a count": (Custom(expected=2), r"custom matched 1 of 2: nothing came close"),
    "a crash": (Custom(lambda graph: 1 / 0), r"custom failed: ZeroDivisionError"),
    "no result": (Silent(), r"custom returned None, not a Result that says how often it matched"),
    "a level": (Custom(level="cloud"), r"custom declares the level 'cloud'; there are 'model' and 'aot'"),
}


class TestContracts:
    @pytest.mark.parametrize("breach", BREACHES)
    def test_the_error_names_pass_node_and_contract(self, breach):
        pass_, message = BREACHES[breach]
        inputs = (torch.randn(2, 3),)
        with pytest.raises(PassError, match=message):
            run_pass(pass_, aot_graph(torch.sin, *inputs), inputs)

    def test_a_declared_mutation_is_allowed(self):
        inputs = (torch.randn(2, 3),)
        pass_ = Custom(lambda graph: insert(graph, torch.ops.aten.mul_.Tensor, 1), mutates=True)
        assert run_pass(pass_, aot_graph(torch.sin, *inputs), inputs).matches == 1

    def test_a_graph_of_another_level_is_refused(self):
        module = torch.fx.symbolic_trace(lambda x: x.sin())
        with pytest.raises(PassError, match="works on the graph of AOTAutograd, but sin is a call_method"):
            run_pass(Custom(), module)

    def test_a_probe_must_fit(self):
        module = aot_graph(torch.add, torch.randn(2, 3), torch.randn(2, 3))
        with pytest.raises(PassError, match="the graph has 2 inputs of other shapes than the 1 that the call has"):
            probe_inputs(module, [torch.randn(2, 3)])

    def test_inputs_that_a_graph_overwrites_are_copied(self):
        def update(cache, x):
            cache.copy_(cache + x)
            return cache * 1

        cache, x = torch.zeros(3), torch.ones(3)
        module = aot_graph(update, cache, x)
        run_pass(Custom(numerics="exact"), module, (cache, x))
        assert torch.equal(cache, torch.zeros(3))


@pytest.mark.usefixtures("fresh_dynamo")
class TestCompiled:
    @pytest.fixture
    def passes_only(self, monkeypatch):
        monkeypatch.setattr(compiler._Inner, "_compile", lambda self, module, inputs, kwargs: (module.forward, 1, 1))

    def test_a_custom_pass_is_in_the_report(self, passes_only):
        model = quantized()
        compiled = torch.compile(model, backend="qcompile", options={"passes": [Custom(), "-canonicalize"]})
        x = torch.randn(3, 32)
        with torch.no_grad():
            assert torch.allclose(compiled(x), model(x), atol=1e-5)
        (graph,) = qcompile.report(compiled).graphs
        assert [record.name for record in graph.passes][-2:] == ["custom", "lower"]
        assert "canonicalize" not in [record.name for record in graph.passes]
        assert graph.passes[-2].matches == 1

    def test_a_breach_stops_the_compilation(self, passes_only):
        options = {"passes": [BREACHES["a number"][0]], "verify": "numbers"}
        compiled = torch.compile(quantized(), backend="qcompile", options=options)
        with pytest.raises(Exception, match=r"PassError: pass custom promises numerics 'exact'"), torch.no_grad():
            compiled(torch.randn(3, 32))

    def test_codes_that_may_differ_by_a_step_hide_no_wrong_number(self, passes_only):
        scaled = Custom(lambda graph: insert(graph, torch.ops.aten.mul.Tensor, 1.1), numerics="reorder")
        model = quantized("w8a8")
        compiled = torch.compile(model, backend="qcompile", options={"passes": [scaled], "verify": "numbers"})
        with pytest.raises(Exception, match=r"PassError: pass custom promises numerics 'reorder'"), torch.no_grad():
            compiled(torch.randn(3, 32))

    def test_without_its_partner_a_pass_changes_nothing_but_its_own_matches(self, passes_only):
        model = quantized()
        x = torch.randn(3, 32)
        results = []
        for asked in ([], ["-share_activation_quant", "-fuse_norm_quant", "-fuse_gated_act_quant", "-canonicalize"]):
            torch._dynamo.reset()
            with torch.no_grad():
                results.append(torch.compile(model, backend="qcompile", options={"passes": asked})(x))
        assert torch.equal(*results)


_STALE = """
import json, sys, torch, qcompile
from qcompile.passes.base import Result, apply_rules, semantic_name
sys.path.insert(0, {tests!r})
from test_passes_contracts import Scaled
torch.manual_seed(0)
x = torch.randn(2, 64)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
qcompile.quantize(model, "w8a16", example_inputs=(x,))
with torch.no_grad():
    sums = []
    for factor in (1.0, 3.0):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="qcompile", options={{"passes": [Scaled(factor)]}})
        sums.append(compiled(x).double().abs().sum().item())
print(json.dumps(sums))
"""


class Scaled:
    """Multiplies what every quantized linear gives: its code depends on nothing that the model could tell."""

    name, level, numerics, expected = "scaled", "aot", "lossy", None

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module):
        return apply_rules([self], module, self.name)

    def pattern(self, node):
        return node if semantic_name(node) == "linear" and "scaled" not in node.meta else None

    def check(self, node):
        return ""

    def rewrite(self, node, edit: Edit):
        node.meta["scaled"] = True
        product = edit.call(node.next, torch.ops.aten.mul.Tensor, (node, self.factor), like=node)
        node.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)


@pytest.mark.slow
def test_neither_process_nor_disk_serves_code_of_another_pass(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    code = _STALE.format(tests=str(ROOT / "tests"))
    for _ in range(2):  # the second process finds a filled cache
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        plain, scaled = json.loads(done.stdout.splitlines()[-1])
        assert scaled > 2 * plain


@pytest.mark.slow
def test_the_example_runs(capsys):
    torch._dynamo.reset()
    runpy.run_path(str(ROOT / "examples" / "custom_pass.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert any("approximate_gelu           2 matches" in line for line in lines)
    assert any("torch.float32 shows the difference" in line for line in lines)
    assert lines[-1].startswith("declared exact: PassError: pass approximate_gelu promises numerics 'exact'")
