"""Several ranks give what one gives: processes of gloo on this machine, two and four of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stored import golden

HERE = Path(__file__).parent


def torchrun(ranks: int, *command: str, **settings: str) -> subprocess.Popen:
    """Start ``command`` on so many ranks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)} | settings
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*launcher, *command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def run(folder: Path, ranks: int, *cases: str, **settings: str) -> dict[str, list[dict]]:
    """What every rank found, by case."""
    process = torchrun(ranks, str(HERE / "parallel_cases.py"), *cases, FOUND=str(folder), **settings)
    try:
        _, errors = process.communicate(timeout=1500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-3000:]
    found: dict[str, list[dict]] = {case: [] for case in cases}
    for rank in range(ranks):
        for line in (folder / f"{rank}.jsonl").read_text().splitlines():
            own = json.loads(line)
            found[own.pop("case")].append(own)
    return found


def check(found: dict[str, list[dict]]) -> None:
    """Logits of one rank, and its tokens. A sum in another order can turn a rounded activation into the next number.

    One step of int8 or fp8 in one activation shows as up to 2 % in the logits of these tiny random models.
    """
    for case, ranks in found.items():
        rounds = any(name in case for name in ("w8a8", "fp8", "w4a8", "w4a4", "nvfp4", "mxfp4"))
        for rank in ranks:
            assert rank["error"] < (0.02 if rounds else 1e-5), (case, ranks)
            assert rank.get("tokens", True) or rank["error"] > 1e-5, (case, ranks)


GOLDENS = (
    "awq-gemm-w4-g32-asym-moe", "awq-gemv-w4-g64-asym", "ct-fp8-static", "ct-mixed-w4-attn-w8-mlp", "ct-mxfp4",
    "ct-nvfp4", "ct-w4a16-asym-g128-awq", "ct-w4a16-sym-g128-gptq-actorder-group", "ct-w4a8-int-g128",
    "ct-w8a8-int8-dynamic-smoothquant-gptq-moe", "ct-w8a8-int8-static", "gptq-v1-w3-g128-sym",
    "gptq-v1-w4-g32-sym-descact", "gptq-v2-w4-g128-asym", "msm-w4a4-dynamic-channel", "msm-w4a8-dynamic",
    "msm-w8a8-dynamic-moe", "msm-w8a8-static", "msmv0-w8a8-dynamic",
)  # fmt: skip
OF_FOUR = ("awq-gemm-w4-g32-asym-moe", "ct-mxfp4", "gptq-v1-w4-g32-sym-descact", "msm-w8a8-static")
MOE = ("awq-gemm-w4-g32-asym-moe", "ct-w8a8-int8-dynamic-smoothquant-gptq-moe", "msm-w8a8-dynamic-moe")
WHOLE_READS = ("awq-gemv", "ct-w4a16-sym-g128-gptq-actorder", "gptq-v1-w4-g32-sym-descact", "msm-w8a8-static")


def path_of(name: str) -> str:
    return str(golden(name))


@pytest.mark.slow
class TestCheckpoints:
    """Every format and scheme, read in parts."""

    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, tmp_path_factory):
        cases = [f"checkpoint|{path_of(name)}" for name in GOLDENS]
        cases += [f"checkpoint|{path_of(name)}|1" for name in MOE]
        return run(tmp_path_factory.mktemp("two"), 2, *cases)

    def test_logits_and_tokens_are_those_of_one_rank(self, found):
        check(found)

    def test_everything_is_read_once(self, found):
        """But for norms, for weights that must stay whole, and for those that can only be read whole."""
        for case, ranks in found.items():
            if not any(name in case for name in WHOLE_READS):
                whole = any("gathers" in reason for reason in ranks[0]["reasons"])
                assert sum(rank["read"] for rank in ranks) < (1.3 if whole else 1.07) * ranks[0]["size"], case

    def test_a_rank_holds_its_share(self, found):
        for case, ranks in found.items():
            for rank in ranks:
                whole = any("gathers" in reason for reason in rank["reasons"])
                assert rank["held"] < (0.75 if whole else 0.6) * rank["held_whole"], case

    def test_something_is_divided_in_every_way(self, found):
        said = " ".join(reason for ranks in found.values() for reason in ranks[0]["reasons"])
        for kind in (
            "column parallel",
            "row parallel",
            "vocabulary parallel",
            "experts by 2",
            "experts by 1, channels",
        ):
            assert kind in said


@pytest.mark.slow
def test_four_ranks(tmp_path):
    """Two key/value heads, each of which two ranks hold; experts dealt to all, and to two pairs."""
    cases = [f"checkpoint|{path_of(name)}" for name in OF_FOUR] + [f"checkpoint|{path_of(MOE[0])}|2"]
    check(run(tmp_path, 4, *cases))


FAMILIES = (
    "qwen3|float", "qwen3|w8a8_asym", "qwen3|wfp8afp8", "qwen2|w8a8", "phi3|w4a16_g32", "glm4|w8a8",
    "gemma3_text|w4a16_g32", "qwen3_moe|float", "qwen3_moe|w8a8_static|1", "qwen3_moe|w4a8_clip|1", "gpt_oss|w4a16_g32",
    "gpt_oss|w8a8|1", "deepseek_v3|w8a8", "llama4_text|w4a16_g32", "mixtral|w8a8|1",
)  # fmt: skip


