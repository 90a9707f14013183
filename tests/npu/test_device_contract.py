"""Calls outside of the contract are refused by the device, and random sites that a plan accepts are computed by it."""

import pytest
import torch
from conftest import BOUND, ON_CHIP, ORDER
from hypothesis import given, settings
from hypothesis import strategies as st
from npu_cases import experts_site, linear_site, packed_weight, quantized
from npu_modules import moved

from qcompile import numerics
from qcompile.backends.npu import BACKEND
from qcompile.types import Scheme

npu = torch.ops.npu
bf16, fp16, fp32, i8, i32, i64 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int32, torch.int64


def zeros(shape, dtype):
    return torch.zeros(shape, dtype=dtype, device="npu")


REFUSED = {  # what the plan's constraints keep from happening: on a chip these are errors of CANN at the first forward
    "groups of 48": lambda: npu.npu_weight_quant_batchmatmul(
        zeros((5, 256), bf16), zeros((256, 8), i32), zeros((6, 64), bf16), antiquant_group_size=48
    ),
    "a group as long as a row": lambda: npu.npu_weight_quant_batchmatmul(
        zeros((5, 256), bf16), zeros((256, 8), i32), zeros((1, 64), bf16), antiquant_group_size=256
    ),
    "scales in another dtype": lambda: npu.npu_weight_quant_batchmatmul(
        zeros((5, 256), bf16), zeros((256, 8), i32), zeros((1, 64), fp16)
    ),
    "a bfloat16 bias": lambda: npu.npu_weight_quant_batchmatmul(
        zeros((5, 256), bf16), zeros((256, 8), i32), zeros((1, 64), bf16), bias=zeros((64,), bf16)
    ),
    "more than 65535 columns": lambda: npu.npu_weight_quant_batchmatmul(
        zeros((1, 32), bf16), zeros((32, 65536), i8), zeros((1, 65536), bf16)
    ),
    "float16 scales": lambda: npu.npu_quant_matmul(
        zeros((5, 256), i8), zeros((256, 64), i8), zeros((64,), fp16), pertoken_scale=zeros((5,), fp32), output_dtype=5
    ),
    "a scale too few": lambda: npu.npu_quant_matmul(
        zeros((5, 256), i8), zeros((256, 64), i8), zeros((64,), fp32), pertoken_scale=zeros((4,), fp32), output_dtype=5
    ),
    "int4 with a bias": lambda: npu.npu_quant_matmul(
        zeros((5, 32), i32), zeros((256, 8), i32), zeros((64,), fp32), pertoken_scale=zeros((5,), fp32),
        bias=zeros((64,), fp32), output_dtype=5,
    ),
    "int8 times int4 without its compensation": lambda: npu.npu_grouped_matmul(
        [zeros((5, 256), i8)], [zeros((2, 256, 8), i32)], scale=[zeros((2, 1, 64), i64)],
        per_token_scale=[zeros((5,), fp32)], group_list=zeros((2,), i64), group_type=0, split_item=2,
        group_list_type=1, output_dtype=15,
    )[0],
    "groups of 128 of int8 times int4": lambda: npu.npu_grouped_matmul(
        [zeros((5, 256), i8)], [zeros((2, 256, 8), i32)], scale=[zeros((2, 2, 64), i64)], bias=[zeros((2, 64), fp32)],
        per_token_scale=[zeros((5,), fp32)], group_list=zeros((2,), i64), group_type=0, split_item=2,
        group_list_type=1, output_dtype=15,
    )[0],
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_call_outside_of_the_contract_is_an_error(what):
    with pytest.raises(RuntimeError):
        REFUSED[what]().cpu()


schemes = st.sampled_from(
    ["w4a16", "w4a16_asym", "w8a16", "w3a16", "w8a8", "w8a8_static", "w8a8_static_sym", "w4a8", "w4a8_clip", "w4a4"]
)
groups = st.sampled_from(["", "_g16", "_g32", "_g64", "_g96", "_g128", "_g256"])


@settings(max_examples=10 if ON_CHIP else 60)
@given(
    schemes, groups, st.integers(1, 12).map(lambda n: 8 * n) | st.integers(1, 70), st.integers(1, 70) | st.just(512),
    st.sampled_from([bf16, fp16]), st.sampled_from([0, 2, 3]),
)  # fmt: skip
def test_what_a_plan_accepts_passes_every_check(scheme, group, out, inn, dtype, experts):
    """Of torch_npu's host code and of the contract; what no kernel accepts has a reason."""
    if group:
        name, underscore, rest = scheme.partition("_")
        scheme = f"{name}{group}{underscore}{rest}"
    parsed, shape = Scheme.parse(scheme), (*((experts,) if experts else ()), out, inn)
    site = experts_site(*shape, dtype) if experts else linear_site(*shape, dtype)
    packed, x = packed_weight(shape, parsed, dtype), torch.randn(5, inn).to(dtype)
    ends, parts = torch.tensor([2, 2, 5][3 - experts :] if experts else [5], dtype=i32), [x]
    if parsed.activation is not None and experts:
        owner = torch.searchsorted(ends, torch.arange(5), right=True)
        params = [param[owner][:, None] for param in packed.activation_tensors().values()]
        parts = numerics.quantize_activation(x, parsed.activation, params)
        parts = parts if parsed.activation.dynamic else [*parts, *params]
    elif parsed.activation is not None:
        parts = quantized(x, packed)
    accepted = 0
    for kernel in BACKEND.kernels:
        if site.kind not in kernel.kinds:
            continue
        if reason := kernel.refuses(site, parsed):
            assert reason.strip()
            continue
        accepted += 1

        def product(where, kernel=kernel):
            rows, own = [part.to(where) for part in parts], kernel.prepare(moved(packed, where))
            if experts:
                return kernel.grouped_linear(rows, ends.to(where), own, parsed, out, dtype)
            if parsed.activation is None:
                return kernel.linear(rows[0], own, None, parsed, out)
            return kernel.scaled_linear(rows, own, None, parsed, out, dtype)

        actual, expected = product("npu").cpu(), product("cpu")
        bound = (BOUND if ON_CHIP else ORDER)[dtype]
        assert ((actual.double() - expected.double()).norm() <= bound * expected.double().norm()).item(), kernel.name
    assert accepted
