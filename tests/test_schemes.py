"""Every kind of number, from ``quantize`` to compiled code, against products in float64 of what codes stand for."""

import dataclasses

import pytest
import torch
from helpers import logits, relative_error, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

import qcompile
from qcompile import numerics
from qcompile.errors import CalibrationError, UnsupportedError
from qcompile.modules import QuantExperts, QuantWeight, quantized_modules
from qcompile.types import PackedWeight, Scheme

LINEAR = (
    "w8a8", "w8a8_dynamic_asym", "w8a8_static", "w8a8_static_sym", "w8a8_asym_static", "w4a8", "w4a8_asym", "w4a8_g32",
    "w4a8_g32_asym", "w4a8_g32_static", "w4a8_clip", "w4a4", "w4a4_g32_asym", "w4a4_clip", "w3a8", "w4a16_g32",
    "wfp8a16", "wfp8a16_tensor", "wfp8afp8", "wfp8afp8_tensor", "wfp8afp8_tensor_static", "wfp8afp8_static",
    "wfp8afp8_b32x48", "wfp8afp8_b32x48_static", "wnvfp4a16", "wnvfp4anvfp4", "wmxfp4a16", "wmxfp4amxfp4",
    "wmxfp8a16", "wmxfp8amxfp8",
)  # fmt: skip
CALIBRATED = tuple(name for name in LINEAR if (kind := Scheme.parse(name).activation) and kind.params)


