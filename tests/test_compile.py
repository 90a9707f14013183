"""The Dynamo backend: same numbers as eager, few compilations, blocks compiled once, nothing stale."""

import copy
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import logits, tiny_model
from moe_models import tiny_moe
from torch import nn

import qcompile
from qcompile.backends.cpu import native
from qcompile.compile import parse_options
from qcompile.errors import ConfigError
from qcompile.verify import close

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def quantized(scheme="w4a16_g32", dtype=torch.float32, **changes):
    return qcompile.quantize(tiny_model(dtype=dtype, **changes), scheme)


def compilations(model) -> int:
    return len(qcompile.report(model).graphs)


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 150, (batch, length))


@pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "w8a16", "w8a8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_equals_eager_whatever_the_shape_and_is_compiled_once(scheme, dtype):
    model = quantized(scheme, dtype)
    compiled = torch.compile(model, backend="qcompile", fullgraph=True)
    for shape in ((2, 12), (3, 7), (5, 30)):
        tokens = ids(*shape)
        assert close(logits(compiled, tokens), logits(model, tokens), factor=4)
    assert compilations(compiled) == 1


def test_generate_runs_compiled_and_new_lengths_and_batches_add_nothing():
    model = quantized("w8a16")
    compiled = torch.compile(model, backend="qcompile")
    settings = {"max_new_tokens": 6, "do_sample": False}

    def generate(target, batch, length, **more):
        torch.manual_seed(1)
        return target.generate(ids(batch, length), **{**settings, **more})

    for batch, length in ((2, 5), (2, 9), (3, 11)):
        assert torch.equal(generate(compiled, batch, length), generate(model, batch, length))
    after_dynamic = compilations(compiled)
    assert 0 < after_dynamic <= 3  # prefill, the first decode step (transposed keys), decode
    for batch, length in ((2, 5), (4, 9)):
        more = {"cache_implementation": "static"}
        assert torch.equal(generate(compiled, batch, length, **more), generate(model, batch, length, **more))
    assert compilations(compiled) <= after_dynamic + 4
    seen = compilations(compiled)
    torch.manual_seed(3)
    sampled = compiled.generate(ids(3, 8), max_new_tokens=6, do_sample=True, top_k=20)
    torch.manual_seed(3)
    assert torch.equal(sampled, model.generate(ids(3, 8), max_new_tokens=6, do_sample=True, top_k=20))
    assert compilations(compiled) == seen


def test_left_padding_changes_no_row():
    model = quantized("w4a16_g32")
    compiled = torch.compile(model, backend="qcompile")
    short, long = ids(1, 4), ids(1, 9)
    padded = torch.cat([torch.zeros((1, 5), dtype=torch.long), short], 1)
    mask = (torch.arange(9) >= 5).long()[None]
    both = compiled.generate(
        torch.cat([padded, long]),
        attention_mask=torch.cat([mask, torch.ones_like(mask)]),
        max_new_tokens=5,
        do_sample=False,
    )
    for row, prompt in zip(both, (short, long), strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
        assert row[9:].tolist() == alone[0, prompt.shape[1] :].tolist()


def test_generate_of_the_original_model_stays_uncompiled():
    model = quantized()
    torch.compile(model, backend="qcompile")
    model.generate(ids(1, 4), max_new_tokens=2, do_sample=False)
    assert compilations(model) == 0


def test_other_backends_are_left_alone():
    torch.compile(nn.Linear(2, 2), backend="qcompile")  # loads the entry point
    model = tiny_model()
    compiled = torch.compile(model, backend="eager")
    assert "generate" not in compiled.__dict__
    assert compiled.generate(ids(1, 4), max_new_tokens=2, do_sample=False).shape == (1, 6)


@pytest.mark.parametrize("layers", [1, 4])
def test_equal_blocks_are_compiled_once(layers):
    model = quantized(num_hidden_layers=layers)
    compiled = torch.compile(model, backend="qcompile")
    whole = torch.compile(copy.deepcopy(model), backend="qcompile", options={"regions": False})
    tokens = ids(2, 9)
    assert close(logits(compiled, tokens), logits(whole, tokens))
    graph = qcompile.report(compiled).graphs[0]
    # one block is cut at its two ends only; four are a prologue, four blocks of which three are reused, an epilogue
    assert (graph.regions, graph.compiled_regions) == ((3, 3) if layers == 1 else (6, 3))


def test_no_piece_waits_for_the_compiler_before_the_last_is_lowered(monkeypatch):
    from torch._inductor import compile_fx
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.utils import fresh_cache

    events, lower, wait = [], compile_fx.compile_fx_inner, AsyncCompile._wait_futures
    monkeypatch.setattr(compile_fx, "compile_fx_inner", lambda *a, **k: events.append("lower") or lower(*a, **k))
    monkeypatch.setattr(AsyncCompile, "_wait_futures", lambda *args: events.append("wait") or wait(*args))
    model = quantized()
    compiled = torch.compile(model, backend="qcompile")
    with fresh_cache(), torch._inductor.config.patch(compile_threads=2):  # monkeypatch would delete the setting after
        assert close(logits(compiled), logits(model))
    assert events == ["lower"] * 3 + ["wait"] * 3


def test_blocks_that_differ_are_compiled_apart():
    model = tiny_model(num_hidden_layers=3, dtype=torch.float32)
    qcompile.quantize(model, {"scheme": "w4a16_g32", "rules": [{"match": "model.layers.1.*", "scheme": "w8a16"}]})
    compiled = torch.compile(model, backend="qcompile")
    assert close(logits(compiled), logits(model))
    graph = qcompile.report(compiled).graphs[0]
    assert (graph.regions, graph.compiled_regions) == (5, 4)


def test_a_plain_module_compiles():
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 7))
    qcompile.quantize(model, "w4a16_g32", example_inputs=(torch.randn(3, 64),))
    compiled = torch.compile(model, backend="qcompile", fullgraph=True)
    for rows in (4, 9):
        x = torch.randn(rows, 64)
        with torch.no_grad():
            assert close(compiled(x), model(x))


