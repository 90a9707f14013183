"""Attention to shared heads: the CPU's own kernel, and the pass that saves the copies of keys and values."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from qcompile.passes.attend_shared_heads import AttendSharedHeads
from qcompile.passes.lower import Lower
from test_passes_canonicalize import aot_graph
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional as F

import qcompile
from qcompile.backends.cpu import native
from qcompile.labels import op
from qcompile.verify import run_pass

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}
built = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())


def exact(q, k, v, mask, scale):
    """The same in float64, with heads repeated."""
    times = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(times, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q.double(), k, v, None if mask is None else mask.double(), scale=scale)


def assert_close(found, expected):
    assert (found - expected).abs().max() <= TOLERANCE[found.dtype] * expected.abs().max()


# --------------------------------------------------------------------------------------------------------- the kernel


@built
@pytest.mark.parametrize("dtype", TOLERANCE)
@given(st.data())
def test_attention_of_any_shape_and_strides(dtype, data):
    draw = data.draw
    batch, shared = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    heads, positions = shared * draw(st.integers(1, 7)), draw(st.integers(1, 600))
    width, value_width = (16 * draw(st.integers(1, 12)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 1000)))
    q = torch.randn(batch, 1, heads, width, dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(batch, shared, positions + 3, w, dtype=dtype) for w in (width, value_width))
    k = k[:, :, 1:-2] if draw(st.booleans()) else k[:, :, 2:-1].mT.contiguous().mT
    v = v[:, :, :-3] if draw(st.booleans()) else v[:, :, 3:].transpose(1, 2).contiguous().transpose(1, 2)
    mask = None
    if draw(st.booleans()):
        of = draw(st.sampled_from([(1, 1), (batch, 1), (1, heads), (batch, heads)]))
        mask = torch.randn(*of, 1, positions).masked_fill(torch.rand(*of, 1, positions) > 0.6, -torch.inf)
        mask[..., draw(st.integers(0, positions - 1))] = 0
        mask = mask.to(dtype)
    assert_close(torch.ops.qcompile_cpu.attend(q, k, v, mask, 0.3), exact(q, k, v, mask, 0.3))


@built
def test_the_unused_end_of_a_static_cache_is_not_read():
    """Whatever lies there; who may see nothing gets zeros."""
    q, k, v = torch.randn(2, 6, 1, 32), torch.randn(2, 3, 900, 32), torch.randn(2, 3, 900, 32)
    mask = torch.zeros(2, 1, 1, 900)
    mask[0, ..., 300:] = mask[1] = -torch.inf
    expected = exact(q[:1], k[:1, :, :300], v[:1, :, :300], None, 0.2)
    k[0, :, 300:], v[0, :, 300:] = torch.nan, torch.inf
    found = torch.ops.qcompile_cpu.attend(q, k, v, mask, 0.2)
    assert_close(found[:1], expected)
    assert not found[1].any()


@built
def test_large_scores_do_not_overflow():
    q, k, v = torch.randn(1, 4, 1, 64) * 100, torch.randn(1, 2, 500, 64) * 100, torch.randn(1, 2, 500, 64)
    assert_close(torch.ops.qcompile_cpu.attend(q, k, v, None, 1.0), exact(q, k, v, None, 1.0))


@built
@pytest.mark.parametrize("where", ["query", "key", "value", "every key"])
def test_nan_is_not_hidden(where):
    q, k, v = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 300, 32), torch.randn(1, 2, 300, 32)
    {"query": q, "key": k[:, :, 290:291], "value": v[:, :, 7:8], "every key": k}[where].fill_(torch.nan)
    assert torch.ops.qcompile_cpu.attend(q, k, v, None, 0.2).isnan().all()


@built
def test_the_same_bits_on_any_number_of_threads():
    q, k, v = (torch.randn(1, h, n, 64).bfloat16() for h, n in ((12, 1), (4, 1500), (4, 1500)))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.qcompile_cpu.attend(q, k, v, None, 0.1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@built
@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (((1, 4, 2, 32), (1, 2, 9, 32), (1, 2, 9, 32)), "one query row"),
        (((1, 4, 1, 32), (1, 3, 9, 32), (1, 3, 9, 32)), "do not fit"),
        (((1, 4, 1, 32), (1, 2, 9, 32), (1, 2, 8, 32)), "do not fit"),
        (((1, 4, 1, 24), (1, 2, 9, 24), (1, 2, 9, 24)), "multiples of 16 wide, not 24"),
    ],
)
def test_what_does_not_fit_is_an_error(shapes, reason):
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.qcompile_cpu.attend(*map(torch.randn, shapes), None, 1.0)


@built
def test_the_op_keeps_the_rules_of_torch():
    q, k, v = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 9, 32), torch.randn(2, 2, 9, 48)
    torch.library.opcheck(torch.ops.qcompile_cpu.attend.default, (q, k, v, torch.randn(2, 1, 1, 9), 0.5))


@built
@pytest.mark.slow
def test_every_older_instruction_set_gives_the_same_numbers():
    """In processes of their own: a library is loaded once."""
    levels = list(native.LEVELS)
    for level in levels[levels.index(native.instruction_set()) + 1 :]:
        command = [sys.executable, "-m", "pytest", "-n", "0", "-q", __file__, "-k", "shape or unused or large or nan"]
        environment = os.environ | {native.ISA_VARIABLE: level}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:]


# ----------------------------------------------------------------------------------------------------------- the pass


def attention(q, k, v, mask=None, times=2, **more):
    """As models write it: heads repeated, then attention."""
    k, v = (
        t[:, :, None].expand(t.shape[0], t.shape[1], times, *t.shape[2:]).reshape(t.shape[0], -1, *t.shape[2:])
        for t in (k, v)
    )
    return F.scaled_dot_product_attention(q, k, v, mask, **more)


def inputs(rows: int, width: int = 32, positions: int = 40):
    return torch.randn(2, 6, rows, width), *(torch.randn(2, 3, positions, width) for _ in range(2))


def rewritten(function, *given, sizes="fake"):
    """(names of what the graph calls, record) after the pass, whose numbers are checked."""
    module = aot_graph(function, *given, sizes=sizes)
    record = run_pass(AttendSharedHeads(), module, given)
    assert run_pass(AttendSharedHeads(), module).matches == 0
    return [op(node) or str(node.target) for node in module.graph.nodes if node.op == "call_function"], record


@pytest.mark.parametrize("sizes", ["fake", "symbolic"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}])
def test_no_copies_of_keys_and_values_are_left(options, sizes):
    names, record = rewritten(lambda *t: attention(*t, **options), *inputs(5), sizes=sizes)
    assert record.matches == 1
    assert names.count("_scaled_dot_product_flash_attention_for_cpu") == 1
    assert not {"expand", "clone", "unsqueeze"} & set(names)


@pytest.mark.parametrize("masked", [False, True])
def test_one_token_goes_through_the_kernel(masked):
    given = (*inputs(1), *([torch.rand(2, 1, 1, 40) > 0.3] if masked else []))
    names, record = rewritten(lambda *t: attention(*t, scale=0.25), *given)
    assert (record.matches, names[-1]) == (2, "qcompile.attend.default")
    assert not {"clone", "unsqueeze", "_scaled_dot_product_flash_attention_for_cpu"} & set(names)


def test_heads_that_are_not_shared_keep_their_attention():
    q, k, v = torch.randn(2, 6, 5, 32), torch.randn(2, 6, 40, 32), torch.randn(2, 6, 40, 32)
    names, record = rewritten(F.scaled_dot_product_attention, q, k, v)
    assert (record.matches, record.rejected) == (0, ())
    assert "_scaled_dot_product_flash_attention_for_cpu" in names


def test_heads_in_another_order_are_not_shared_heads():
    """Head h of six would attend to h % 3, not to h // 2."""
    _, record = rewritten(
        lambda q, k, v: F.scaled_dot_product_attention(q, *(t.repeat(1, 2, 1, 1) for t in (k, v))), *inputs(5)
    )
    assert record.matches == 0


