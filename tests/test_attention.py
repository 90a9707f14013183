"""Attention: the CPU's own kernel, and the pass that saves the copies of keys and values for it."""

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

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 4e-6}
built = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())


def attend(*arguments):
    return torch.ops.qcompile_cpu.attend(*arguments)


def exact(q, k, v, mask, scale, causal=False):
    """The same in float64, with heads repeated."""
    times = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(times, 1) for t in (k, v))
    mask = None if mask is None else mask.double()
    if causal:
        hidden = torch.full((q.shape[2], k.shape[2]), -torch.inf, dtype=torch.float64).triu(1)
        mask = hidden if mask is None else mask + hidden
    return F.scaled_dot_product_attention(q.double(), k, v, mask, scale=scale)


def assert_close(found, expected):
    assert (found - expected).abs().max() <= TOLERANCE[found.dtype] * expected.abs().max()


# --------------------------------------------------------------------------------------------------------- the kernel


@built
@pytest.mark.parametrize("dtype", TOLERANCE)
@given(st.data())
def test_attention_of_any_shape_and_strides(dtype, data):
    draw = data.draw
    batch, shared = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    heads, positions = shared * draw(st.sampled_from([1, 2, 3, 4, 7, 33])), draw(st.integers(1, 600))
    width, value_width = (16 * draw(st.integers(1, 12)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 1000)))
    rows, causal = draw(st.sampled_from([1, 1, 2, 3, 5, 17, 64, 130])), draw(st.booleans())
    q = torch.randn(batch, rows, heads, width, dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(batch, shared, positions + 3, w, dtype=dtype) for w in (width, value_width))
    k = k[:, :, 1:-2] if draw(st.booleans()) else k[:, :, 2:-1].mT.contiguous().mT
    v = v[:, :, :-3] if draw(st.booleans()) else v[:, :, 3:].transpose(1, 2).contiguous().transpose(1, 2)
    mask = None
    if draw(st.booleans()):
        of = draw(st.sampled_from([(1, 1), (batch, 1), (1, heads), (batch, heads)]))
        size = (*of, draw(st.sampled_from([1, rows])), positions)
        mask = torch.randn(size).masked_fill(torch.rand(size) > 0.6, -torch.inf)
        mask[..., 0 if causal else draw(st.integers(0, positions - 1))] = 0
        mask = mask.to(dtype)
    found = attend(q, k, v, mask, 0.3, causal)
    assert found.transpose(1, 2).is_contiguous()
    assert_close(found, exact(q, k, v, mask, 0.3, causal))


@built
@pytest.mark.parametrize("rows", [1, 40])
def test_the_unused_end_of_a_static_cache_is_not_read(rows):
    """Whatever lies there; who may see nothing gets zeros."""
    q, k, v = torch.randn(2, 6, rows, 32), torch.randn(2, 3, 900, 32), torch.randn(2, 3, 900, 32)
    mask = torch.zeros(2, 6, rows, 900)
    mask[0, ..., 300:] = mask[0, 1] = mask[1] = -torch.inf
    expected = exact(q[:1], k[:1, :, :300], v[:1, :, :300], None, 0.2)
    k[0, :, 300:], v[0, :, 300:] = torch.nan, torch.inf
    found = attend(q, k, v, mask, 0.2, False)
    assert_close(found[:1, [0, 2, 3, 4, 5]], expected[:, [0, 2, 3, 4, 5]])
    assert not found[1].any()
    assert not found[0, 1].any()


@built
@pytest.mark.parametrize("rows", [1, 40])
def test_large_scores_do_not_overflow(rows):
    q, k, v = torch.randn(1, 4, rows, 64) * 100, torch.randn(1, 2, 500, 64) * 100, torch.randn(1, 2, 500, 64)
    assert_close(attend(q, k, v, None, 1.0, False), exact(q, k, v, None, 1.0))


@built
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("where", ["query", "key", "value", "every key"])
def test_nan_is_not_hidden(where, rows):
    q, k, v = torch.randn(1, 4, rows, 32), torch.randn(1, 2, 300, 32), torch.randn(1, 2, 300, 32)
    {"query": q, "key": k[:, :, 290:291], "value": v[:, :, 7:8], "every key": k}[where].fill_(torch.nan)
    assert attend(q, k, v, None, 0.2, False).isnan().all()


