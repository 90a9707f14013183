"""What a plan says about an NPU: every documented constraint with its reason and fallback, without torch_npu."""

import json
import sys

import pytest
import torch
from helpers import quantize_linears, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from npu_cases import experts_site, linear_site, packed_weight, quantized
from npu_library import define
from typer.testing import CliRunner

import qcompile
from qcompile import numerics
from qcompile.backends import npu
from qcompile.backends.npu import BACKEND, chips
from qcompile.cli import app
from qcompile.kernels import Kernel, choose
from qcompile.planning import find_backend
from qcompile.types import Scheme

define()
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def chosen(scheme, out=64, inn=256, dtype=bf16, experts=0):
    """(name of the kernel, why not a better one)."""
    site = experts_site(experts, out, inn, dtype) if experts else linear_site(out, inn, dtype)
    kernel, why = choose(BACKEND, site, Scheme.parse(scheme))
    return kernel and kernel.name, why


LINEARS = [  # scheme, sizes or dtype, kernel, reason
    ("w4a16_g48", {}, "reference", "weight_int4: group size 48 is not a multiple of 32"),
    ("w4a16_g16", {}, "reference", "weight_int4: group size 16 is not a multiple of 32"),
    ("w4a16_g256", {}, "weight_int4", ""),
    ("w4a16_g512", {}, "weight_int4", ""),
    ("w4a16_g128", {"inn": 200}, "weight_int4", ""),
    ("w4a16_g128", {"out": 60}, "weight_int8", "weight_int4: 60 output features are not a multiple of 8"),
    ("w4a16_g128", {"out": 151936}, "reference", "weight_int4: 151936 features are more than 65535"),
    ("w4a16_g128", {"dtype": fp32}, "reference", "Ascend910B computes it in bfloat16 or float16, not float32"),
    ("w8a16_g64", {}, "weight_int8", ""),
    ("w8a8", {"inn": 250}, "int8", "int8_nz: 250 input features are not a multiple of 16, as FRACTAL_NZ has them"),
    ("w8a8", {"out": 48}, "int8", "int8_nz: 48 output features are not a multiple of 32"),
    ("w8a8", {"inn": 65536}, "reference", "int8_nz: the same as int8; int8: 65536 features are more than 65535"),
    ("w8a8_asym", {}, "reference", "int8: it has no zero points of the weight"),
    ("w8a8_dynamic_asym", {}, "reference", "int8: it has no zero point per token"),
    ("w8a8_g128", {}, "reference", "int8: it has one scale per output channel, not groups of 128"),
    ("w8a8_static", {"out": 40}, "int8_static", "int8_static_nz: 40 output features are not a multiple of 32"),
    ("w4a8_g128", {}, "reference", "one scale per output channel or whole groups of 256, not groups of 128"),
    ("w4a8", {"out": 8, "inn": 1}, "int8", "int8_int4: a weight of one int32 word"),
    ("w4a16", {"out": 8, "inn": 1}, "weight_int8", "weight_int4: a weight of one int32 word"),
    ("w4a8", {"inn": 18448}, "int8_nz", "int8_int4: 18448 input features are more than 18432"),
    ("w4a8", {"out": 96}, "int8_int4", "int8_int4_nz: 96 output features are not a multiple of 64"),
    ("w4a8", {"out": 44}, "int8", "int8_int4: 44 output features are not a multiple of 8"),
    ("w4a4", {"inn": 252}, "int8_int4", "int4: 252 input features are not a multiple of 8"),
    ("wfp8afp8", {}, None, "reference: computes integer weights; fp8 ones need the operations of Ascend950"),
]
EXPERTS = [
    ("w4a16_g32", {}, "weight_int4", ""),
    ("w4a16_g128", {"inn": 320}, "reference", "320 input features are not whole groups of 128"),
    ("w8a16_g64", {}, "reference", "weight_int8: npu_grouped_matmul has no int8 weights in groups (of 64)"),
    ("w8a8", {"experts": 2000}, "reference", "int8: 2000 experts are more than 1024"),
    ("w8a8_static", {}, "int8_nz", ""),
    ("w4a4", {"out": 96}, "int8_int4", "int4_nz: 96 output features are not a multiple of 64"),
]