def test_the_activation_is_quantized_once_for_all_its_readers():
    model = quantized("w8a8")
    compiled = torch.compile(model, backend="qcompile")
    logits(compiled)
    records = {record.name: record for record in qcompile.report(compiled).graphs[0].passes}
    assert records["share_activation_quant"].matches == 2 * (2 + 1)  # k, v after q; up after gate; two layers
    assert records["fuse_norm_quant"].matches == 2 * 2
    assert records["fuse_gated_act_quant"].matches == 2
    # a layer: two norms and the gated activation with their quantizations, the norms of q and k, the quantization
    # before o_proj, attention, seven products, or four where q, k and v and gate and up are one; then the last norm
    products = 7 if native.unavailable() else 4
    assert records["merge_linears"].matches == (0 if native.unavailable() else 2 * 2)
    assert records["lower"].matches == 2 * (3 + 2 + 1 + products + 1) + 1


class TestFloatModel:
    def test_is_quantized_at_the_first_call_and_packed_once(self):
        model = tiny_model(dtype=torch.float32).requires_grad_(False)
        expected = qcompile.quantize(copy.deepcopy(model), "w4a16_g32")
        compiled = torch.compile(model, backend="qcompile", options={"config": "w4a16_g32"})
        first, second = ids(2, 12), ids(1, 1)
        assert close(logits(compiled, first), logits(expected, first))
        assert close(logits(compiled, second), logits(expected, second))
        report = qcompile.report(compiled)
        assert report.coverage == 1.0
        assert len(report.plan.quantized) == 14
        assert len(report.graphs) == 2
        assert any("keeps its float weights" in note for note in report.notes)

    def test_without_a_config_it_is_an_error_and_on_request_it_is_not(self):
        model = tiny_model(dtype=torch.float32).requires_grad_(False)
        with pytest.raises(Exception, match=r"nothing in this graph is quantized.*options=\{'config': 'rtn'\}"):
            logits(torch.compile(model, backend="qcompile"))
        torch._dynamo.reset()
        allowed = torch.compile(model, backend="qcompile", options={"allow_float": True})
        assert close(logits(allowed), logits(model))

    def test_float_experts_are_traced_without_warnings_about_caches(self):
        """transformers compares versions of torch in what is traced, through an lru_cache of which Dynamo warns."""
        model = tiny_moe("qwen3_moe").bfloat16().eval()  # what float32 takes compares no versions
        torch.compile(model, backend="qcompile")
        torch._dynamo.utils.warn_once_cache.clear()
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            torch.compile(model, backend="eager", fullgraph=True)(ids(1, 4))  # all that is traced, not compiled
        assert not [str(warning.message) for warning in caught if "lru_cache" in str(warning.message)]

    def test_a_rule_that_matches_nothing_is_an_error(self):
        model = tiny_model(dtype=torch.float32).requires_grad_(False)
        config = {"scheme": "w4a16_g32", "rules": [{"match": "*.down_porj", "scheme": "w8a16"}]}
        with pytest.raises(Exception, match=r"rule '.*down_porj' matches no site"):
            logits(torch.compile(model, backend="qcompile", options={"config": config}))


