"""GPTQ: its codes equal those of the formula written column by column, and its error is less than rounding's."""

import math

import pytest
import torch
from helpers import tiny_model
from hypothesis import given
from hypothesis import strategies as st

import qcompile
from qcompile.errors import CalibrationError, ConfigError, UnsupportedError
from qcompile.methods._ranges import search_ranges
from qcompile.methods.gptq import COLUMNS, METHOD
from qcompile.methods.rtn import METHOD as RTN
from qcompile.numerics import dequantize_activation, dequantize_packed, quantize_activation, unpack_codes
from qcompile.observers import Needs, Statistics, shared_rounding
from qcompile.types import Scheme

ORDERS = ("static", "group_aware", "group", "none")


def statistics(x: torch.Tensor) -> Statistics:
    found = Statistics(Needs(hessian=True), x.shape[1])
    found.update(x)
    return found


def inputs(tokens: int, features: int) -> torch.Tensor:
    """Inputs whose channels are of very different sizes and depend on each other."""
    mixed = torch.randn(tokens, features) @ torch.randn(features, features)
    return mixed * torch.logspace(-1, 1, features)[torch.randperm(features)]


def loss(x: torch.Tensor, weight: torch.Tensor, packed) -> float:
    return (x @ (weight.float() - dequantize_packed(packed, torch.float32)).T).square().sum().item()


def by_the_formula(x: torch.Tensor, weight: torch.Tensor, scheme: Scheme, actorder: str, damping: float = 0.01):
    """Codes [out, in] as stored, column by column in float64, every later column updated at once."""
    hessian, (out, inn) = x.double().T @ x.double(), weight.shape
    size = min(scheme.weight.group_size or inn, inn)
    diagonal = hessian.diagonal()
    order = torch.arange(inn)
    if actorder in ("static", "group"):
        order = diagonal.argsort(descending=True)
    elif actorder == "group_aware":
        groups = sorted(order.split(size), key=lambda group: -diagonal[group].max().item())
        order = torch.cat([group[diagonal[group].argsort(descending=True)] for group in groups])
    hessian = hessian[order][:, order]
    hessian += torch.eye(inn) * damping * hessian.diagonal().mean()
    factor = torch.linalg.cholesky(hessian.inverse(), upper=True)
    work, codes = weight.double()[:, order], torch.empty(out, inn, dtype=torch.uint8)
    place = torch.arange(inn) if actorder == "group" else order
    plain = Scheme.parse(f"w{scheme.weight.bits}a16{'' if scheme.weight.symmetric else '_asym'}")
    scales, zeros = {}, {}
    for i in range(inn):
        group = place[i].item() // size
        if group not in scales:
            columns = work[:, [j for j in range(inn) if place[j].item() // size == group]]
            if actorder == "static":
                columns = weight[:, group * size : (group + 1) * size]
            own = [j for j in range(inn) if place[j].item() // size == group]
            importance = factor.diagonal()[own][place[own].argsort() if actorder == "static" else slice(None)] ** -2
            found = search_ranges(columns.float(), plain.weight, weight.dtype, importance.float())
            scales[group], zeros[group] = found[0][:, 0].double(), found[1][:, 0].double()
        scale, zero = scales[group], zeros[group]
        codes[:, i] = (torch.round(work[:, i] / scale) + zero).clamp(0, 2**scheme.weight.bits - 1)
        error = (work[:, i] - (codes[:, i].double() - zero) * scale) / factor[i, i]
        work[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    return torch.empty_like(codes).index_copy_(1, place, codes), order


class TestFormula:
    @pytest.mark.parametrize("actorder", ORDERS)
    @pytest.mark.parametrize("name", ["w4a16_g16", "w3a16_g24_asym", "w2a16", "w8a16_g100", "w4a16_g160_asym"])
    def test_codes_are_those_of_the_formula(self, name, actorder):
        scheme, x, weight = Scheme.parse(name), inputs(600, 300), torch.randn(24, 300)
        assert weight.shape[1] > 2 * COLUMNS
        packed = METHOD.quantize(weight, scheme, {"actorder": actorder}, statistics(x))
        expected, order = by_the_formula(x, weight, scheme, actorder)
        codes = unpack_codes(packed.codes, scheme.weight.bits, 300)
        assert (codes != expected).float().mean().item() < 0.01  # float32 decides a few ties otherwise
        assert (packed.permutation is not None) == (actorder == "group")
        if packed.permutation is not None:
            assert torch.equal(packed.permutation.long(), order)

    @pytest.mark.parametrize("name", ["w4a16_g32", "w3a16_g32_asym", "w2a16_g32", "w4a16", "w8a16"])
    @pytest.mark.parametrize("actorder", ORDERS)
    def test_less_is_lost_than_by_rounding(self, name, actorder):
        scheme, x, weight = Scheme.parse(name), inputs(300, 96), torch.randn(40, 96).bfloat16()
        packed = METHOD.quantize(weight, scheme, {"actorder": actorder}, statistics(x))
        rounded = RTN.quantize(weight, scheme, {"observer": "mse"})
        assert loss(x, weight, packed) < (0.95 if scheme.weight.bits == 2 else 0.7) * loss(x, weight, rounded)
        assert packed.scales.dtype == torch.bfloat16

    @given(st.integers(1, 40), st.integers(1, 12), st.sampled_from(["w4a16_g8", "w4a16", "w3a16_g7_asym"]),
           st.sampled_from(ORDERS))  # fmt: skip
    def test_any_size(self, features, tokens, name, actorder):
        generator = torch.Generator().manual_seed(features * 100 + tokens)
        x = torch.randn(tokens, features, generator=generator)
        weight = torch.randn(3, features, generator=generator)
        packed = METHOD.quantize(weight, Scheme.parse(name), {"actorder": actorder}, statistics(x))
        assert torch.isfinite(dequantize_packed(packed)).all()

    def test_inputs_that_never_occur_are_rounded_to_nearest(self):
        x, weight, scheme = inputs(200, 32), torch.randn(8, 32), Scheme.parse("w4a16_g16")
        x[:, [3, 17, 18]] = 0
        packed = METHOD.quantize(weight, scheme, {"observer": "minmax"}, statistics(x))
        rounded = RTN.quantize(weight, scheme, {})
        for column in (3, 17, 18):
            assert torch.equal(dequantize_packed(packed)[:, column], dequantize_packed(rounded)[:, column])
        nothing = METHOD.quantize(weight, scheme, {"observer": "minmax"}, statistics(torch.zeros(4, 32)))
        assert torch.equal(nothing.codes, rounded.codes)

    def test_one_token_is_enough_to_run(self):
        packed = METHOD.quantize(torch.randn(8, 64), Scheme.parse("w4a16"), {"damping": 0}, statistics(inputs(1, 64)))
        assert torch.isfinite(dequantize_packed(packed)).all()

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_hessian_without_an_inverse(self, value):
        found = statistics(inputs(100, 16))
        found.hessian[3, 3] = value
        found.hessian[5] = value
        with pytest.raises(CalibrationError, match="cannot be inverted"):
            METHOD.quantize(torch.randn(8, 16), Scheme.parse("w4a16"), {}, found)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"act_order": True}, r"no option 'act_order'. Known: damping, actorder, observer, target"),
            ({"actorder": "desc"}, "must be one of .*not 'desc'"),
            ({"observer": "best"}, "must be one of .*not 'best'"),
            ({"damping": -0.1}, "from 0 to 1, not -0.1"),
            ({"damping": "much"}, "not 'much'"),
            ({"damping": True}, "not True"),
        ],
    )
    def test_wrong_ones(self, options, message):
        with pytest.raises(ConfigError, match=message):
            qcompile.QuantConfig(method="gptq", options=options)

    def test_right_ones(self):
        qcompile.QuantConfig(method="gptq", options={"actorder": "group", "damping": 1, "observer": "minmax"})
        assert qcompile.config.as_config("gptq").method == "gptq"

    def test_other_numbers_are_refused_by_the_plan(self):
        with pytest.raises(UnsupportedError, match=r"q_proj cannot be wfp8afp8 .*'gptq': it rounds to integers"):
            qcompile.plan(tiny_model(), {"scheme": "wfp8afp8", "method": "gptq"})


