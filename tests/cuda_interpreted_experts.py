"""Whole layers of experts in Triton's interpreter, run as ``cuda_interpreted.py`` is; all outputs begin poisoned."""

import ptx
import pytest
import torch
from cuda_cases import error, exact, expert_layer, quantized

from qcompile.backends.cuda import BACKEND, tiles
from qcompile.backends.cuda.device import launch
from qcompile.gates import gated
from qcompile.ops import compute_experts

TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 5e-4}
SCHEMES = ("w4a16_g128", "w4a16_g32_asym", "w8a16", "w8a8", "w4a8_g32", "w4a8", "wfp8afp8", "wfp8afp8_b128x128",
           "wfp8afp8_tensor")  # fmt: skip
EXPERTS, HIDDEN, INTERMEDIATE = 4, 72, 96
OPS = torch.ops.qcompile_cuda

ptx.install()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs begin as NaN, or as numbers that no index is."""
    empty = torch.Tensor.new_empty

    def full(self, size, *args, **kwargs):
        if not isinstance(size, tuple):  # the interpreter's own
            return empty(self, size, *args, **kwargs)
        dtype = kwargs.get("dtype", self.dtype)
        return torch.full(size, torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max, dtype=dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", full)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_both_products_with_what_follows_them(scheme):
    """A pair for each program (1 token), and blocks of pairs sorted by expert."""
    for tokens in (1, 3, 20) if scheme == "w4a16_g128" else (1, 10):
        check(scheme, torch.float16, tokens)


@pytest.mark.parametrize("path", ["portable", "ptx"])
@pytest.mark.parametrize("scheme", ["w4a16_g64_asym", "w8a16", "w4a8_g64"])
def test_every_way_to_take_codes_apart(scheme, path, monkeypatch):
    monkeypatch.setattr(launch, "_path", lambda device: {"PTX": path == "ptx", "WIDE": True})
    for arch in ("sm_90", "sm_80"):
        check(scheme, torch.bfloat16, 1, arch=arch)
        check(scheme, torch.float16, 3, arch=arch)  # bfloat16 rows would be rounded towards zero twice


@pytest.mark.parametrize("scheme", ["w4a16_g128", "w8a8"])
def test_experts_with_many_rows_each(scheme):
    check(scheme, torch.float16, 140)


@pytest.mark.parametrize(
    "activation", ["gelu", "gelu_tanh", "relu", "relu2", "silu:alpha=1.702:limit=0.7:shift=1.0"]
)  # fmt: skip
def test_activations(activation):
    check("w8a16", torch.float16, 1, activation=activation)


@pytest.mark.parametrize("scheme", ["w4a16_g128", "w8a8"])
@pytest.mark.parametrize("tokens", [2, 6])
def test_experts_that_another_rank_has_add_nothing(scheme, tokens):
    check(scheme, torch.float16, tokens, experts=8, foreign=True)


@pytest.mark.parametrize("scheme", ["w4a16_g128", "w8a8"])
def test_sums_in_parts_are_the_same(scheme):
    """Programs that share a token's experts, in a fixed order; the sum is made here, or left to the graph."""
    layer = expert_layer(scheme, (32, 4, 64, 32), torch.float16, "sm_90")
    x, ids, routing = inputs(1, 32, 4, 32, torch.float16)
    rows = quantized(x.expand(4, -1), layer.down)
    order, ends = OPS.expert_order(ids, 32)
    arguments = (rows, ids, routing, order, ends, layer.tensors[1], scheme, layer.kernel, 64)
    assert tiles.expert_splits(1, 4, 64, launch.current()) == 4
    parts = OPS.down(*arguments, 4, torch.float16)
    assert parts.shape == (4, 1, 64)
    expected = weighted(products(layer.down, x.expand(4, -1), ids), ids, routing, 32)
    assert error(parts.sum(0), expected) < 1e-6
    whole = OPS.down(*arguments, 0, torch.float16)
    assert torch.equal(whole, parts.sum(0).half())
    assert torch.equal(whole, OPS.down(*arguments, 0, torch.float16))


@pytest.mark.parametrize(
    ("scheme", "tokens"), [("w4a16_g128", 0), ("w4a16_g128", 1), ("w4a16_g128", 7), ("w8a8", 1), ("w4a8", 7)]
)
def test_a_layer_is_what_its_definition_says(scheme, tokens):
    layer = expert_layer(scheme, (EXPERTS, 2, HIDDEN, INTERMEDIATE), torch.float16, "sm_90")
    x, ids, routing = inputs(tokens, EXPERTS, 2, HIDDEN, torch.float16)
    arguments = layer.arguments(x, ids, routing)
    operation = BACKEND.operations["quant_experts"]
    assert operation.refuses(*arguments) == ""
    result, expected = operation.compute(*arguments), compute_experts(*arguments)
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    # where a hidden number is rounded to another code, a row moves by up to half a step of it
    assert not tokens or error(result, expected.double()) < (2e-3 if layer.scheme.activation is None else 2e-2)


def check(scheme, dtype, tokens, arch="sm_90", experts=EXPERTS, activation="silu", foreign=False):
    """Each product against float64, of the very numbers that it reads."""
    layer = expert_layer(scheme, (experts, 2, HIDDEN, INTERMEDIATE), dtype, arch)
    x, ids, routing = inputs(tokens, experts, 2, HIDDEN, dtype)
    if foreign:
        ids[0, 0], ids[1, 1] = experts, -1
    mine = ((ids >= 0) & (ids < experts)).reshape(-1)
    with BACKEND.target(arch):
        order, ends = OPS.expert_order(ids, experts)
        arguments = (ids, order, ends, layer.tensors[0], scheme, layer.kernel, INTERMEDIATE, activation, dtype)
        hidden = OPS.gate_up(quantized(x, layer.up), *arguments)
        assert hidden.shape == (2 * tokens, INTERMEDIATE)
        expected = gated(products(layer.up, x.repeat_interleave(2, 0), ids), activation)
        factors = 2 if dtype == torch.bfloat16 else 1  # both were made of weights that are rounded towards zero
        assert error(hidden[mine], expected[mine]) < factors * TOLERANCE[dtype]
        rows = torch.where(mine[:, None], hidden, torch.nan)
        parts = quantized(rows, layer.down)
        arguments = (ids, routing, order, ends, layer.tensors[1], scheme, layer.kernel, HIDDEN, 0, dtype)
        result = OPS.down(parts, *arguments)
    assert result.shape == x.shape
    assert result.dtype == dtype
    expected = weighted(products(layer.down, hidden.where(mine[:, None], 0), ids), ids, routing, experts)
    assert error(result, expected) < TOLERANCE[dtype]


def inputs(tokens, experts, k, hidden, dtype):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=generator).topk(k).indices
    routing = torch.rand(tokens, k, generator=generator).softmax(-1)
    return torch.randn(tokens, hidden, generator=generator).to(dtype), ids, routing


def products(packed, rows, ids):
    """float64: each pair's row times the weight of its expert."""
    owner = ids.reshape(-1).clamp(0, packed.shape[0] - 1)
    result = torch.empty(len(rows), packed.shape[1], dtype=torch.float64)
    for expert in owner.unique().tolist():
        result[owner == expert] = exact(packed.expert(expert), rows[owner == expert])
    return result


def weighted(rows, ids, routing, experts):
    """The sum of each token's rows, without those of experts that are not here."""
    weights = torch.where((ids >= 0) & (ids < experts), routing, 0).double()
    return (rows.view(*ids.shape, -1) * weights[..., None]).sum(1)
