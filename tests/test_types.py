"""The nouns: scheme names, shapes of packed weights, plans as containers."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile import numerics
from qcompile.errors import ConfigError, FormatError, QcompileError
from qcompile.types import ActivationType, PackedWeight, Plan, PlannedSite, Report, Scheme, Site, SiteResult, WeightType

weight_types = st.builds(
    WeightType, st.integers(2, 8), symmetric=st.booleans(), group_size=st.none() | st.integers(1, 4096)
)


integer_activations = st.builds(ActivationType, st.sampled_from([4, 8]), clip=st.booleans()) | st.builds(
    ActivationType, st.just(8), dynamic=st.booleans(), symmetric=st.booleans()
)
NAMES = [
    "w4a4", "w8a8_static", "w8a8_static_sym", "w8a8_dynamic_asym", "w4a8_g128_asym_static", "w4a8_clip", "wfp8a16",
    "wfp8afp8", "wfp8afp8_tensor", "wfp8afp8_tensor_static", "wfp8afp8_b128x128", "wfp8a16_b128x64", "wnvfp4a16",
    "wnvfp4anvfp4", "wmxfp4amxfp4", "wmxfp8amxfp8",
]  # fmt: skip


@given(weight_types, st.none() | integer_activations)
def test_a_scheme_parses_as_it_prints(weight, activation):
    scheme = Scheme(weight, activation)
    assert Scheme.parse(str(scheme)) == scheme
    if activation is not None:
        assert ActivationType.parse(str(activation)) == activation


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_number_has_a_name(name):
    scheme = Scheme.parse(name)
    assert str(scheme) == name
    if scheme.activation is not None:
        assert ActivationType.parse(str(scheme.activation)) == scheme.activation


@pytest.mark.parametrize(
    ("name", "bits", "group", "symmetric", "activation"),
    [
        ("w4a16", 4, None, True, None),
        ("w4a16_g128", 4, 128, True, None),
        ("w3a16_g32_asym", 3, 32, False, None),
        ("w8a16_asym", 8, None, False, None),
        ("w8a8", 8, None, True, ActivationType(8)),
    ],
)
def test_names_mean_what_they_say(name, bits, group, symmetric, activation):
    scheme = Scheme.parse(name)
    assert scheme == Scheme(WeightType(bits, symmetric, group), activation)
    assert str(scheme) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "schemes are written w<number>a<number>"),
        ("int4", "'int4' is not a scheme name"),
        ("W4A16", "for example w4a16_g128"),
        ("w4a16_g", "is not a scheme name"),
        ("w4a16_asym_g128", "is not a scheme name"),
        ("w4a16 ", "is not a scheme name"),
        ("w1a16", "weight bits must be 2 to 8, not 1"),
        ("w9a16", "weight bits must be 2 to 8, not 9"),
        ("w16a16", "weight bits must be 2 to 8, not 16"),
        ("w4a16_g0", "group size must be positive, not 0"),
        ("w4a16_g-1", "leave it out for one group per output channel"),
        ("w8a3", "activation bits must be 4 or 8 .*not 3"),
        ("w8a32", "activation bits must be 4 or 8 .*not 32"),
        ("w4a16_static", "'_static' is about quantized activations, and a16 leaves them float"),
        ("w4a16_clip", "'_clip' is about quantized activations"),
        ("w4a4_static", "4-bit activations are dynamic"),
        ("w8a8_static_clip", "'_clip' goes with dynamic symmetric"),
        ("w4afp8", "fp8 activations go with fp8 weights, not with int ones"),
        ("wfp8a8", "int activations go with int weights, not with fp8 ones"),
        ("wfp8afp8_asym", "fp8 weights have no zero points"),
        ("wfp8afp8_static_asym", "fp8 activations have no zero points"),
        ("wfp8a16_b0x128", "block sizes must be positive"),
        ("w4a16_b128x128", "scales per block or per tensor go with fp8 weights"),
        ("w4a16_tensor", "scales per block or per tensor go with fp8 weights"),
        ("wnvfp4a16_g32", "nvfp4 has groups of 16"),
        ("wmxfp4amxfp4_static", "the format mxfp4 itself says how"),
    ],
)
def test_a_wrong_scheme_is_explained(name, message):
    with pytest.raises(ConfigError, match=message):
        Scheme.parse(name)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            WeightType,
            {"bits": 8, "number": "fp6"},
            "weights are integers or one of fp8, nvfp4, mxfp4, mxfp8, not 'fp6'",
        ),
        (WeightType, {"bits": 4, "number": "fp8"}, "fp8 has 8 bits, not 4"),
        (WeightType, {"bits": 8, "number": "fp8", "block": (8, 8), "group_size": 8}, "one of the three"),
        (WeightType, {"bits": 8, "number": "fp8", "per_tensor": True, "group_size": 8}, "one of the three"),
        (ActivationType, {"bits": 8, "number": "fp6"}, "activations are integers or one of"),
        (ActivationType, {"bits": 8, "group_size": 128}, "integer activations have no groups of columns"),
        (
            ActivationType,
            {"bits": 8, "number": "fp8", "dynamic": False, "group_size": 128},
            "static activations have no",
        ),
        (ActivationType, {"bits": 4, "number": "nvfp4"}, "nvfp4 activations have dynamic scales of 16 columns"),
    ],
)
def test_numbers_that_do_not_exist_cannot_be_made(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind(**settings)


def test_every_error_is_of_one_tree():
    with pytest.raises(QcompileError):
        Scheme.parse("nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        Scheme.parse("nonsense")


@pytest.mark.parametrize(("group", "groups"), [(None, 1), (32, 4), (100, 1), (99, 2), (1, 100)])
def test_groups_count_a_short_last_one(group, groups):
    assert WeightType(4, group_size=group).groups(100) == groups


# --------------------------------------------------------------------------------------------------- packed weights


def packed(name: str = "w4a16_g32_asym", out: int = 3, inn: int = 70) -> PackedWeight:
    return numerics.quantize_weight(torch.randn(out, inn), Scheme.parse(name))


def rebuilt(**changes: object) -> PackedWeight:
    original = packed()
    return PackedWeight(original.scheme, original.shape, **{**original.tensors(), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"codes": torch.zeros(3, 34, dtype=torch.uint8)},
            r"codes .*must be uint8 \[3, 35\], not torch.uint8 \[3, 34\]",
        ),
        ({"codes": torch.zeros(3, 35, dtype=torch.int8)}, "codes .*must be uint8 .*not torch.int8"),
        ({"scales": torch.zeros(3, 2)}, r"scales .*must be float \[3, 3\]"),
        ({"scales": torch.zeros(3, 3, dtype=torch.int32)}, "scales .*must be float"),
        ({"zeros": torch.zeros(3, dtype=torch.uint8)}, r"zeros .*must be uint8 \[3, 3\]"),
        ({"zeros": torch.zeros(3, 3)}, "zeros .*must be uint8"),
        ({"zeros": None}, "a w4a16_g32_asym weight needs zeros"),
        ({"permutation": torch.arange(70)}, r"permutation .*must be int32 \[70\], not torch.int64"),
        ({"permutation": torch.arange(3, dtype=torch.int32)}, r"must be int32 \[70\]"),
    ],
)
def test_a_packed_weight_refuses_tensors_that_do_not_fit(changes, message):
    with pytest.raises(FormatError, match=message):
        rebuilt(**changes)


def test_a_symmetric_weight_has_no_zero_points():
    symmetric = packed("w4a16_g32")
    with pytest.raises(FormatError, match="a w4a16_g32 weight has no zeros"):
        PackedWeight(symmetric.scheme, symmetric.shape, symmetric.codes, symmetric.scales, packed().zeros)


def for_activations(name: str, experts: int = 0, **params: object) -> PackedWeight:
    """A weight with stored parameters of activations: numbers, or lists of one per expert."""
    scheme = Scheme.parse(name)
    lead = (experts,) if experts else ()
    plain = numerics.quantize_weight(torch.randn(*lead, 3, 32), Scheme(scheme.weight))
    dtypes = {"input_zero": torch.int32}
    tensors = {key: torch.tensor(value, dtype=dtypes.get(key, torch.float32)) for key, value in params.items()}
    return dataclasses.replace(plain, scheme=scheme, **tensors)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("w8a8_static", {"input_scale": [0.1], "input_zero": [-128]}),
        ("w8a8_static", {"input_scale": [3e38], "input_zero": [127]}),
        ("w8a8_static_sym", {"input_scale": [1e-30]}),
        ("w4a8_clip", {"alpha": [1.0]}),
        ("w4a8_clip", {"alpha": [1e-3, 0.5, 1.0], "experts": 3}),
        ("wfp8afp8_tensor_static", {"input_scale": [0.1]}),
        ("wnvfp4anvfp4", {"input_scale": [100.0]}),
    ],
)
def test_what_calibration_finds_is_taken(name, params):
    packed = for_activations(name, **params)
    experts = params.pop("experts", 0)
    assert {key: tensor.tolist() for key, tensor in packed.activation_tensors().items()} == {
        key: torch.tensor(value).tolist() for key, value in params.items()
    }
    if experts:
        assert packed.expert(1).alpha.tolist() == [0.5]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("w8a8_static", {"input_scale": [0.0], "input_zero": [0]}, "must be positive and finite, not 0.0"),
        ("w8a8_static_sym", {"input_scale": [-0.1]}, r"input_scale of a w8a8_static_sym weight .* not -0\.1"),
        ("w8a8_static_sym", {"input_scale": [math.nan]}, "positive and finite, not nan"),
        ("wfp8afp8_static", {"input_scale": [math.inf]}, "positive and finite, not inf"),
        ("wnvfp4anvfp4", {"input_scale": [0.0]}, "positive and finite, not 0.0"),
        ("wnvfp4a16", {"outer": [-1.0]}, "outer .* must be positive and finite, not -1.0"),
        ("w8a8_static", {"input_scale": [0.1], "input_zero": [128]}, "input_zero .* must be an int8 code, not 128"),
        ("w8a8_static", {"input_scale": [0.1], "input_zero": [-129]}, "must be an int8 code, not -129"),
        ("w8a8_static", {"input_scale": [0.1]}, "a w8a8_static weight needs input_zero"),
        ("w8a8_static", {}, "a w8a8_static weight needs input_scale"),
        ("w8a8_static_sym", {"input_scale": [0.1], "input_zero": [0]}, "a w8a8_static_sym weight has no input_zero"),
        ("w8a8", {"input_scale": [0.1]}, "a w8a8 weight has no input_scale"),
        ("w8a8_static_sym", {"input_scale": 0.1}, r"must be float32 \[1\], not torch.float32 \[\]"),
        ("w4a8_clip", {}, "a w4a8_clip weight needs alpha"),
        ("w4a8_clip", {"alpha": [0.0]}, "alpha .* must be above 0 and at most 1, not 0.0"),
        ("w4a8_clip", {"alpha": [-0.5]}, "above 0 and at most 1, not -0.5"),
        ("w4a8_clip", {"alpha": [math.nan]}, "above 0 and at most 1, not nan"),
        ("w4a8_clip", {"alpha": [0.5, 0.5]}, r"alpha .* must be float32 \[1\], not torch.float32 \[2\]"),
        ("w4a8_clip", {"alpha": [0.5], "experts": 2}, r"alpha .* must be float32 \[2\], not torch.float32 \[1\]"),
        ("w4a8_clip", {"alpha": [0.5, 1.0, 1.25], "experts": 3}, "above 0 and at most 1, not 1.25"),
    ],
)
def test_what_no_calibration_finds_is_refused(name, params, message):
    with pytest.raises(FormatError, match=message):
        for_activations(name, **params)


def test_values_that_are_not_there_yet_are_not_checked():
    packed = for_activations("w4a8_clip", alpha=[0.5])
    assert dataclasses.replace(packed, alpha=torch.zeros(1, device="meta")).alpha.is_meta


def test_a_packed_weight_counts_its_bytes_and_names_its_tensors():
    weight = rebuilt(permutation=torch.arange(70, dtype=torch.int32))
    assert list(weight.tensors()) == ["codes", "scales", "zeros", "permutation"]
    assert weight.nbytes == 3 * 35 + 3 * 3 * 4 + 3 * 3 + 70 * 4
    assert list(packed("w8a16").tensors()) == ["codes", "scales"]


# ------------------------------------------------------------------------------------------------ plans and reports


def planned(name: str, scheme: str | None = "w8a16", **site: object) -> PlannedSite:
    place = Site(name, "linear", 16, 8, torch.bfloat16, **site)  # type: ignore[arg-type]
    return PlannedSite(place, Scheme.parse(scheme) if scheme else None, "because", bytes_after=160 if scheme else 256)


def test_a_plan_is_a_container_of_sites():
    plan = Plan("cpu", (planned("a"), planned("b", None)), other_bytes=1000)
    assert len(plan) == 2
    assert [entry.site.name for entry in plan] == ["a", "b"]
    assert plan["b"].quantized is False
    assert plan.quantized == (plan["a"],)
    assert (plan.bytes_before, plan.bytes_after) == (1000 + 256 + 256, 1000 + 160 + 256)
    with pytest.raises(KeyError, match="missing"):
        plan["missing"]


def test_a_tied_weight_is_counted_once():
    assert planned("lm_head", tied_to="embed").site.float_bytes == 0


def test_coverage_is_the_share_of_planned_sites_that_were_quantized():
    plan = Plan("cpu", (planned("a"), planned("b"), planned("c", None)))
    done = (SiteResult(plan["a"], 160, 40.0), SiteResult(plan["b"], 256), SiteResult(plan["c"], 256))
    assert Report("model", plan, done).coverage == 0.5
    assert Report("model", Plan("cpu", ()), ()).coverage == 0.0
