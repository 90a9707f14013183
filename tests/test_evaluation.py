"""Perplexity and divergence against their definitions; speed measured after a warm-up."""

import math
from contextlib import contextmanager

import pytest
import torch
from helpers import tiny_model
from torch import nn

from qcompile import evaluation
from qcompile.errors import ConfigError

VOCABULARY = 160


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_model(dtype=torch.float32)


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (100,))


class Constant(nn.Module):
    """Predicts the same logits everywhere, as a bare tensor."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*ids.shape, -1)


class TestPerplexity:
    def test_equals_the_loss_of_transformers(self, model, ids):
        windows = ids[:96].view(6, 16)
        with torch.no_grad():
            expected = math.exp(model(input_ids=windows, labels=windows).loss.item())
        assert evaluation.perplexity(model, ids, sequence=16) == pytest.approx(expected, rel=1e-5)

    def test_uniform_predictions_and_any_shape_of_ids(self, ids):
        uniform = Constant(torch.zeros(VOCABULARY))
        assert evaluation.perplexity(uniform, ids.view(1, -1), sequence=32) == pytest.approx(VOCABULARY, rel=1e-5)

    def test_partial_window_is_dropped(self, model, ids):
        whole = evaluation.perplexity(model, ids[:96], sequence=32)
        assert evaluation.perplexity(model, ids, sequence=32) == whole

    def test_batches_do_not_matter(self, model, ids, monkeypatch):
        one = evaluation.perplexity(model, ids, sequence=8)
        monkeypatch.setattr(evaluation, "_LOGITS_AT_ONCE", 1)
        assert evaluation.perplexity(model, ids, sequence=8) == pytest.approx(one, rel=1e-5)

    def test_bfloat16_models_are_measured_in_float32(self, ids):
        skewed = torch.zeros(VOCABULARY, dtype=torch.bfloat16)
        assert evaluation.perplexity(Constant(skewed), ids, 50) == pytest.approx(VOCABULARY, rel=1e-5)

    def test_short_text_and_bad_sequence(self, model, ids):
        with pytest.raises(ConfigError, match="100 tokens are less than one window of 256"):
            evaluation.perplexity(model, ids)
        with pytest.raises(ConfigError, match="at least 2"):
            evaluation.perplexity(model, ids, sequence=1)


class TestDivergence:
    def test_zero_for_itself(self, model, ids):
        assert evaluation.divergence(model, model, ids, sequence=32) == pytest.approx(0.0, abs=1e-6)

    def test_equals_its_definition(self, ids):
        p, q = torch.randn(VOCABULARY), torch.randn(VOCABULARY)
        expected = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum().item()
        assert evaluation.divergence(Constant(q), Constant(p), ids, sequence=16) == pytest.approx(expected, rel=1e-4)

    def test_other_vocabulary(self, model, ids):
        with pytest.raises(ConfigError, match="one vocabulary"):
            evaluation.divergence(model, Constant(torch.zeros(170)), ids, sequence=32)


class TestSpeed:
    def test_is_positive_and_warms_up(self, model, ids, monkeypatch):
        calls = []
        generate = model.generate
        monkeypatch.setattr(model, "generate", lambda *a, **k: calls.append(k["streamer"]) or generate(*a, **k))
        assert evaluation.tokens_per_second(model, ids[:5], 4) > 0
        assert calls[0] is not calls[1]  # the first is the warm-up
        assert len(calls) == 2

    def test_needs_two_tokens(self, model, ids):
        with pytest.raises(ConfigError, match="at least 2"):
            evaluation.tokens_per_second(model, ids[:5], 1)


def test_deviation_is_zero_for_the_same_model_and_sees_a_wrong_decode_step():
    model = tiny_model(dtype=torch.float32)
    prompt = torch.arange(3, 9)
    assert evaluation.deviation(model, model, prompt, 5) == 0.0

    class WrongAtOneRow:
        def generate(self, prompt, **options):
            def spoil(module, inputs, output):
                if output.shape[1] == 1 and inputs[0].shape[1] == 1:
                    return output + 1.0
                return output

            handle = model.model.norm.register_forward_hook(spoil)
            try:
                return model.generate(prompt, **options)
            finally:
                handle.remove()

    assert evaluation.deviation(model, WrongAtOneRow(), prompt, 5) > 0.01


def test_bars_end_when_the_work_does(model, ids, monkeypatch):
    bars = []

    @contextmanager
    def bar(title, total, show):
        done = []
        yield lambda name, count=None: done.append(count or len(done) + 1)
        bars.append((title, total, done[-1]))

    monkeypatch.setattr(evaluation, "progress_bar", bar)
    evaluation.perplexity(model, ids, sequence=16)
    evaluation.divergence(model, model, ids, sequence=32)
    evaluation.tokens_per_second(model, ids[:5], 3)
    assert bars == [
        ("measuring perplexity", 6, 6), ("comparing with the reference", 3, 3), ("generating", 8, 8)
    ]  # fmt: skip
