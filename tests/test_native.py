"""The C++ kernels of the CPU: how they are built, and that every number they give is right."""

import dataclasses
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile import numerics
from qcompile.backends.cpu import BACKEND, native
from qcompile.backends.cpu.native_kernel import Native
from qcompile.cache import CACHE_VARIABLE
from qcompile.errors import ConfigError, UnsupportedError
from qcompile.kernels import choose
from qcompile.types import Scheme, Site

KERNEL = Native()
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}
ROUNDING = {torch.bfloat16: 1e-4, torch.float16: 1e-4, torch.float32: 5e-7}  # activations to 15 or 30 bits, and sums
# rows from which weights are rounded to bfloat16
TILED = {"amx": 11, "avx512_bf16": 96}.get(native.instruction_set(), 10**9)
SCHEMES = (
    "w4a16_g32",
    "w4a16_g64_asym",
    "w4a16_g128",
    "w4a16_asym",
    "w2a16_g16",
    "w8a16",
    "w8a16_g32_asym",
    "w8a8",
    "w8a8_dynamic_asym",
    "w4a8",
    "w4a8_g32_asym",
    "w4a4",
)

built = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())


def site(out: int, inn: int, dtype: torch.dtype, experts: int = 0) -> Site:
    return Site("layer", "experts" if experts else "linear", out, inn, dtype, kind="linear", experts=experts)