@pytest.mark.parametrize(("scheme", "sizes", "kernel", "reason"), LINEARS)
def test_constraints_of_linears(scheme, sizes, kernel, reason):
    name, why = chosen(scheme, **sizes)
    assert name == kernel, why
    assert reason in why
    assert bool(reason) == bool(why)


@pytest.mark.parametrize(("scheme", "sizes", "kernel", "reason"), EXPERTS)
def test_constraints_of_experts(scheme, sizes, kernel, reason):
    name, why = chosen(scheme, **{"experts": 4, **sizes})
    assert name == kernel, why
    assert reason in why
    assert bool(reason) == bool(why)


# ------------------------------------------------------------------------------------------------------------- chips


@pytest.mark.parametrize(
    ("soc", "scheme", "dtype", "kernel", "reason"),
    [
        ("Ascend910B2", "w4a16_g128", bf16, "weight_int4", ""),
        ("Ascend910_9391", "w8a8", bf16, "int8_nz", ""),
        ("Ascend310P3", "w4a16", fp16, "weight_int8", "int4 weights is not documented for Ascend310P"),
        ("Ascend310P3", "w8a16", bf16, "reference", "Ascend310P computes it in float16, not bfloat16"),
        ("Ascend310P3", "w8a8_static", fp16, "int8_static", "int8_static_nz: FRACTAL_NZ weights as they are laid"),
        ("Ascend310P3", "w8a8", fp16, "reference", "npu_quant_matmul with a scale per token and npu_dynamic_quant"),
        ("Ascend950PR", "w8a8", bf16, "reference", "is not documented for Ascend950"),
    ],
)  # fmt: skip
def test_what_a_chip_lacks_is_a_reason(soc, scheme, dtype, kernel, reason):
    with npu.target(soc=soc):
        name, why = chosen(scheme, dtype=dtype)
    assert name == kernel, why
    assert reason in why


def test_an_unknown_chip_is_named_with_the_nearest():
    with pytest.raises(qcompile.ConfigError, match=r"no chip 'Ascend910D'.*Ascend910B"), npu.target(soc="Ascend910D"):
        pass


def test_fractal_nz_can_be_switched_off():
    with npu.target(nz=False):
        assert chosen("w8a8") == ("int8", "int8_nz: FRACTAL_NZ is switched off")
        with npu.target(soc="Ascend310P"):
            assert chips.current() == chips.Target(chips.find_soc("Ascend310P"), False)
        assert chosen("w4a4", experts=4)[0] == "int8_int4"  # npu_grouped_matmul of int4 wants FRACTAL_NZ
    assert chosen("w8a8")[0] == "int8_nz"


# ----------------------------------------------------------------------------------------------- without torch_npu


def test_nothing_of_this_needs_torch_npu():
    assert "torch_npu" not in sys.modules


def test_a_device_without_torch_npu_says_which_package_in_which_version():
    release = torch.__version__.partition("+")[0]
    with pytest.raises(qcompile.UnsupportedError, match=rf"torch_npu is not installed.*torch-npu=={release}"):
        find_backend("npu:0")
    with pytest.raises(qcompile.UnsupportedError, match="torch_npu is not installed"):
        qcompile.quantize(tiny_model(), "w8a8", device="npu")


def test_a_plan_needs_no_device():
    plan = qcompile.plan(tiny_model(), "w8a8", device="npu")
    kernels = {planned.kernel for planned in plan.quantized}
    assert kernels == {"npu.int8_nz"}
    edited = plan.override("*.down_proj", "w4a8")
    assert edited["model.layers.0.mlp.down_proj"].kernel == "npu.int8_int4_nz"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = quantize_linears(tiny_model(), {"down_proj": "w4a16_g48", "gate_proj": "w8a8", "q_proj": "w4a16_g32"})
    return qcompile.save(model, tmp_path_factory.mktemp("npu") / "model")


