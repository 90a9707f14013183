"""What every test gets: one thread per worker, the same seed, and hypothesis without a clock."""

import os
import random
import shutil
from pathlib import Path

import hypothesis
import pytest
import torch

if os.environ.get("QCOMPILE_NPU"):  # set by ``python tests/npu``
    import torch_npu  # noqa: F401

    collect_ignore = []
else:
    collect_ignore = ["npu"]  # it needs torch_npu, which changes torch, and a process and an environment of its own

hypothesis.settings.register_profile(
    "qcompile",
    deadline=None,
    max_examples=50,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("qcompile")

if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, alone or in any order."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo():
    """For tests that compile: no graph, guard or recompile count of another test is seen."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A tokenizer of 259 tokens: padding, start, end, and one per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small quantized Qwen3 in bfloat16, and its folder."""
    from helpers import quantize_linears, tiny_model

    import qcompile

    torch.manual_seed(0)
    model = quantize_linears(tiny_model(), "w4a16_g32")
    folder = tmp_path_factory.mktemp("checkpoint") / "w4"
    qcompile.save(model, folder)
    return model, folder


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(checkpoint[1], tmp_path / "copied"))