# ----------------------------------------------------------------------------------------------------------- building


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty cache."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    monkeypatch.setattr(native, "instruction_set", lambda: "avx2")
    return tmp_path


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Pretend that the compiler is a shell script; returns the file in which it notes its calls."""
    import torch._inductor.config  # noqa: F401  (it reads CXX once)

    def make(script: str):
        path, log = tmp_path / "a compiler", tmp_path / "calls"
        path.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1.0; exit; fi\necho "$@" >> "{log}"\n{script}\n'
        )
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return log

    return make


unavailable = native.unavailable.__wrapped__  # without its cache


def test_without_a_compiler_the_reason_names_it(monkeypatch, folder):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert unavailable() == "no C++ compiler: 'no-such-compiler' is not found (CXX names another)"


def test_a_failing_compiler_is_quoted_once_and_another_kernel_is_chosen(monkeypatch, folder, compiler, capsys):
    compiler("for i in $(seq 100); do echo line $i; done >&2; exit 1")
    reason = unavailable()
    assert reason.endswith("cannot compile it")
    said = capsys.readouterr().err
    assert "ATen's are used instead" in said
    assert "line 100" in said
    assert "line 80\n" not in said
    monkeypatch.setattr(native, "unavailable", lambda: reason)
    chosen, why = choose(BACKEND, site(64, 64, torch.bfloat16), Scheme.parse("w4a16_g32"))
    assert chosen is not None
    assert (chosen.name, why) == ("int4pack", f"native: {reason}")
    assert capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written_is_a_reason(monkeypatch, folder):
    (folder / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(folder / "file"))
    assert "QCOMPILE_CACHE_DIR names another folder" in unavailable()


def test_a_broken_library_is_a_reason(folder, compiler):
    compiler("echo nonsense > qcompile_cpu.so")
    assert unavailable().startswith("its library cannot be stored or loaded")


def test_threads_and_processes_share_one_compilation(folder, compiler, capsys):
    log = compiler("sleep 0.2; echo library > qcompile_cpu.so")
    paths = []
    threads = [
        threading.Thread(target=lambda: paths.append(native._library("avx2", os.environ["CXX"]))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert paths[0].read_text() == "library\n"
    assert len(log.read_text().splitlines()) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[1] for line in said] == ["compiling", "compiled"]
    assert not [path for path in paths[0].parent.iterdir() if path.is_dir()]


def test_a_library_is_found_by_everything_that_it_is_made_of(monkeypatch, folder, compiler):
    log = compiler("exit 1")
    first = native._key("avx2", os.environ["CXX"])
    assert native._key("avx512", os.environ["CXX"]) != first
    monkeypatch.setattr(torch, "__version__", "2.12.0")
    assert native._key("avx2", os.environ["CXX"]) != first
    monkeypatch.undo()
    assert not log.exists()


def test_a_forced_instruction_set_must_exist(monkeypatch):
    monkeypatch.setenv(native.ISA_VARIABLE, "avx3")
    with pytest.raises(ConfigError, match=r"QCOMPILE_CPU_ISA='avx3' is unknown\. Did you mean 'avx2'"):
        unavailable()
    monkeypatch.setenv(native.ISA_VARIABLE, "avx512_vnni")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    for level in ("avx512_vnni", "avx512_bf16", "amx"):
        monkeypatch.setenv(native.ISA_VARIABLE, level)
        with pytest.raises(UnsupportedError, match=f"'{level}', but this CPU does not have it; unset the variable"):
            unavailable()
    monkeypatch.setenv(native.ISA_VARIABLE, "none")
    assert unavailable() == "QCOMPILE_CPU_ISA is 'none'"


def test_the_best_instruction_set_of_the_cpu_is_taken(monkeypatch):
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert native.instruction_set() == "amx"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert native.instruction_set() == "avx512_bf16"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert native.instruction_set() == "avx512_vnni"
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert native.instruction_set() == "avx512"
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert native.instruction_set() == "avx2"
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    assert native.instruction_set() == "this CPU has neither AVX512 nor AVX2"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert native.instruction_set() == "it is written for x86-64, not aarch64"


@built
@pytest.mark.slow
def test_every_older_instruction_set_gives_the_same_numbers():
    """In processes of their own: a library is loaded once."""
    best = native.instruction_set()
    older = list(native.LEVELS)[list(native.LEVELS).index(best) + 1 :]
    for level in older:
        environment = os.environ | {native.ISA_VARIABLE: level}
        command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", __file__, "-k", "many_rows or without_rows"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:]


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "dtype", "inn", "reason"),
    [
        ("wfp8a16", torch.bfloat16, 64, "computes integer weights"),
        ("w4a16", torch.float64, 64, "not torch.float64"),
        ("w4a16_g20", torch.bfloat16, 64, "group size 20 is no multiple of 8"),
        ("w5a8", torch.bfloat16, 64, "weights above 4 bits must be symmetric"),
        ("w8a8_asym", torch.bfloat16, 64, "weights above 4 bits must be symmetric"),
        ("w8a8", torch.bfloat16, 40000, "are more than 32768"),
    ],
)
def test_what_it_cannot_compute_is_refused_with_the_reason(name, dtype, inn, reason):
    assert reason in KERNEL.refuses(site(64, inn, dtype), Scheme.parse(name))


# ------------------------------------------------------------------------------------------------------------ numbers


def weight_of(scheme: Scheme, *shape: int, dtype: torch.dtype):
    packed = numerics.quantize_weight(torch.randn(*shape).to(dtype), scheme)
    exact = numerics.dequantize_packed(dataclasses.replace(packed, scales=packed.scales.double()))
    return packed, exact


def inputs_of(scheme: Scheme, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the kernel takes, and the exact numbers that it stands for."""
    if scheme.activation is None:
        return [x], x.double()
    parts = numerics.quantize_activation(x, scheme.activation)
    return parts, numerics.dequantize_activation(parts, scheme.activation)


def multiply(packed, parts: list[torch.Tensor], dtype: torch.dtype, bias: torch.Tensor | None = None) -> torch.Tensor:
    scheme, out = packed.scheme, packed.shape[-2]
    if scheme.activation is None:
        return KERNEL.linear(parts[0], KERNEL.prepare(packed), bias, scheme, out)
    return KERNEL.scaled_linear(parts, KERNEL.prepare(packed), bias, scheme, out, dtype)


