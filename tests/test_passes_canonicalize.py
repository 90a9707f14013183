"""Norms and gated activations are found in every form, never in one that computes something else, and put back."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcompile.passes.base import semantic_name
from qcompile.passes.canonicalize import KEPT, Canonicalize
from qcompile.passes.lower import Lower
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional as F

from qcompile.verify import no_semantic_ops_left, run_pass

SIZE = 16


def aot_graph(function, *inputs, sizes: str = "fake") -> GraphModule:
    """A graph as AOTAutograd would make it: ATen operations, decomposed but for what is looked for.

    sizes: "fake" are numbers, "symbolic" are symbols.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    table = {target: rule for target, rule in select_decomp_table().items() if target not in KEPT}
    return make_fx(lambda *given: function(*given), decomposition_table=table, tracing_mode=sizes)(*inputs)


def found(module: GraphModule) -> list[str]:
    return [semantic_name(node) for node in module.graph.nodes if semantic_name(node)]


def arguments(module: GraphModule, name: str) -> tuple:
    return next(node.args for node in module.graph.nodes if semantic_name(node) == name)


def canonicalized(function, *inputs, **options):
    """(graph, record) after the pass, whose numbers are checked, and which a second run leaves alone."""
    module = aot_graph(function, *inputs, **options)
    record = run_pass(Canonicalize(), module, inputs)
    assert run_pass(Canonicalize(), module, inputs).matches == 0
    return module, record


def lowered_again(module: GraphModule, *inputs) -> GraphModule:
    from torch._inductor.decomposition import select_decomp_table

    lower = Lower(select_decomp_table())
    lower.numerics = "exact"
    run_pass(lower, module, inputs)
    no_semantic_ops_left(module)
    return module


def root(x, eps=1e-6):
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def llama(x, w, eps=1e-6):
    h = x.float()
    return w * (h * root(h, eps)).to(x.dtype)


def gemma(x, w, eps=1e-6):
    h = x.float()
    return (h * root(h, eps) * (1.0 + w.float())).type_as(x)


def gpt_oss(x, w, eps=1e-6):
    h = x.float()
    return (w * (h * root(h, eps))).to(x.dtype)


def gemma4(x, w, eps=1e-6):
    h = x.float()
    return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + eps, -0.5) * w.float()).type_as(x)


def unweighted(x, w, eps=1e-6):
    h = x.float()
    return (h * root(h, eps)).type_as(x)


def squares(x, w, eps=1e-6):
    h = x.float()
    return w * (h * torch.rsqrt((h * h).mean(-1, keepdim=True) + eps)).to(x.dtype)


