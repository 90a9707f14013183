"""Experts on Ascend's operations: routing, grouped products and gated activations, against the definition."""

import dataclasses

import npu_goldens
import pytest
import torch
from npu_cases import (
    COUNT,
    EXPERTS,
    HALF,
    HIDDEN,
    K,
    Layer,
    assert_as_defined,
    equal_weights,
    experts_site,
    packed_weight,
    routed,
    size,
)  # fmt: skip
from npu_library import define
from torch.utils._python_dispatch import TorchDispatchMode

from qcompile import moe, numerics
from qcompile.backends import npu
from qcompile.backends.npu import BACKEND
from qcompile.backends.npu.grouping import Counts, Ends, RowMajor, send
from qcompile.kernels import Kernel, choose
from qcompile.types import Scheme

define()

SCHEMES = [scheme for schemes in EXPERTS.values() for scheme in schemes]
GATES = ("silu", "gelu_tanh", "relu2:ungated", "silu:alpha=1.702:limit=7.0:shift=1.0")
INTER = 64


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_is_computed_as_defined(scheme, dtype):
    layer = Layer(scheme, dtype)
    assert_as_defined(layer, *routed())
    assert_as_defined(layer, *routed(idle=(0, 3, 5)), biases=False)
    assert_as_defined(layer, *routed(tokens=1, k=1))


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("scheme", ["w4a16_g64_asym", "w8a8", "w8a8_static", "w4a8_clip", "w4a4"])
def test_each_activation_is_computed_as_defined(scheme, activation):
    assert_as_defined(Layer(scheme, activation=activation), *routed())


@pytest.mark.parametrize(("kernel", "schemes"), EXPERTS.items())
def test_kernels_are_chosen_and_restore_what_they_prepared(kernel, schemes):
    for name in schemes:
        for dtype in HALF:
            scheme, shape = Scheme.parse(name), (3, 64, 256)
            chosen, why = choose(BACKEND, experts_site(*shape, dtype), scheme)
            assert chosen is BACKEND.kernel(kernel), why
            packed = packed_weight(shape, scheme, dtype)
            tensors = chosen.prepare(packed)
            assert chosen.nbytes(experts_site(*shape, dtype), scheme) == size(tensors)
            assert equal_weights(chosen.restore(tensors, scheme, shape, packed.activation_tensors()), packed)


@pytest.mark.parametrize("scheme", ["w4a16_g64_asym", "w4a16_g32", "w8a8", "w8a8_static", "w4a8", "w4a4"])
def test_each_expert_may_store_its_columns_in_an_order_of_its_own(scheme):
    layer = Layer(scheme, permuted=True)
    assert_as_defined(layer, *routed())
    for kernel, packed in zip(layer.kernels, layer.packed, strict=True):
        tensors = kernel.prepare(packed)
        restored = kernel.restore(tensors, layer.scheme, packed.shape, packed.activation_tensors())
        assert equal_weights(restored, packed)