def assert_close(result: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None):
    """The largest error, relative to the largest result; what rounds inputs or weights stays where terms cancel."""
    expected = inputs @ weight.t() + (0 if bias is None else bias.double())
    assert result.shape == expected.shape
    if not result.numel():
        return
    size = (inputs.square() @ weight.square().t()).sqrt().max()
    error = (result.double() - expected).abs().max()
    rounding = 5e-3 if result.dtype == torch.bfloat16 and len(result) >= TILED else ROUNDING[result.dtype]
    assert error <= TOLERANCE[result.dtype] * expected.abs().max() + rounding * size


each_scheme = pytest.mark.parametrize("scheme", [Scheme.parse(name) for name in SCHEMES], ids=str)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@built
@each_scheme
@given(data=st.data())
def test_products_of_any_shape_and_strides(scheme, data):
    """Also with fewer features than a vector, a short last group, padded channels, and no rows."""
    rows, out, inn = (data.draw(st.integers(low, high)) for low, high in ((0, 40), (1, 200), (1, 500)))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    packed, exact = weight_of(scheme, out, inn, dtype=dtype)
    layout = data.draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded"]))
    x = {
        "contiguous": lambda: torch.randn(rows, inn),
        "transposed": lambda: torch.randn(inn, rows).t(),
        "strided": lambda: torch.randn(rows, 2 * inn)[:, ::2],
        "expanded": lambda: torch.randn(1, inn).expand(rows, inn),
    }[layout]().to(dtype)
    bias = torch.randn(out).to(dtype) if data.draw(st.booleans()) else None
    parts, inputs = inputs_of(scheme, x)
    assert_close(multiply(packed, parts, dtype, bias), inputs, exact, bias)


