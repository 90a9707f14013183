"""Which kernel a GPU gets, why not another, and what happens where there is none: all without a GPU and Triton."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from cuda_cases import ARCHS, DTYPES, error, exact, kernel_for, packed_weight, run, site
from helpers import relative_error
from torch import nn

import qcompile
from qcompile.backends.cuda import BACKEND, targets, tiles
from qcompile.errors import ConfigError, UnsupportedError
from qcompile.kernels import choose
from qcompile.modules import QuantLinear
from qcompile.types import Scheme

SCALED = {
    "w8a8": "w8a8", "w8a8_static": "w8a8", "w8a8_asym_dynamic_asym": "w8a8", "w6a8_g64": "w8a8", "w4a8": "w4a8",
    "w4a8_g128_asym": "w4a8", "w4a8_clip": "w4a8", "w4a4": "w4a8", "w3a8": "w4a8", "wfp8afp8": "fp8",
    "wfp8afp8_tensor_static": "fp8", "wfp8afp8_b128x128": "fp8",
}  # fmt: skip
WEIGHT_ONLY = ("w4a16_g128", "w4a16_g32_asym", "w4a16", "w3a16_g64", "w8a16", "w8a16_g64_asym", "w6a16")


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
@pytest.mark.parametrize("arch", ARCHS)
def test_each_scheme_has_its_kernel(scheme, arch):
    bits = 4 if Scheme.parse(scheme).weight.bits <= 4 else 8
    for experts in (0, 8):
        for dtype in DTYPES:
            assert kernel_for(Scheme.parse(scheme), arch, dtype, experts).name == f"w{bits}a16_{arch.replace('_', '')}"


@pytest.mark.parametrize("experts", [0, 8])
def test_quantized_activations_have_theirs(experts):
    found = {scheme: kernel_for(Scheme.parse(scheme), "sm_89", experts=experts).name for scheme in SCALED}
    assert found == SCALED
    assert kernel_for(Scheme.parse("w8a8"), "gfx942").name == "w8a8"


@pytest.mark.parametrize(
    ("arch", "scheme", "dtype", "kernel", "reason"),
    [
        ("sm_80", "wfp8afp8", torch.bfloat16, "reference", "sm_80 does not multiply e4m3; NVIDIA GPUs do from sm_89"),
        ("sm_90", "wfp8afp8_b64x64", torch.bfloat16, "reference", "blocks of 64 x 64 are not 128 x 128"),
        ("sm_90", "wfp8afp8_g64", torch.bfloat16, "reference", "groups of 64: it has scales per channel"),
        ("sm_90", "w4a8_g16", torch.bfloat16, "reference", "group size 16 is none of 32, 64, 128, 256"),
        ("sm_75", "w4a16_g128", torch.float16, "reference", "capability 8.0, and sm_75 is older"),
        ("sm_80", "w4a16_g128", torch.float16, "w4a16_sm80", "laid out for wgmma, which sm_80 does not have"),
        ("sm_120", "w4a16_g128", torch.float16, "w4a16_sm80", "wgmma, which sm_120 does not have"),
        ("gfx942", "w4a16_g128", torch.float16, "w4a16_sm80", "wgmma, which gfx942 does not have"),
        ("sm_90", "w4a16_g48", torch.float16, "reference", "group size 48 is none of 32, 64, 128, 256"),
        ("sm_90", "w4a16_g128", torch.float32, "reference", "bfloat16 and float16, not torch.float32: load the model"),
    ],
)
def test_what_a_gpu_cannot_do_is_a_reason(arch, scheme, dtype, kernel, reason):
    with BACKEND.target(arch):
        chosen, why = choose(BACKEND, site(64, 256, dtype), Scheme.parse(scheme))
    assert chosen is not None
    assert chosen.name == kernel
    assert reason in why


def test_an_unknown_gpu_or_kernel_is_an_error():
    with pytest.raises(ConfigError, match="no GPU 'hopper'"), BACKEND.target("hopper"):
        pass
    with pytest.raises(UnsupportedError, match=r"no kernel 'w4a16'.*w4a16_sm90"):
        BACKEND.kernel("w4a16")


def test_a_plan_needs_neither_a_gpu_nor_triton():
    code = """