def test_inspecting_a_checkpoint_lists_every_fallback(checkpoint):
    plan = qcompile.inspect(checkpoint, device="npu")
    assert plan["model.layers.0.self_attn.q_proj"].kernel == "npu.weight_int4"
    assert plan["model.layers.0.mlp.gate_proj"].kernel == "npu.int8_nz"
    down = plan["model.layers.1.mlp.down_proj"]
    assert down.kernel == "npu.reference"
    assert "weight_int4: group size 48 is not a multiple of 32" in down.reason
    assert plan.bytes_after < plan.bytes_before


def test_the_command_line_plans_for_any_chip(checkpoint):
    run = CliRunner().invoke
    shown = json.loads(
        run(app, ["inspect", str(checkpoint), "--device", "npu", "--soc", "Ascend310P3", "--json"]).stdout
    )
    reasons = " ".join(site["reason"] for site in shown["sites"])
    assert "Ascend310P computes it in float16, not bfloat16" in reasons
    refused = run(app, ["inspect", str(checkpoint), "--soc", "Ascend310P3"])
    assert "--soc names a chip and goes with --device npu or cuda, not cpu" in str(refused.exception)


# -------------------------------------------------------------------------------------------------------------- fuzz

schemes = st.sampled_from(
    ["w4a16", "w4a16_asym", "w8a16", "w3a16", "w8a8", "w8a8_static", "w8a8_static_sym", "w4a8", "w4a8_clip", "w4a4"]
)
groups = st.sampled_from(["", "_g16", "_g32", "_g64", "_g96", "_g128", "_g256"])


@given(
    schemes, groups, st.integers(1, 12).map(lambda n: 8 * n) | st.integers(1, 70), st.integers(1, 70) | st.just(512),
    st.sampled_from([bf16, fp16]), st.sampled_from([0, 1, 3]),
)  # fmt: skip
def test_what_a_kernel_accepts_is_within_the_contract_and_what_it_refuses_has_a_reason(
    scheme, group, out, inn, dtype, experts
):
    """The goldens raise for any call that is outside of the documented contract of its operation."""
    if group:
        name, underscore, rest = scheme.partition("_")
        scheme = f"{name}{group}{underscore}{rest}"
    parsed, shape = Scheme.parse(scheme), (*((experts,) if experts else ()), out, inn)
    site = experts_site(*shape, dtype) if experts else linear_site(*shape, dtype)
    packed = packed_weight(shape, parsed, dtype)
    ends = torch.tensor([2, 2, 5][:experts] if experts > 1 else [5], dtype=torch.int32)
    for kernel in BACKEND.kernels:
        if site.kind not in kernel.kinds:
            continue
        if reason := kernel.refuses(site, parsed):
            assert reason.strip()
            continue
        x = torch.randn(5, inn).to(dtype)
        own, tensors = packed, kernel.prepare(packed)
        rows = [x]
        if parsed.activation is not None and experts:
            owner = torch.searchsorted(ends, torch.arange(5), right=True)
            params = [param[owner][:, None] for param in packed.activation_tensors().values()]
            parts = numerics.quantize_activation(x, parsed.activation, params)
            rows = parts if parsed.activation.dynamic else [*parts, *params]
        elif parsed.activation is not None:
            rows = quantized(x, own)

        def product(kernel, tensors, rows=rows):
            if experts:
                return kernel.grouped_linear(rows, ends, tensors, parsed, out, dtype)
            if parsed.activation is None:
                return kernel.linear(rows[0], tensors, None, parsed, out)
            return kernel.scaled_linear(rows, tensors, None, parsed, out, dtype)

        actual, definition = product(kernel, tensors), product(Kernel(), Kernel().prepare(packed))
        largest = definition.double().abs().max().clamp(min=1e-3)
        assert (actual.double() - definition.double()).abs().max() <= 2e-2 * largest, kernel.name