@built
@pytest.mark.parametrize("rows", [1, 5, 90])
def test_the_same_bits_on_any_number_of_threads(rows):
    q, k, v = (torch.randn(1, h, n, 64).bfloat16() for h, n in ((12, rows), (4, 1500), (4, 1500)))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(attend(q, k, v, None, 0.1, False))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@built
@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (((4, 2, 32), (1, 2, 9, 32), (1, 2, 9, 32)), "four dimensions"),
        (((1, 4, 1, 32), (1, 3, 9, 32), (1, 3, 9, 32)), "do not fit"),
        (((1, 4, 1, 32), (1, 2, 9, 32), (1, 2, 8, 32)), "do not fit"),
        (((1, 4, 1, 24), (1, 2, 9, 24), (1, 2, 9, 24)), "multiples of 16 wide, not 24"),
    ],
)
def test_what_does_not_fit_is_an_error(shapes, reason):
    with pytest.raises(RuntimeError, match=reason):
        attend(*map(torch.randn, shapes), None, 1.0, False)


@built
@pytest.mark.parametrize("rows", [1, 3])
def test_the_op_keeps_the_rules_of_torch(rows):
    q, k, v = torch.randn(2, 4, rows, 32), torch.randn(2, 2, 9, 32), torch.randn(2, 2, 9, 48)
    torch.library.opcheck(torch.ops.qcompile_cpu.attend.default, (q, k, v, torch.randn(2, 1, 1, 9), 0.5, True))


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
    assert (record.matches, names[-1]) == (1, "qcompile.attend.default")
    assert not {"expand", "clone", "unsqueeze", "_scaled_dot_product_flash_attention_for_cpu"} & set(names)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_mask_goes_with_it(rows):
    given = (*inputs(rows), torch.rand(2, 1, rows, 40) > 0.3)
    names, record = rewritten(lambda *t: attention(*t, scale=0.25), *given)
    assert (record.matches, names[-1]) == (1, "qcompile.attend.default")
    assert not {"clone", "unsqueeze", "_scaled_dot_product_flash_attention_for_cpu"} & set(names)


def test_heads_need_not_be_shared():
    q, k, v = torch.randn(2, 6, 5, 32), torch.randn(2, 6, 40, 32), torch.randn(2, 6, 40, 32)
    names, record = rewritten(F.scaled_dot_product_attention, q, k, v)
    assert (record.matches, names) == (1, ["qcompile.attend.default"])


def test_heads_in_another_order_are_not_shared_heads():
    """Head h of six attends to h % 3, not to h // 2: they stay repeated."""
    repeated = lambda q, k, v: F.scaled_dot_product_attention(q, *(t.repeat(1, 2, 1, 1) for t in (k, v)))  # noqa: E731
    module = aot_graph(repeated, *inputs(5))
    assert run_pass(AttendSharedHeads(), module, inputs(5)).matches == 1
    (node,) = module.graph.find_nodes(op="call_function", target=torch.ops.qcompile.attend.default)
    assert [tuple(argument.meta["val"].shape) for argument in node.args[1:3]] == [(2, 6, 40, 32)] * 2


def test_attention_that_drops_weights_stays_with_the_reason():
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    module = aot_graph(lambda q, k, v: flash(q, k, v, 0.5)[0], *(torch.randn(2, 3, 8, 32) for _ in range(3)))
    record = run_pass(AttendSharedHeads(), module)
    assert record.matches == 0
    assert "drops some of its weights" in record.rejected[0][1]


@pytest.mark.parametrize(
    ("width", "reason"), [(32, native.unavailable()), (24, "its heads are multiples of 16 wide, not 24 and 24")]
)
def test_it_is_lowered_to_the_kernel_or_to_torchs_attention_with_the_reason(width, reason):
    given = inputs(1, width=width)
    module = aot_graph(lambda q, k, v: torch.ops.qcompile.attend(q, k, v, None, 0.2, False) + 1, *given)
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
    assert set(found) == {model.config.num_hidden_layers}