FORMS = {  # name: (function, offset, rounds first, has weight)
    "llama": (llama, 0.0, True, True),
    "gemma": (gemma, 1.0, False, True),
    "gpt_oss": (gpt_oss, 0.0, False, True),
    "gemma4": (gemma4, 0.0, False, True),
    "unweighted": (unweighted, 0.0, True, False),
    "squares": (squares, 0.0, True, True),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class TestNorms:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_is_one_op_and_goes_back_to_the_same_bits(self, form, dtype):
        function, offset, rounds_first, weighted = FORMS[form]
        x, w = torch.randn(2, 3, SIZE).to(dtype), torch.randn(SIZE).to(dtype)
        module, record = canonicalized(function, x, w)
        assert (record.matches, found(module), record.rejected) == (1, ["rms_norm"], ())
        _, weight, bias, eps, eps_tensor, found_offset, found_first = arguments(module, "rms_norm")
        assert (eps, eps_tensor, bias, found_offset) == (1e-6, None, None, offset)
        assert found_first == (rounds_first and dtype != torch.float32)
        assert (weight is not None) == weighted
        assert weight is None or weight.op == "placeholder"
        lowered_again(module, x, w)

    @settings(max_examples=15)
    @given(
        st.sampled_from(sorted(FORMS)),
        st.sampled_from(DTYPES),
        st.floats(1e-8, 1e-2),
        st.lists(st.integers(1, 4), min_size=1, max_size=3),
    )
    def test_eps_and_shapes_are_values(self, form, dtype, eps, shape):
        function = FORMS[form][0]
        x, w = torch.randn(*shape, SIZE).to(dtype), torch.randn(SIZE).to(dtype)
        module, record = canonicalized(lambda x, w: function(x, w, eps), x, w, sizes="symbolic")
        assert record.matches == 1
        assert arguments(module, "rms_norm")[3] == eps

    def test_eps_may_be_read_at_run_time(self):
        x, w, eps = torch.randn(3, SIZE).bfloat16(), torch.ones(SIZE).bfloat16(), torch.tensor(1e-3)
        module, _ = canonicalized(llama, x, w, eps)
        assert arguments(module, "rms_norm")[3] is None
        assert arguments(module, "rms_norm")[4].op == "placeholder"
        lowered_again(module, x, w, eps)

    @pytest.mark.parametrize("function", [llama, gpt_oss, gemma], ids=lambda f: f.__name__)
    def test_a_bias_is_part_of_it_where_it_is_added_before_the_last_rounding(self, function):
        x, w, b = (torch.randn(*shape, SIZE).bfloat16() for shape in ((2, 3), (), ()))
        module, _ = canonicalized(lambda x, w, b: function(x, w) + b, x, w, b)
        assert (arguments(module, "rms_norm")[2] is not None) == (function is llama)
        lowered_again(module, x, w, b)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_residual_sum_is_made_by_the_same_op(self, dtype):
        def block(x, residual, w):
            total = x + residual
            return llama(total, w), total * 2

        x, residual, w = (torch.randn(*shape, SIZE).to(dtype) for shape in ((2, 3), (2, 3), ()))
        module, record = canonicalized(block, x, residual, w)
        assert (record.matches, found(module)) == (2, ["add_rms_norm"])
        lowered_again(module, x, residual, w)

    def test_a_sum_that_nobody_else_reads_stays_a_sum(self):
        x, residual, w = torch.randn(2, SIZE), torch.randn(2, SIZE), torch.randn(SIZE)
        module, record = canonicalized(lambda x, r, w: llama(x + r, w), x, residual, w)
        assert (found(module), record.rejected) == (["rms_norm"], ())


def x_and(*shapes, dtype=torch.bfloat16):
    return tuple(torch.randn(*shape).to(dtype) for shape in ((2, 3, SIZE), *shapes))


def over_tokens(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-6)).to(x.dtype)


def in_half(x, w):
    return w * (x * root(x))


def other_value(x, w):
    h = x.float()
    return w * ((h + 1) * root(h)).to(x.dtype)


def read_root(x, w):
    h = x.float()
    r = root(h)
    return w * (h * r).to(x.dtype), r


def read_before_rounding(x, w):
    h = x.float()
    normal = h * root(h)
    return w * normal.to(x.dtype), normal + 1


def eps_per_column(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + w.abs().float())).to(x.dtype)


NEAR_MISSES = [
    (over_tokens, x_and((SIZE,)), "the mean is not over the last axis alone"),
    (in_half, x_and((SIZE,)), r"computed in torch\.bfloat16, not in torch\.float32"),
    (other_value, x_and((SIZE,)), "does not only multiply the value whose mean square it was made of"),
    (read_root, x_and((SIZE,)), "does not only multiply the value"),
    (read_before_rounding, x_and((SIZE,)), r"makes float32 \[.*\] of bfloat16"),
    (eps_per_column, x_and((SIZE,)), "eps is no number"),
    (llama, (x_and()[0], torch.ones(SIZE)), r"makes float32 \[.*\] of bfloat16"),
]