@pytest.mark.parametrize("scheme", ["w4a16_g64", "w8a8", "w4a8", "w4a4"])
def test_a_single_expert_is_passed_as_ends(scheme):
    """A list of counts must not have length 1; the golden refuses it."""
    assert_as_defined(Layer(scheme, experts=1), torch.zeros(5, 1, dtype=torch.int64), torch.rand(5, 1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_grouped_linear_takes_ends_like_every_other_backend(scheme):
    parsed, shape = Scheme.parse(scheme), (4, 64, 256)
    packed = packed_weight(shape, parsed)
    kernel, _ = choose(BACKEND, experts_site(*shape), parsed)
    x, ends = torch.randn(9, 256).bfloat16(), torch.tensor([2, 2, 7, 9], dtype=torch.int32)
    rows, kind = [x], parsed.activation
    if kind is not None:
        owner = torch.searchsorted(ends, torch.arange(9), right=True)
        own = [param[owner][:, None] for param in packed.activation_tensors().values()]
        parts = numerics.quantize_activation(x, kind, own)
        rows = parts if kind.dynamic else [*parts, *own]
    actual = kernel.grouped_linear(rows, ends, kernel.prepare(packed), parsed, 64, torch.bfloat16)
    rows = rows if kind is None or kind.dynamic else [rows[0], *own]
    expected = Kernel().grouped_linear(rows, ends, Kernel().prepare(packed), parsed, 64, torch.bfloat16)
    assert ((actual.double() - expected.double()).norm() / expected.double().norm()).item() < 6e-3


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_float_experts_in_every_layout(transposed, interleaved):
    up, down = torch.randn(COUNT, 2 * INTER, HIDDEN) * 0.1, torch.randn(COUNT, HIDDEN, INTER) * 0.1
    if transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    weights = [t.bfloat16() for t in (up, torch.randn(COUNT, 2 * INTER), down, torch.randn(COUNT, HIDDEN))]
    ids, routing = routed()
    x = torch.randn(ids.shape[0], HIDDEN).bfloat16()
    arguments = (x, ids, routing, *weights, "silu", transposed, interleaved)
    actual = BACKEND.operations["experts"].compute(*arguments)
    expected = moe.run_float_experts(*arguments)
    assert ((actual.double() - expected.double()).norm() / expected.double().norm()).item() < 1e-2


# ------------------------------------------------------------------------------------------------- fused operations


class Operations(TorchDispatchMode):
    """Names of Ascend's operations under it, in order, without routing."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "npu" and "init_routing" not in function.name():
            self.names.append(function.name().removeprefix("npu::npu_"))
        return function(*args, **(kwargs or {}))


FUSED = ["grouped_matmul_swiglu_quant_v2", "grouped_matmul_finalize_routing"]
PLAIN = ["grouped_matmul", "dequant_swiglu_quant", "grouped_matmul", "moe_token_unpermute"]


@pytest.mark.parametrize(
    ("scheme", "settings", "expected"),
    [
        ("w8a8", {}, FUSED),
        ("w8a8", {"biases": True}, PLAIN),
        ("w8a8", {"activation": "gelu"}, ["grouped_matmul", "dynamic_quant", FUSED[1]]),
        ("w8a8", {"activation": GATES[3]}, ["grouped_matmul", "dequant_swiglu_quant", FUSED[1]]),
        ("w8a8", {"experts": 300}, [FUSED[0], "grouped_matmul", "moe_token_unpermute"]),
        ("w8a8_static", {}, ["grouped_matmul", "swiglu", "grouped_matmul", "moe_token_unpermute"]),
        ("w4a8", {}, [FUSED[0], "grouped_matmul", "moe_token_unpermute"]),
        ("w4a8_g256", {}, [FUSED[0], "grouped_matmul", "moe_token_unpermute"]),
        ("w4a8_clip", {}, ["grouped_matmul", "swiglu", "grouped_matmul", "moe_token_unpermute"]),
        ("w4a4", {}, ["grouped_matmul", "swiglu", "dynamic_quant", "grouped_matmul", "moe_token_unpermute"]),
        ("w4a16_g64", {}, ["grouped_matmul", "swiglu", "grouped_matmul", "moe_token_unpermute"]),
    ],
)
def test_operations_are_joined_where_their_contracts_allow(scheme, settings, expected):
    biases = settings.get("biases", False)
    layer = Layer(scheme, **{name: value for name, value in settings.items() if name != "biases"})
    ids, routing = routed(experts=layer.sizes[0])
    with Operations() as seen:
        layer.run(torch.randn(ids.shape[0], HIDDEN).bfloat16(), ids, routing, biases=biases)
    assert seen.names == expected
    assert_as_defined(layer, ids, routing, biases=biases)


def test_weights_in_the_ordinary_layout_are_not_joined():
    """npu_grouped_matmul_swiglu_quant_v2 and npu_grouped_matmul_finalize_routing want FRACTAL_NZ int8 weights."""
    with npu.target(nz=False):
        layer = Layer("w8a8")
    ids, routing = routed()
    with Operations() as seen:
        layer.run(torch.randn(ids.shape[0], HIDDEN).bfloat16(), ids, routing, biases=False)
    assert seen.names == PLAIN
    assert_as_defined(layer, ids, routing, biases=False)


# ----------------------------------------------------------------------------------------------------- conventions


def test_routing_of_a_worked_example():
    ids = torch.tensor([[2, 0], [1, 2], [0, 1], [2, 1]])
    x = torch.arange(4.0)[:, None].expand(4, 16).contiguous().bfloat16()
    (rows,), groups, places = send([x], ids, 3, RowMajor)
    assert places.place.tolist() == [5, 0, 2, 6, 1, 3, 7, 4]
    assert groups == Counts(groups.values)
    assert groups.values.tolist() == [2, 3, 3]
    assert rows[:, 0].tolist() == [0, 2, 1, 2, 3, 0, 1, 3]
    assert torch.equal(places.combine(rows, torch.full((4, 2), 0.5)), x)


def test_codes_words_and_scales_are_routed_together():
    ids, _ = routed()
    codes = torch.randint(-8, 8, (ids.shape[0], 16), dtype=torch.int8)
    scale = torch.rand(ids.shape[0], 1)
    (rows, own), _, places = send([codes, scale], ids, COUNT, RowMajor)
    (words, same), *_ = send([npu_goldens.pack_int4(codes), scale], ids, COUNT, RowMajor)
    assert torch.equal(npu_goldens.unpack_int4(words), rows)
    assert torch.equal(own, same)
    token = torch.empty(rows.shape[0], dtype=torch.int64)
    token[places.place.long()] = torch.arange(ids.numel()) // K
    assert torch.equal(rows, codes[token])
    assert torch.equal(own, scale[token])


def test_places_are_not_column_major():
    """What npu_moe_finalize_routing reads in its default mode; mixing both silently swaps tokens."""
    ids, routing = routed(tokens=4)
    x = torch.randn(4, 16).bfloat16()
    (rows,), _, places = send([x], ids, COUNT, RowMajor)
    by_columns = dataclasses.replace(places, place=places.place.view(K, 4).t().reshape(-1))
    assert not torch.equal(by_columns.combine(rows, routing), places.combine(rows, routing))


def test_ends_and_counts_are_each_other_s_inverse():
    counts = Counts(torch.tensor([2, 0, 3, 1]))
    assert counts.ends().values.tolist() == [2, 2, 5, 6]
    assert counts.ends().counts().values.tolist() == counts.values.tolist()
    assert counts.counts() is counts
    ends = Ends(torch.tensor([4, 4]))
    assert ends.ends() is ends
    assert ends.counts().values.tolist() == [4, 0]


def test_ends_given_for_counts_are_garbage_in_the_operation_that_does_not_look():
    """So the kernel converts them; the golden computes the garbage that the device would."""
    scheme = Scheme.parse("w4a8")
    packed = packed_weight((3, 64, 256), scheme)
    kernel = BACKEND.kernel("int8_int4_nz")
    words, _, containers, bias = kernel.prepare(packed)
    codes, scale = numerics.quantize_activation(torch.randn(6, 256).bfloat16(), scheme.activation)

    def product(group_list):
        return npu_goldens.npu_grouped_matmul(
            [codes.clone()], [words], scale=[containers], bias=[bias], per_token_scale=[scale.flatten()],
            group_list=group_list, split_item=2, group_type=0, group_list_type=1, output_dtype=15,
        )[0]  # fmt: skip

    ends = Ends(torch.tensor([1, 3, 6]))
    wrong, right = product(ends.values), product(ends.counts().values)
    assert not torch.equal(wrong, right)
    computed = kernel.grouped([codes.clone(), scale], ends, [words, _, containers, bias], scheme, torch.bfloat16)
    assert torch.equal(computed, right)