import sys, torch, transformers
sys.modules["triton"] = None
from helpers import tiny_model
import qcompile
print(qcompile.plan(tiny_model(), "w4a16_g128", device="cuda"))
"""
    folder = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "w4a16_sm90" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_not_there_is_a_clear_error():
    with pytest.raises(
        UnsupportedError, match=r"device 'cuda' cannot be used here: (this torch .* is built|torch sees)"
    ):
        qcompile.quantize(nn.Linear(8, 8), "w4a16_g128", device="cuda")


@pytest.mark.parametrize("scheme", [*WEIGHT_ONLY, *SCALED])
@pytest.mark.parametrize("permuted", [False, True])
def test_preparing_loses_nothing_and_takes_the_bytes_of_the_plan(scheme, permuted):
    parsed = Scheme.parse(scheme)
    permuted = permuted and not parsed.weight.block
    for arch in ("sm_90", "sm_89"):
        for shape in ((72, 200), (3, 72, 200)):
            packed = packed_weight(parsed, shape, torch.bfloat16, permuted)
            kernel = kernel_for(parsed, arch, experts=len(shape) == 3)
            tensors = kernel.prepare(packed)
            restored = kernel.restore(tensors, parsed, shape, packed.activation_tensors())
            for name, tensor in packed.tensors().items():
                assert restored.tensors()[name].dtype == tensor.dtype
                assert torch.equal(restored.tensors()[name].view(torch.uint8), tensor.view(torch.uint8)), name
            size = sum(t.numel() * t.element_size() for t in tensors[: len(tensors) - permuted])
            experts = shape[0] if len(shape) == 3 else 0
            assert size == kernel.nbytes(site(*shape[-2:], torch.bfloat16, experts), parsed)


def test_a_weight_is_prepared_on_the_cpu_where_the_gpu_has_no_room(monkeypatch):
    scheme = Scheme.parse("w4a16_g128")
    kernel, packed = kernel_for(scheme, "sm_90"), packed_weight(scheme, (64, 256), torch.bfloat16)
    expected, arrange, calls = kernel.prepare(packed), type(kernel).arrange, []

    def full_at_first(self, weight):
        calls.append(weight)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return arrange(self, weight)

    monkeypatch.setattr(type(kernel), "arrange", full_at_first)
    assert all(map(torch.equal, kernel.prepare(packed), expected))
    assert len(calls) == 2


def test_no_room_even_for_the_result_says_what_can_be_done(monkeypatch):
    scheme = Scheme.parse("w4a16_g128")
    kernel, packed = kernel_for(scheme, "sm_90"), packed_weight(scheme, (64, 256), torch.bfloat16)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    stuck = SimpleNamespace(to=full, numel=lambda: 2**20, element_size=lambda: 1)
    results = iter([full, lambda: [stuck]])
    monkeypatch.setattr(type(kernel), "arrange", lambda self, weight: next(results)())
    with pytest.raises(
        UnsupportedError, match=r"no room on cpu for a w4a16_g128 weight \[64, 256\] of 1 MiB.*to\('cpu'"
    ):
        kernel.prepare(packed)


@pytest.mark.parametrize("scheme", [*WEIGHT_ONLY[:2], *SCALED])
def test_a_model_that_left_the_gpu_runs_on_the_cpu(scheme):
    parsed = Scheme.parse(scheme)
    packed = packed_weight(parsed, (72, 200), torch.bfloat16, not parsed.weight.block)
    x, bias = torch.randn(2, 3, 200).bfloat16(), torch.randn(72).bfloat16()
    for arch in ("sm_90", "sm_89"):
        assert error(run(kernel_for(packed.scheme, arch), packed, x, bias), exact(packed, x, bias)) < 6e-3


def quantized_linear(scheme: str, shape: tuple[int, int]) -> QuantLinear:
    packed = packed_weight(Scheme.parse(scheme), shape, torch.bfloat16)
    return QuantLinear(packed, None, f"cuda.{kernel_for(packed.scheme, 'sm_90').name}", torch.bfloat16)


def test_a_compiled_graph_holds_the_op_and_leaves_the_sum_of_splits_to_inductor(fresh_dynamo):
    model = nn.Sequential(quantized_linear("w4a16_g64", (256, 1024)), nn.ReLU(), quantized_linear("w8a16", (64, 256)))
    x, graphs = torch.randn(1, 1024).bfloat16(), []
    with torch.no_grad():
        eager = model(x)
        options = {"regions": False, "post_grad_custom_post_pass": graphs.append}
        compiled = torch.compile(model, backend="qcompile", options=options)
        assert relative_error(compiled(x), eager) < 1e-2
    (graph,) = graphs
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    assert calls.count(torch.ops.qcompile_cuda.float_linear.default) == 2
    assert calls.count(torch.ops.aten.sum.dim_IntList) == 1  # the second one has too few columns to split
    assert not any("qcompile::" in str(call) for call in calls)


def test_splits_fill_the_gpu_and_divide_the_columns():
    gpu = targets.parse("sm_90")
    for rows in (1, 5, 16, 33, 64, 100, 600):
        for out, columns in ((64, 64), (4096, 4096), (6144, 4096), (4096, 12288), (151936, 1024), (192, 2944)):
            chosen = tiles.choose(tiles.Weight("w4a16", out, columns), rows, gpu)
            assert out % chosen.bn == 0
            assert columns % (chosen.splits * chosen.bk) == 0
            assert 1 <= chosen.splits <= tiles.MOST_SPLITS
    assert tiles.choose(tiles.Weight("w4a16", 4096, 4096), 1, gpu).splits == 8
    assert tiles.choose(tiles.Weight("w4a16", 24576, 4096), 1, gpu).splits < 4
    assert tiles.choose(tiles.Weight("w4a16", 1536, 2048, 128), 8, gpu).mode == tiles.EACH_ROW
    assert tiles.choose(tiles.Weight("w4a16", 1536, 2048, 128), 512, gpu).mode == tiles.BLOCKS


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_the_rules_keep_what_tuned_tiles_are_held_to(arch):
    gpu = targets.parse(arch)
    for kind, group in (("w4a16", 128), ("w4a16", 32), ("w8a16", 0), ("int8", 0), ("int4", 64), ("fp8", 128)):
        for experts, part in ((0, ""), (16, ""), (16, "gate_up"), (128, "down")):
            for out, columns in ((24576, 4096), (1536, 2048), (192, 2944)):
                for rows in (1, 8, 32, 64, 128, 1000, 9000):
                    weight = tiles.Weight(kind, out, columns, experts, group, part)
                    assert tiles.unfit(tiles.rule(weight, rows, gpu), weight, rows, gpu) == ""


def test_columns_in_another_order_do_not_go_with_blocks():
    packed = packed_weight(Scheme.parse("wfp8afp8_b128x128"), (64, 256), torch.bfloat16, True)
    with pytest.raises(UnsupportedError, match="permuted columns"):
        kernel_for(packed.scheme, "sm_90").prepare(packed)


def test_a_fake_call_has_the_shape_of_a_real_one():
    scheme = Scheme.parse("w4a16_g128")
    codes, pairs = kernel_for(scheme, "sm_90").prepare(packed_weight(scheme, (72, 256), torch.bfloat16))
    arguments = (torch.randn(3, 256).bfloat16(), codes, pairs, None, None, 4, True, 128, True, 72)
    for splits in (0, 2):
        op = torch.ops.qcompile_cuda.float_linear.default
        torch.library.opcheck(op, (*arguments, splits), test_utils=("test_schema", "test_faketensor"))