class TestNearMisses:
    @pytest.mark.parametrize(("function", "inputs", "reason"), NEAR_MISSES, ids=lambda v: getattr(v, "__name__", ""))
    def test_of_norms_are_left_alone_with_the_reason(self, function, inputs, reason):
        module, record = canonicalized(function, *inputs)
        assert (record.matches, found(module)) == (0, [])
        (rejected,) = record.rejected
        assert rejected[0].startswith(("rsqrt", "pow"))
        assert re.search(reason, rejected[1]), rejected

    def test_a_sum_of_other_shapes_or_read_too_early_is_not_joined(self):
        w = torch.randn(SIZE)

        def broadcast(x, row, w):
            total = x + row
            return llama(total, w), total

        module, record = canonicalized(broadcast, torch.randn(3, SIZE), torch.randn(SIZE), w)
        assert found(module) == ["rms_norm"]
        assert re.search(r"it adds float32 \[\w+\] to make float32 \[\w+, \w+\]", record.rejected[0][1])

        def early(x, r, w):
            total = x + r
            return llama(total, w * total.amax()), total

        module, record = canonicalized(early, torch.randn(3, SIZE), torch.randn(3, SIZE), w)
        assert found(module) == ["rms_norm"]
        assert "reads the sum before the norm does" in record.rejected[0][1]

    def test_of_activations_too(self):
        gate, up = torch.randn(2, SIZE), torch.randn(SIZE)
        module, record = canonicalized(lambda g, u: F.silu(g) * u, gate, up)
        assert found(module) == []
        assert re.search(r"up is float32 \[\w+\], their product float32 \[\w+, \w+\]", record.rejected[0][1])
        module, record = canonicalized(lambda g, u: F.silu(g) * u, gate.bfloat16(), gate)
        assert "gate is bfloat16" in record.rejected[0][1]

    @pytest.mark.parametrize(
        "function",
        [lambda x: F.layer_norm(x, (SIZE,)), F.silu, lambda x: F.softmax(x, -1), lambda x: F.silu(x) * 2, torch.relu],
    )
    def test_other_functions_are_not_even_near(self, function):
        module, record = canonicalized(function, torch.randn(3, SIZE))
        assert (record.matches, record.rejected, found(module)) == (0, (), [])


def clamped(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


ACTIVATIONS = {
    "silu": lambda g, u: F.silu(g) * u,
    "gelu": lambda g, u: u * F.gelu(g),
    "gelu_tanh": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "relu": lambda g, u: F.relu(g) * u,
    "relu2": lambda g, u: F.relu(g).square() * u,
    "silu:alpha=1.702:limit=7.0:shift=1.0": clamped,
    "silu:limit=5.0": lambda g, u: u.clamp(-5, 5) * F.silu(g.clamp(max=5)),
    "silu:shift=1.0": lambda g, u: F.silu(g) * (u + 1),
}


class TestActivations:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_every_kind_is_one_op_and_goes_back_to_the_same_bits(self, name, dtype):
        gate, up = (20 * torch.randn(2, 3, SIZE).to(dtype) for _ in range(2))
        module, record = canonicalized(ACTIVATIONS[name], gate, up)
        assert (record.matches, found(module), record.rejected) == (1, ["gated_act"], ())
        found_gate, found_up, function = arguments(module, "gated_act")
        assert (found_gate.op, found_up.op, function) == ("placeholder", "placeholder", name)

    def test_halves_of_one_product_are_gate_and_up(self):
        def phi(x):
            gate, up = x.chunk(2, -1)
            return up * F.silu(gate)

        module, _ = canonicalized(phi, torch.randn(3, 2 * SIZE))
        assert found(module) == ["gated_act"]

    @pytest.mark.parametrize("limits", [(5.0, 6.0), (None, 5.0)], ids=str)
    def test_clamps_that_do_not_go_together_stay_outside(self, limits):
        def function(g, u):
            return F.silu(g.clamp(max=limits[0]) if limits[0] else g) * u.clamp(-limits[1], limits[1])

        gate, up = 20 * torch.randn(3, SIZE), 20 * torch.randn(3, SIZE)
        module, _ = canonicalized(function, gate, up)
        assert arguments(module, "gated_act")[2] == "silu"

    def test_what_nobody_joined_is_decomposed_as_inductor_does(self):
        class MLP(nn.Module):
            def forward(self, x, y):
                return F.silu(x).sum() + F.gelu(y).sum() + y.clamp(-1, 1)

        from torch._inductor.decomposition import select_decomp_table

        x, y = torch.randn(3, SIZE), torch.randn(3, SIZE)
        module = aot_graph(MLP(), x, y)
        record = run_pass(Lower(select_decomp_table()), module, (x, y))
        assert record.matches == 0
        assert not {node.target for node in module.graph.nodes} & set(KEPT)