class TestOptions:
    @pytest.mark.parametrize(
        ("mode", "options", "message"),
        [
            ("max-autotun", None, "unknown mode 'max-autotun'. Did you mean 'max-autotune'"),
            (None, {"confg": "rtn"}, "unknown option 'confg'. Did you mean 'config'"),
            (None, {"max_autotun": True}, "unknown option 'max_autotun'. Did you mean 'max_autotune'"),
            (None, {"config": "rtm"}, "unknown preset 'rtm'. Did you mean 'rtn'"),
            (None, {"regions": "yes"}, "option 'regions' must be True or False"),
        ],
    )
    def test_wrong_ones_are_errors(self, mode, options, message):
        with pytest.raises(ConfigError, match=message):
            parse_options(mode, options)

    def test_modes_and_inductor_settings_become_patches(self):
        own, patches = parse_options(
            "max-autotune-no-cudagraphs", {"regions": False, "cpp.enable_kernel_profile": True}
        )
        assert own.regions is False
        assert patches["max_autotune"] is True
        assert patches["cpp.enable_kernel_profile"] is True


def test_training_through_a_quantized_model_is_refused():
    model = quantized()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def run_python(code: str, **environment: str) -> dict:
    """Run a script in a fresh process; it prints one line of JSON last."""
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_the_backend_is_found_without_importing_qcompile(tmp_path):
    model = qcompile.quantize(nn.Sequential(nn.Linear(32, 32)), "w4a16_g32", example_inputs=(torch.ones(2, 32),))
    torch.save(model, tmp_path / "model.pt")
    x = torch.randn(3, 32)
    torch.save((x, model(x)), tmp_path / "x.pt")
    facts = run_python(f"""
import json, sys, torch
compiler = torch.compile(lambda m, x: m(x), backend="qcompile", dynamic=True)
model = torch.load(r"{tmp_path / "model.pt"}", weights_only=False)
x, y = torch.load(r"{tmp_path / "x.pt"}")
with torch.no_grad():
    error = (compiler(model, x) - y).abs().max().item()
print(json.dumps({{"error": error}}))
""")
    assert facts["error"] < 1e-4


_CACHED = """
import json, torch, qcompile
from torch._dynamo.utils import counters
torch.manual_seed(0)
x = torch.randn(2, 64)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
qcompile.quantize(model, "w4a16_g32", example_inputs=(x,))
compiled = torch.compile(model, backend="qcompile")
{change}
result = compiled(x)
inductor = counters["inductor"]
print(json.dumps({{"hits": inductor["fxgraph_cache_hit"], "misses": inductor["fxgraph_cache_miss"],
                   "sum": result.double().abs().sum().item()}}))
"""
_CHANGE = """
kernel = type(qcompile.ops.find_kernel(model[0].kernel))
original = kernel.linear
kernel.linear = lambda *a, **k: 2 * original(*a, **k)
"""


def test_processes_share_compiled_code_and_a_changed_kernel_is_never_stale(tmp_path):
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    first = run_python(_CACHED.format(change=""), **cache)
    second = run_python(_CACHED.format(change=""), **cache)
    changed = run_python(_CACHED.format(change=_CHANGE), **cache)
    assert (first["hits"], second["misses"]) == (0, 0)
    assert second["hits"] == first["misses"] > 0
    assert second["sum"] == pytest.approx(first["sum"], rel=1e-5)
    assert changed["misses"] > 0
    assert changed["sum"] != pytest.approx(first["sum"], rel=1e-3)


def test_a_package_runs_in_a_fresh_process_with_torch_alone(tmp_path):
    model = quantized("w8a8", torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        path = qcompile.export(model, tmp_path / "model.pt2")
    tokens = ids(3, 10)
    torch.save(tokens, tmp_path / "tokens.pt")
    facts = run_python(f"""
import json, sys, torch
run = torch._inductor.aoti_load_package(r"{path}")
tokens = torch.load(r"{tmp_path / "tokens.pt"}")
result = run(tokens)
torch.save(result, r"{tmp_path / "result.pt"}")
names = [name for name in sys.modules if name.split(".")[0] in ("qcompile", "transformers")]
print(json.dumps({{"shape": list(run(tokens[:1, :4]).shape), "imported": names}}))
""")
    assert facts == {"shape": [1, 4, 160], "imported": []}
    assert close(torch.load(tmp_path / "result.pt"), logits(model, tokens), factor=4)
    with pytest.raises(ConfigError, match="exists; pass overwrite=True"):
        qcompile.export(model, path)
    with pytest.raises(ConfigError, match=r"ends in \.pt2"):
        qcompile.export(model, tmp_path / "model.bin")