@built
@each_scheme
@each_dtype
def test_products_with_many_rows(scheme, dtype):
    """More than one item of rows, and every number of rows in a tile."""
    packed, exact = weight_of(scheme, 70, 264, dtype=dtype)
    for rows in (*range(1, 14), 61, 400, 1000):
        parts, inputs = inputs_of(scheme, torch.randn(rows, 264).to(dtype))
        result, expected = multiply(packed, parts, dtype), inputs @ exact.t()
        assert_close(result, inputs, exact)
        assert (result - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@built
@each_scheme
@pytest.mark.parametrize("rows", [9, 50, 130, 700])
def test_products_are_the_same_bits_on_any_number_of_threads_and_for_batches_as_large(scheme, rows):
    """A batch of another size is the same where it is computed in the same way."""
    packed, _ = weight_of(scheme, 300, 512, dtype=torch.bfloat16)
    parts, _ = inputs_of(scheme, torch.randn(rows, 512).bfloat16())
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(multiply(packed, parts, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    fewer = TILED if rows >= TILED and scheme.activation is None else 1
    for row in (0, (rows - fewer) // 2, rows - fewer):
        alone = multiply(packed, [part[row : row + fewer] for part in parts], torch.bfloat16)
        assert torch.equal(alone, results[0][row : row + fewer])


@built
@each_scheme
def test_products_fill_every_element(scheme):
    """Memory that nobody wrote is NaN here."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8).isnan().all()
        for out, rows in ((1, 1), (63, 5), (64, 9), (130, 100)):
            packed, exact = weight_of(scheme, out, 72, dtype=torch.bfloat16)
            parts, inputs = inputs_of(scheme, torch.randn(rows, 72).bfloat16())
            result = multiply(packed, parts, torch.bfloat16)
            assert result.isfinite().all()
            assert_close(result, inputs, exact)
    finally:
        torch.use_deterministic_algorithms(False)


@built
@each_dtype
def test_products_of_very_large_and_very_small_numbers(dtype):
    """Each row and group has a scale of its own; what is not finite stays so, and in its own row."""
    packed, exact = weight_of(Scheme.parse("w4a16_g32"), 64, 64, dtype=dtype)
    x = torch.randn(6, 64)
    x[0] *= 1e3
    x[1] *= 1e-3
    x[2, :32] *= 1e-3
    x[3, 5], x[4, 40], x[5] = float("nan"), float("-inf"), 0
    for repeats in (1, 4):
        many = x.repeat_interleave(repeats, 0).to(dtype)
        result = multiply(packed, [many], dtype).unflatten(0, (6, repeats))
        for row in range(3):
            expected = many.unflatten(0, (6, repeats))[row].double() @ exact.t()
            assert (result[row].double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
        assert not result[3:5].isfinite().any()
        assert not result[5].any()


@built
def test_static_scales_are_one_number_or_one_for_each_row():
    scheme = Scheme.parse("w8a8_static")
    packed = numerics.quantize_weight(torch.randn(70, 96), Scheme.parse("w8a8"))
    scale, zero = torch.tensor([0.03]), torch.tensor([-7], dtype=torch.int32)
    packed = dataclasses.replace(packed, scheme=scheme, input_scale=scale, input_zero=zero)
    exact = numerics.dequantize_packed(dataclasses.replace(packed, scales=packed.scales.double()))
    (codes,) = numerics.quantize_activation(torch.randn(9, 96), scheme.activation, [scale, zero])
    one = multiply(packed, [codes, scale, zero], torch.float32)
    each = multiply(packed, [codes, scale.expand(9)[:, None], zero.expand(9)[:, None]], torch.float32)
    assert_close(one, (codes.double() - zero) * scale.double(), exact)
    assert torch.equal(one, each)


# ------------------------------------------------------------------------------------------------------------ experts


def grouped(packed, parts: list[torch.Tensor], counts: list[int], dtype: torch.dtype) -> torch.Tensor:
    ends = torch.tensor(counts).cumsum(0).int()
    return KERNEL.grouped_linear(parts, ends, KERNEL.prepare(packed), packed.scheme, packed.shape[-2], dtype)


def assert_grouped(result: torch.Tensor, inputs: torch.Tensor, exact: torch.Tensor, counts: list[int]) -> None:
    start = 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        assert_close(result[rows], inputs[rows], exact[expert])
        start += count


@built
@each_scheme
@given(data=st.data())
def test_experts_take_their_own_rows(scheme, data):
    counts = data.draw(st.lists(st.sampled_from([0, 1, 2, 5, 9, 30]), min_size=1, max_size=6))
    out, inn = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 200))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    packed, exact = weight_of(scheme, len(counts), out, inn, dtype=dtype)
    parts, inputs = inputs_of(scheme, torch.randn(sum(counts), inn).to(dtype))
    assert_grouped(grouped(packed, parts, counts, dtype), inputs, exact, counts)


@built
@each_scheme
def test_experts_without_rows_are_not_read(scheme):
    """Not even for what is multiplied by zero: NaN in their scales is never seen."""
    packed, exact = weight_of(scheme, 4, 70, 64, dtype=torch.bfloat16)
    counts = [0, 3, 0, 12]
    packed.scales[[0, 2]] = float("nan")
    parts, inputs = inputs_of(scheme, torch.randn(15, 64).bfloat16())
    assert_grouped(grouped(packed, parts, counts, torch.bfloat16), inputs, exact, counts)


@built
@each_scheme
@each_dtype
def test_experts_restore_exactly_in_the_bytes_that_were_planned(scheme, dtype):
    for experts, out, inn in ((1, 64, 64), (3, 70, 100), (2, 129, 33)):
        packed, _ = weight_of(scheme, experts, out, inn, dtype=dtype)
        tensors = KERNEL.prepare(packed)
        restored = KERNEL.restore(tensors, scheme, packed.shape).tensors()
        assert restored.keys() == packed.tensors().keys()
        for name, tensor in packed.tensors().items():
            assert torch.equal(restored[name], tensor), name
        wanted = KERNEL.nbytes(site(out, inn, dtype, experts), scheme)
        assert wanted == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@built
@pytest.mark.parametrize("name", ["w4a16_g32_asym", "w8a8"])
def test_experts_apply_their_own_permutation(name):
    scheme, counts = Scheme.parse(name), [2, 0, 5]
    packed, exact = weight_of(scheme, 3, 40, 64, dtype=torch.bfloat16)
    order = torch.stack([torch.randperm(64) for _ in counts]).int()
    permuted = dataclasses.replace(packed, permutation=order)
    exact = torch.empty_like(exact).scatter_(-1, order.long()[:, None].expand_as(exact), exact)
    parts, inputs = inputs_of(scheme, torch.randn(7, 64).bfloat16())
    assert_grouped(grouped(permuted, parts, counts, torch.bfloat16), inputs, exact, counts)
    assert torch.equal(KERNEL.restore(KERNEL.prepare(permuted), scheme, (3, 40, 64)).permutation, order)


@built
def test_experts_whose_ends_do_not_fit_the_rows_are_an_error():
    packed, _ = weight_of(Scheme.parse("w4a16_g32"), 2, 64, 64, dtype=torch.float32)
    for counts in ([3, 1], [4, -1]):
        with pytest.raises(RuntimeError, match="ends"):
            grouped(packed, [torch.randn(3, 64)], counts, torch.float32)


@built
def test_rows_behind_the_last_end_belong_to_nobody():
    """They are those of experts that another rank has."""
    packed, exact = weight_of(Scheme.parse("w4a16_g32"), 2, 64, 64, dtype=torch.float32)
    x = torch.randn(5, 64)
    found = grouped(packed, [x], [1, 2], torch.float32)
    assert found.shape == (5, 64)
    assert_grouped(found[:3], x[:3].double(), exact, [1, 2])


# -------------------------------------------------------------------------------------------------------- the op itself


@built
@pytest.mark.parametrize("name", ["w4a16_g32_asym", "w8a8_dynamic_asym"])
def test_the_ops_keep_the_rules_of_torch(name):
    """Schema, fake tensors, no mutation, dynamic shapes."""
    packed, _ = weight_of(Scheme.parse(name), 70, 64, dtype=torch.bfloat16)
    codes, scales, *rest = KERNEL.prepare(packed)
    parts, _ = inputs_of(packed.scheme, torch.randn(2, 3, 64).bfloat16())
    bias = torch.randn(70)
    if packed.scheme.activation is None:
        arguments = (*parts, codes, scales, rest[0], bias, None, 8, 70, torch.float32)
        torch.library.opcheck(torch.ops.qcompile_cpu.linear.default, arguments)
    else:
        arguments = (*parts, codes, scales, None, rest[0], bias, None, 128, 70, torch.bfloat16)
        torch.library.opcheck(torch.ops.qcompile_cpu.scaled_linear.default, arguments)


@built
@pytest.mark.parametrize("name", ["w4a16_g32", "w8a8"])
def test_large_weights_are_aligned_to_huge_pages(name):
    packed, _ = weight_of(Scheme.parse(name), 2048, 2048, dtype=torch.bfloat16)
    codes = KERNEL.prepare(packed)[0]
    assert codes.data_ptr() % 2**21 == 0
    assert torch.equal(codes, codes.clone())


@built
def test_a_compiled_call_is_the_op_itself():
    packed, _ = weight_of(Scheme.parse("w4a16_g32"), 70, 64, dtype=torch.bfloat16)
    tensors = KERNEL.prepare(packed)
    x = torch.randn(3, 64).bfloat16()
    compiled = torch.compile(lambda x: KERNEL.linear(x.relu(), tensors, None, packed.scheme, 70) + 1, dynamic=True)
    assert torch.equal(compiled(x), KERNEL.linear(x.relu(), tensors, None, packed.scheme, 70) + 1)