def test_a_model_is_nearer_to_its_float_self():
    data = torch.randint(3, 150, (16, 32))
    results = {}
    for method in ("rtn", "gptq"):
        torch.manual_seed(0)
        model = tiny_model("llama", torch.float32)
        with torch.no_grad():
            expected = model(data, use_cache=False).logits
            qcompile.quantize(model, {"scheme": "w3a8", "method": method}, data=data, sequence=32, progress=False)
            results[method] = (model(data, use_cache=False).logits - expected).square().mean().item()
    assert results["gptq"] < 0.6 * results["rtn"]


class TestRoundedInputs:
    """A weight whose inputs are rounded when the model runs is fitted to what they are then."""

    def test_the_product_of_rounded_inputs_is_nearer_to_that_of_floats(self):
        scheme, x, weight = Scheme.parse("w4a4"), inputs(512, 64), torch.randn(48, 64)
        needs = Needs(hessian=True, drift=True)
        errors = []
        for activation in (None, scheme.activation):
            found = Statistics(needs, 64, activation=activation)
            found.update(x, x)
            assert torch.equal(found.low, x.amin(0))
            packed = METHOD.quantize(weight, Scheme(scheme.weight), {}, found)
            read = dequantize_activation(quantize_activation(x, scheme.activation), scheme.activation)
            made = read.float() @ dequantize_packed(packed, torch.float32).T
            errors.append((made - x @ weight.T).square().sum().item())
        assert errors[1] < 0.9 * errors[0]

    def test_sites_share_a_rounding_if_all_have_it(self):
        w4a8, w8a8, w4a4, static = map(Scheme.parse, ("w4a8", "w8a8", "w4a4", "w8a8_static"))
        assert shared_rounding([w4a8, w8a8]) == w4a8.activation
        assert shared_rounding([w4a8, w4a4]) is None
        assert shared_rounding([w4a8, None]) is None
        assert shared_rounding([static]) is None
