"""Bits by measured sensitivity: within the budget, better than one scheme for all, and what a budget cannot be."""

import dataclasses

import pytest
import torch
from helpers import TinyMLP, logits, tiny_model
from moe_models import tiny_moe

import qcompile
from qcompile import budget
from qcompile.budget import Budget, alternatives, bits_of, ladder, spend
from qcompile.errors import CalibrationError, ConfigError

DATA = torch.arange(3, 3 + 8 * 16).view(8, 16)


def quantize(model, amount: str, scheme: str = "w4a16_g32", **more):
    config = {"scheme": scheme, "budget": amount} | more.pop("config", {})
    return qcompile.quantize(model, config, **({"data": DATA, "sequence": 16, "progress": False} | more))


@pytest.mark.parametrize(
    ("text", "bits", "nbytes"),
    [("4.5 bits", 4.5, None), ("3bit", 3.0, None), ("1.2 GB", None, 1.2e9), ("2 MiB", None, 2**21)],
)
def test_amounts(text, bits, nbytes):
    assert Budget.parse(text) == Budget(bits, nbytes)


@pytest.mark.parametrize("text", ["", "4.5", "much", "-1 GB", "0 bits", "4 Gb"])
def test_no_amounts(text):
    with pytest.raises(ConfigError, match="a budget is bits per weight or bytes in all"):
        qcompile.QuantConfig(budget=text)


class TestModels:
    def test_bits_go_where_they_matter(self):
        model = tiny_model(dtype=torch.float32)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(40)  # its errors reach everything that follows
        quantize(model, "5.0 bits")
        report = qcompile.report(model)
        schemes = {p.site.name: p.scheme.weight.bits for p in report.plan.quantized}
        assert schemes["model.layers.0.mlp.down_proj"] >= 5
        assert all(bits < 5 for name, bits in schemes.items() if "layers.1" in name)
        assert 4.6 < bits_of(report.plan) <= 5.0
        (chosen,) = [point for point in report.frontier if point.chosen]
        assert chosen.nbytes == report.plan.bytes_after
        sizes = [point.nbytes for point in report.frontier]
        losses = [point.divergence for point in report.frontier]
        assert sizes == sorted(sizes)
        assert losses == sorted(losses, reverse=True)
        costs = {own.site: own.divergences for own in report.sensitivity}
        assert costs["model.layers.0.mlp.down_proj"][0][1] > 2 * costs["model.layers.1.mlp.down_proj"][0][1]
        assert costs.keys() == schemes.keys()
        assert report.frontier[0].divergence == pytest.approx(sum(own[0][1] for own in costs.values()))
        assert report.to_dict()["frontier"][0]["bits"] == 3.0  # 2, and a float32 scale for each 32
        assert report.coverage == 1.0

    def test_better_than_one_scheme_of_the_same_size(self):
        def model():
            torch.manual_seed(0)
            made = tiny_moe("qwen3_moe")
            with torch.no_grad():
                made.model.layers[0].self_attn.o_proj.weight.mul_(10)
            return made

        with torch.no_grad():
            expected = logits(model(), DATA).log_softmax(-1)
            uniform = qcompile.quantize(model(), "w3a16_g32", progress=False)
            size = qcompile.report(uniform).plan.bytes_after
            mixed = quantize(model(), f"{size / 1e6} MB", "w3a16_g32")
            assert qcompile.report(mixed).plan.bytes_after <= size
            kl = [(expected.exp() * (expected - logits(m, DATA).log_softmax(-1))).sum() for m in (uniform, mixed)]
        assert kl[1] < kl[0]

    def test_rules_and_other_models(self):
        torch.manual_seed(0)
        model, x = TinyMLP(), torch.randn(6, 64)
        config = {"rules": [{"match": "last", "scheme": "w8a16"}]}
        quantize(model, "9 bits", "w4a8", data=[(x,)], example_inputs=(x,), sequence=None, config=config)
        schemes = {p.site.name: str(p.scheme) for p in qcompile.report(model).plan.quantized}
        assert schemes == {"first": "w8a8", "last": "w8a16"}


class TestBadInput:
    def test_below_the_smallest_and_nothing_has_changed(self):
        model = tiny_model()
        before = logits(model)
        with pytest.raises(ConfigError, match=r"budget of 2 bits is below the smallest plan: 2\.\d+ bits per weight"):
            quantize(model, "2 bits")
        assert torch.equal(logits(model), before)

    def test_without_data(self):
        with pytest.raises(CalibrationError, match="pass data="):
            quantize(tiny_model(), "4 bits", data=None)
        with pytest.raises(ConfigError, match="call quantize with data="):
            qcompile.plan(tiny_model(), {"budget": "4 bits"})

    def test_other_numbers(self):
        with pytest.raises(ConfigError, match="a budget is spent on integers"):
            qcompile.QuantConfig(scheme="wfp8a16", budget="4 bits")


def test_what_does_not_fit_any_more_is_passed_over():
    """A large site that helps most for a byte must not keep smaller ones from the rest of the budget."""
    plans = [qcompile.plan(tiny_model(), scheme) for scheme in ladder("w4a16_g32")]
    choices = {name: [found[0], found[3]] for name, found in alternatives(plans).items()}  # 2 to 4 bits take as much
    smallest = dataclasses.replace(
        plans[0], sites=tuple(choices[p.site.name][0] if p.site.name in choices else p for p in plans[0])
    )
    names = list(choices)
    divergences = {name: [1.0, 0.5] for name in names}
    large = max(names, key=lambda name: choices[name][1].bytes_after)
    divergences[large] = [1e6, 0.0]
    small = min(names, key=lambda name: choices[name][1].bytes_after)
    room = choices[small][1].bytes_after - choices[small][0].bytes_after
    chosen, frontier = spend(smallest, choices, divergences, Budget(nbytes=smallest.bytes_after + room))
    changed = [p.site.name for p, q in zip(chosen, smallest, strict=True) if p.scheme != q.scheme]
    assert len(changed) == 1
    assert changed != [large]
    assert frontier[-1].nbytes == smallest.bytes_after + sum(
        c[1].bytes_after - c[0].bytes_after for c in choices.values()
    )
    assert budget.BITS == (2, 3, 4, 5, 6, 8)