def test_a_triangular_mask_stays_with_the_reason():
    """With one query row it shows the first position only."""
    _, record = rewritten(lambda *t: attention(*t, is_causal=True), *inputs(1))
    assert record.matches == 1
    assert "triangular mask" in record.rejected[0][1]


@pytest.mark.parametrize(
    ("width", "reason"), [(32, native.unavailable()), (24, "its heads are multiples of 16 wide, not 24 and 24")]
)
def test_it_is_lowered_to_the_kernel_or_to_torchs_attention_with_the_reason(width, reason):
    given = inputs(1, width=width)
    module = aot_graph(lambda q, k, v: torch.ops.qcompile.attend(q, k, v, None, 0.2) + 1, *given)
    record = run_pass(Lower(select_decomp_table()), module, given)
    targets = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    assert ("qcompile_cpu.attend.default" in targets) == (not reason)
    assert bool(record.rejected) == bool(reason)
    if reason:
        assert reason in record.rejected[0][1]
        assert any("_scaled_dot_product_flash_attention_for_cpu" in target for target in targets)


@built
@pytest.mark.slow
def test_a_compiled_model_decodes_with_it(fresh_dynamo):
    """Tokens are those of the eager model."""
    model = qcompile.quantize(tiny_model("qwen3"), "w8a16")
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    prompt = torch.arange(20, 29)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = model.generate(prompt, **options)
    assert torch.equal(torch.compile(model, backend="qcompile").generate(prompt, **options), expected)
    found = [record.matches for graph in qcompile.report(model).graphs for record in graph.passes
             if record.name == "attend_shared_heads"]  # fmt: skip
    assert max(found) == 2 * model.config.num_hidden_layers  # of a token; transformers may not repeat those of a prompt