@pytest.mark.slow
def test_families(tmp_path):
    """Fused projections, latent attention, sinks, biases, interleaved and transposed experts."""
    found = run(tmp_path, 2, *(f"family|{family}" for family in FAMILIES))
    check(found)
    for case, ranks in found.items():
        assert "row" in ranks[0]["kinds"], case


@pytest.mark.slow
def test_float_experts_are_read_in_parts(tmp_path):
    cases = [f"stored|{tmp_path}/{name}{ep}|{name}|{ep}" for name in ("gpt_oss", "mixtral") for ep in (1, 2)]
    found = run(tmp_path, 2, *cases)
    check(found)
    for case, ranks in found.items():
        assert sum(rank["read"] for rank in ranks) < 1.05 * ranks[0]["size"], case


@pytest.mark.slow
def test_calibration_is_divided_and_has_the_same_result(tmp_path):
    cases = (
        "calibrated|qwen3|gptq|w4a16_g32",
        "calibrated|qwen3|awq|w4a16_g32_asym",
        "calibrated|qwen3_moe|rtn|w8a8_static",
    )
    found = run(tmp_path, 2, *cases)
    check(found)
    assert all(rank["alike"] for ranks in found.values() for rank in ranks)


@pytest.mark.slow
def test_collectives_are_compiled(tmp_path):
    (ranks,) = run(tmp_path, 2, f"compiled|{path_of('msm-w8a8-static')}").values()
    for rank in ranks:
        assert rank["error"] < 1e-5
        assert rank["tokens"]
        assert rank["graphs"]


@pytest.mark.slow
def test_copies_send_tokens_to_their_experts(tmp_path):
    (ranks,) = run(tmp_path, 2, f"copies|{path_of(MOE[0])}").values()
    for rank in ranks:
        assert rank["error"] < 1e-5
        assert rank["held"] < 0.85 * rank["held_whole"]


@pytest.mark.slow
def test_ranks_that_see_different_checkpoints(tmp_path):
    for rank in range(2):
        shutil.copytree(golden("msm-w8a8-static"), tmp_path / f"of_{rank}")
    file = tmp_path / "of_1/quant_model_weights-00001-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    moe = path_of("gptq-v1-w4-g128-sym-moe")
    cases = (f"refused|{tmp_path}/of_{{rank}}", f"refused|{moe}|1", f"refused|{moe}|3")
    different, channels, uneven = run(tmp_path, 2, *cases).values()
    assert all(r["error"] == "ParallelError" and "different checkpoints: rank 1" in r["message"] for r in different)
    assert all("would cut through a group of 128; deal whole experts: ep=2" in r["message"] for r in channels)
    assert all(r["error"] == "ConfigError" and "must be a multiple of the other" in r["message"] for r in uneven)


@pytest.mark.slow
class TestCommand:
    """``torchrun ... -m qcompile generate``."""

    def generate(self, ranks: int, *more: str) -> tuple[int, str, str]:
        command = ("generate", path_of("awq-gemm-w4-g32-asym-moe"), "--prompt", "hello", "--max-new-tokens", "6", *more)
        if ranks == 1:
            process = subprocess.Popen(
                [sys.executable, "-m", "qcompile", *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        else:
            process = torchrun(ranks, "-m", "qcompile", *command)
        out, errors = process.communicate(timeout=300)
        return process.returncode, out, errors

    def test_the_same_text_once(self):
        (one, text, _), (two, parallel, errors) = self.generate(1), self.generate(2, "--tp", "2")
        assert (one, two) == (0, 0), errors
        assert parallel == text != ""

    def test_processes_that_nobody_started(self):
        code, out, errors = self.generate(1, "--tp", "2")
        assert (code, out) == (1, "")
        assert "torchrun --nproc-per-node 2 -m qcompile" in errors

    def test_interrupted(self):
        process = torchrun(2, "-m", "qcompile", "generate", path_of("msm-w8a8-static"), "--prompt", "hello",
                           "--max-new-tokens", "100000", "--tp", "2")  # fmt: skip
        assert process.stdout is not None
        process.stdout.read(1)  # it is generating
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode != 0


@pytest.mark.slow
def test_a_rank_that_dies_is_named(tmp_path):
    started = time.monotonic()
    process = torchrun(2, str(HERE / "parallel_cases.py"), f"lost|{path_of('msm-w8a8-static')}", FOUND=str(tmp_path))
    _, errors = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "exitcode: 9" in errors or "exitcode  : 9" in errors
    assert time.monotonic() - started < 190


LOSES_A_RANK = """
import os, torch, torch.distributed as dist
from qcompile.parallel.launch import launched
with launched(2, None, "cpu") as (mesh, device, is_first):
    dist.barrier()
    if not is_first:
        os._exit(9)
    dist.all_reduce(torch.ones(3))
"""


@pytest.mark.slow
def test_survivors_name_the_rank_without_a_launcher(tmp_path):
    """As on other nodes, where no agent of torchrun ends them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "QCOMPILE_TIMEOUT": "60"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOSES_A_RANK], text=True, stderr=subprocess.PIPE, cwd=tmp_path,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    _, errors = processes[0].communicate(timeout=150)
    processes[1].wait(timeout=60)
    assert "ParallelError: rank 0 of 2 cannot go on, since rank 1 is gone" in errors