class Ladder(nn.Module):
    """One Linear per scheme, all of which read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(80, 40) for name in LINEAR})

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers.values()])


def exact_product(x: Tensor, packed: PackedWeight) -> Tensor:
    """x @ W.T in float64, for x [rows, in] and the weight of one Linear, by definition of its codes."""
    activation, inputs = packed.scheme.activation, x.double()
    if activation is not None:
        params = list(packed.activation_tensors().values())
        parts = numerics.quantize_activation(x, activation, params)
        inputs = numerics.dequantize_activation(parts if activation.dynamic else [*parts, *params], activation)
    return inputs @ numerics.dequantize_packed(packed).double().t()


@pytest.fixture(scope="module")
def ladder() -> tuple[nn.Module, nn.Module]:
    """(float, quantized): every Linear by the rule that names it."""
    torch.manual_seed(0)
    model = Ladder().eval()
    quantized = Ladder().eval()
    quantized.load_state_dict(model.state_dict())
    rules = [{"match": f"layers.{name}", "scheme": name} for name in LINEAR]
    data = [(torch.randn(16, 80),) for _ in range(4)]
    qcompile.quantize(quantized, {"rules": rules}, example_inputs=data[0], data=data, progress=False)
    return model, quantized


def test_each_linear_computes_what_its_codes_stand_for(ladder):
    _, quantized = ladder
    modules = quantized_modules(quantized)
    x = torch.randn(2, 5, 80)
    results = quantized(x)
    for name, result in zip(LINEAR, results, strict=True):
        module = modules[f"layers.{name}"]
        assert str(module.scheme) == name
        expected = exact_product(x.view(10, 80), module.packed()).view(2, 5, 40) + module.bias
        assert relative_error(result, expected) < 2e-6, name


def test_each_linear_stays_close_to_the_float_one(ladder):
    """Round-to-nearest errors of Gaussian weights and inputs: per format, a range that is known."""
    model, quantized = ladder
    x = torch.randn(64, 80)
    for name, exact, result in zip(LINEAR, model(x), quantized(x), strict=True):
        scheme = Scheme.parse(name)
        weight = {8: 0.04, 4: 0.16, 3: 0.3}[scheme.weight.bits]
        inputs = 0 if scheme.activation is None else {8: 0.04, 4: 0.2}[scheme.activation.bits]
        assert relative_error(result, exact) < weight + inputs, name


def test_compiled_code_computes_the_same(ladder, fresh_dynamo):
    _, quantized = ladder
    compiled = torch.compile(quantized, backend="qcompile")
    x = torch.randn(7, 80)
    with torch.no_grad():
        for name, result, expected in zip(LINEAR, compiled(x), quantized(x), strict=True):
            assert relative_error(result, expected) < 1e-6, name


def test_plan_and_report_show_every_scheme(ladder):
    _, quantized = ladder
    report = qcompile.report(quantized)
    assert report.coverage == 1.0
    text = str(report)
    for name in LINEAR:
        assert f" {name} " in text
    planned = {planned.site.name: planned.bytes_after for planned in report.plan}
    held = {name: sum(t.nbytes for t in module.buffers()) for name, module in quantized_modules(quantized).items()}
    assert planned == held


# -------------------------------------------------------------------------------------------------------- bad input


def test_calibrated_schemes_without_data_are_refused_by_name():
    for name in CALIBRATED:
        model = Ladder()
        with pytest.raises(CalibrationError, match=rf"layers\.w8a8 and 29 more cannot be quantized.* {name} .*data="):
            qcompile.quantize(model, name, example_inputs=(torch.randn(2, 80),))
        assert not quantized_modules(model)
    assert len(CALIBRATED) == 10


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("w4a4_asym", {"codes": "narrow"}, "codes='narrow' leaves out the lowest code of symmetric integers"),
        ("wfp8afp8", {"codes": "narrow"}, "codes='narrow' leaves out"),
        ("wfp8afp8_tensor", {"observer": "mse"}, "observer='mse' searches the scales of groups"),
    ],
)
def test_options_that_would_do_nothing_are_refused(scheme, options, message):
    with pytest.raises(UnsupportedError, match=rf"layers\.w8a8 cannot be {scheme} by method 'rtn': {message}"):
        qcompile.plan(Ladder(), {"scheme": scheme, "options": options}, example_inputs=(torch.randn(2, 80),))


# ------------------------------------------------------------------------------------------------------------ mixed


def test_mixed_precision_by_rule(fresh_dynamo):
    """4-bit activations where a rule says so, 8-bit ones elsewhere; weights of the 4-bit ones in -7 .. 7."""
    model = tiny_model(dtype=torch.float32, num_hidden_layers=1)
    exact = logits(model)
    rules = [{"match": "*.mlp.*", "scheme": "w4a4", "options": {"codes": "narrow"}}]
    qcompile.quantize(model, {"scheme": "w8a8", "rules": rules}, progress=False)
    modules = quantized_modules(model)
    assert {str(module.scheme) for name, module in modules.items() if ".mlp." in name} == {"w4a4"}
    assert {str(module.scheme) for name, module in modules.items() if ".self_attn." in name} == {"w8a8"}
    for name, module in modules.items():
        packed = module.packed()
        codes = numerics.unpack_codes(packed.codes, packed.scheme.weight.bits, packed.shape[1])
        assert codes.min() == (1 if ".mlp." in name else 0)
    result = logits(model)
    assert 0.01 < relative_error(result, exact) < 0.4
    compiled = torch.compile(model, backend="qcompile")
    assert relative_error(logits(compiled), result) < 1e-5
    text = str(qcompile.report(model))
    assert "w4a4" in text
    assert "codes=narrow" in text


# ---------------------------------------------------------------------------------------------------------- experts

EXPERTS = (
    "w8a8", "w8a8_dynamic_asym", "w8a8_static", "w8a8_static_sym", "w4a8", "w4a8_g32_asym", "w4a8_clip", "w4a4",
    "w4a4_clip", "w4a16_g32", "wfp8a16", "wfp8afp8", "wfp8afp8_tensor_static", "wfp8afp8_b32x48", "wnvfp4a16",
    "wnvfp4anvfp4", "wmxfp4a16", "wmxfp4amxfp4", "wmxfp8amxfp8",
)  # fmt: skip
COUNT, HIDDEN, INTERMEDIATE = 4, 48, 64


def expert_params(scheme: Scheme) -> dict[str, Tensor]:
    """Stored parameters that differ from expert to expert."""
    spread = torch.linspace(0.5, 1.0, COUNT)
    stored = {
        "input_scale": spread * (600.0 if scheme.weight.number == "nvfp4" else 0.03),
        "input_zero": torch.arange(COUNT, dtype=torch.int32) * 9 - 20,
        "alpha": spread,
    }
    return {name: stored[name] for name in (scheme.activation.params if scheme.activation else ())}


def projection(name: str, out: int, inn: int, kernel: str) -> QuantWeight:
    scheme = Scheme.parse(name)
    plain = numerics.quantize_weight(torch.randn(COUNT, out, inn) * inn**-0.5, Scheme(scheme.weight))
    packed = dataclasses.replace(plain, scheme=scheme, **expert_params(scheme))
    return QuantWeight(packed, torch.randn(COUNT, out) * 0.1, kernel, torch.float32)


def experts_of(name: str, kernel: str = "cpu.reference") -> QuantExperts:
    return QuantExperts(
        ("gate_up_proj", projection(name, 2 * INTERMEDIATE, HIDDEN, kernel)),
        ("down_proj", projection(name, HIDDEN, INTERMEDIATE, kernel)),
        "silu",
    )


def routed(tokens: int, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, chosen experts (never the last one) and their weights."""
    ids = torch.stack([torch.randperm(COUNT - 1)[:k] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN), ids, torch.rand(tokens, k)


def token_by_token(module: QuantExperts, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    """Each token through each of its experts as through two Linears, in float64 between quantizations."""
    up, down = module.up.packed(), module.down.packed()
    result = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for expert, share in zip(ids[token].tolist(), routing[token].double(), strict=True):
            hidden = exact_product(x[token : token + 1], up.expert(expert)) + module.up.bias[expert]
            gate, rest = hidden.float().chunk(2, -1)
            product = exact_product(F.silu(gate) * rest, down.expert(expert)) + module.down.bias[expert]
            result[token] += share * product[0]
    return result


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_so_many_linears(name):
    module = experts_of(name)
    x, ids, routing = routed(12)
    assert relative_error(module(x, ids, routing), token_by_token(module, x, ids, routing)) < 1e-5


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_without_tokens_and_tokens_without_company(name):
    module = experts_of(name)
    x, ids, routing = routed(1, k=1)
    assert relative_error(module(x, ids, routing), token_by_token(module, x, ids, routing)) < 1e-5
    assert module(x[:0], ids[:0], routing[:0]).shape == (0, HIDDEN)


COMPILED = ("w8a8_static", "w4a8_clip", "w4a8_g32_asym", "wfp8afp8_b32x48", "wnvfp4anvfp4", "wmxfp8amxfp8")


class SomeKinds(nn.Module):
    """Experts of several schemes on the same tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.ModuleList(experts_of(name) for name in COMPILED)

    def forward(self, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        return torch.stack([experts(x, ids, routing) for experts in self.kinds])


def test_compiled_experts_compute_the_same(fresh_dynamo):
    model = SomeKinds().eval()
    compiled = torch.compile(model, backend="qcompile")
    given = routed(9)
    with torch.no_grad():
        for name, result, expected in zip(COMPILED, compiled(*given), model(*given), strict=True):
            assert relative_error(result, expected) < 1e-5, name


def test_a_clip_is_that_of_the_rows_own_expert():
    """With one expert's clip changed, only tokens of that expert change."""
    module = experts_of("w4a8_clip")
    x, ids, routing = routed(16)
    before = module(x, ids, routing)
    module.down.alpha[1] = 0.25
    changed = (module(x, ids, routing) != before).any(1)
    assert torch.equal(changed, (ids == 1).any(1))
