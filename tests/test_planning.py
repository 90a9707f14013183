"""The whole answer before any work: schemes, kernels, reasons, bytes, and every refusal that can be known early."""

import pytest
import torch
from helpers import TinyMLP
from torch import nn

import qcompile
from qcompile.backends.cpu import native
from qcompile.config import QuantConfig
from qcompile.errors import ConfigError, UnsupportedError
from qcompile.planning import find_backend, make_plan
from qcompile.reporting import bytes_after
from qcompile.types import Site


def site(name: str, role: str = "linear", **more) -> Site:
    return Site(name, role, **{"out_features": 128, "in_features": 256, "dtype": torch.bfloat16, **more})


SITES = (
    site("layers.0.q_proj", inputs="norm"),
    site("layers.0.down_proj", out_features=256, in_features=512),
    site("layers.0.gate", "router", out_features=8),
    site("lm_head", "lm_head", out_features=1000),
)


def rule(match: str, scheme: str, **more) -> dict:
    return {"match": match, "scheme": scheme, **more}


def plan(*rules: dict, sites=SITES, device: str = "cpu", other_bytes: int = 0, **settings):
    config = QuantConfig(**{"scheme": "w4a16_g128", "rules": rules, **settings})
    return make_plan(config, sites, device, other_bytes)


def schemes(made) -> dict[str, str]:
    return {planned.site.name: str(planned.scheme or "float") for planned in made}


class TestSchemes:
    def test_heads_and_routers_stay_float_and_say_how_to_change_that(self):
        made = plan()
        assert list(schemes(made).values()) == ["w4a16_g128", "w4a16_g128", "float", "float"]
        assert made["lm_head"].reason == "it is the lm_head; a rule 'lm_head' would quantize it"
        assert made["layers.0.gate"].reason == "it is a router; a rule 'router' would quantize it"
        assert made["layers.0.q_proj"].reason == "default"

    def test_the_first_rule_that_matches_wins(self):
        made = plan(rule("*.down_proj", "w8a16"), rule("layers.*", "float"), rule("lm_head", "w8a8"))
        assert list(schemes(made).values()) == ["float", "w8a16", "float", "w8a8"]
        assert made["layers.0.q_proj"].reason == "rule 'layers.*' keeps it float"
        assert made["layers.0.down_proj"].reason == "rule '*.down_proj'"

    def test_options_of_a_rule_come_before_those_of_the_config(self):
        made = plan(rule("*.down_proj", "w8a16", options={"observer": "minmax"}), options={"observer": "mse"})
        assert made["layers.0.down_proj"].options == (("observer", "minmax"),)
        assert made["layers.0.q_proj"].options == (("observer", "mse"),)

    @pytest.mark.parametrize("match", ["*.dwon_proj", "re:layer_.*", "layers.0"])
    def test_a_rule_that_matches_nothing_is_an_error(self, match):
        with pytest.raises(ConfigError, match="matches no site") as error:
            plan(rule(match, "w8a16"))
        assert repr(match) in str(error.value)

    def test_a_misspelt_name_is_suggested(self):
        with pytest.raises(ConfigError, match=r"'lm_haed' matches no site\. Did you mean 'lm_head'\?"):
            plan(rule("lm_haed", "w8a16"))


class TestRefusals:
    def test_a_plan_that_quantizes_nothing_says_why_for_each_site(self):
        with pytest.raises(ConfigError, match=r"nothing would be quantized: lm_head: it is the lm_head"):
            plan(sites=SITES[3:])
        with pytest.raises(ConfigError, match=r"nothing would be quantized: its graph has no Linear layer"):
            plan(sites=())
        with pytest.raises(ConfigError, match=r"the config keeps everything float"):
            plan(scheme="float")

    def test_coverage_below_the_minimum_names_every_float_site_with_its_reason(self):
        assert len(plan(minimum_coverage=0.5).quantized) == 2
        with pytest.raises(ConfigError, match=r"covers 50% of 4 sites, below minimum_coverage=51%") as error:
            plan(minimum_coverage=0.51)
        assert "layers.0.gate (it is a router" in str(error.value)
        assert "lm_head (it is the lm_head" in str(error.value)
        assert "q_proj" not in str(error.value)

    def test_an_obstacle_keeps_a_site_float_and_is_an_error_when_a_rule_names_the_site(self):
        sites = (site("a"), site("b", obstacle="it has forward hooks"))
        assert plan(sites=sites)["b"].reason == "it has forward hooks"
        assert plan(rule("*", "w8a16"), sites=sites)["b"].reason == "it has forward hooks"
        with pytest.raises(UnsupportedError, match="b cannot be quantized, as rule 'b' asks: it has forward hooks"):
            plan(rule("b", "w8a16"), sites=sites)

    def test_float64_weights_stay_float(self):
        sites = (site("a"), site("b", dtype=torch.float64))
        assert plan(sites=sites)["b"].reason == "its weight is torch.float64, not bfloat16, float16 or float32"
        with pytest.raises(ConfigError, match=r"nothing would be quantized: b: its weight is torch\.float64"):
            plan(sites=sites[1:])

    def test_a_kernel_that_was_passed_over_says_why(self, monkeypatch):
        monkeypatch.setattr(native, "unavailable", lambda: "no C++ compiler")
        made = plan(sites=(site("a"), site("b", dtype=torch.float32)))
        assert made["a"].kernel == "cpu.int4pack"
        assert made["b"].kernel == "cpu.reference"
        assert made["b"].reason == (
            "default; native: no C++ compiler; int4pack: fast in bfloat16 and float16 only, not torch.float32"
        )

    def test_no_kernel_at_all_is_float_by_default_and_an_error_by_rule(self, monkeypatch):
        backend = find_backend("cpu")
        for kernel in backend.kernels:
            monkeypatch.setattr(kernel, "refuses", lambda site, scheme: "not today" if site.name == "b" else "")
        sites = (site("a"), site("b"))
        made = plan(sites=sites)
        assert made["b"].reason.startswith("cpu cannot run w4a16_g128: native: not today; int4pack: not today;")
        with pytest.raises(UnsupportedError, match=r"b cannot be w8a16 on cpu, as a rule asks: native: not today"):
            plan(rule("b", "w8a16"), sites=sites)

    @pytest.mark.parametrize("device", ["cudaa", "tpu:0", "", torch.device("meta"), 3])
    def test_a_device_without_a_backend_lists_those_that_have_one(self, device):
        with pytest.raises(UnsupportedError, match=r"no backend for device '.*'.*Known: .*cpu"):
            plan(device=device)

    def test_a_device_that_is_not_there_says_why(self, monkeypatch):
        monkeypatch.setattr(type(find_backend("cpu")), "missing", lambda self: "its driver is not loaded")
        with pytest.raises(UnsupportedError, match="device 'cpu:0' cannot be used here: its driver is not loaded"):
            find_backend("cpu:0")
        assert plan(device="cpu:0").quantized  # planning needs no device


class TestOverride:
    def test_only_the_named_sites_change_and_the_plan_itself_does_not(self):
        made = plan()
        edited = made.override("*.down_proj", "w8a8").override("lm_head", "w8a16", observer="mse")
        edited = edited.override("*.q_proj", None)
        assert list(schemes(edited).values()) == ["float", "w8a8", "float", "w8a16"]
        assert edited["lm_head"].options == (("observer", "mse"),)
        assert list(schemes(made).values()) == ["w4a16_g128", "w4a16_g128", "float", "float"]
        assert edited["layers.0.gate"] == made["layers.0.gate"]

    @pytest.mark.parametrize(
        ("pattern", "scheme", "more", "error", "message"),
        [
            ("*.up_proj", "w8a16", {}, ConfigError, r"rule '\*\.up_proj' matches no site"),
            ("*", "w99a16", {}, ConfigError, "weight bits must be 2 to 8, not 99"),
            ("*", "w4", {}, ConfigError, "'w4' is not a scheme name"),
            ("*", "w4a16", {"method": "rtm"}, ConfigError, "unknown method 'rtm'. Did you mean 'rtn'"),
            ("*", "w4a16", {"observr": "mse"}, ConfigError, "no option 'observr'"),
            ("odd", "w4a16", {}, UnsupportedError, "odd cannot be quantized, as rule 'odd' asks: it has hooks"),
        ],
    )
    def test_a_wrong_one_is_an_error_like_that_of_a_rule(self, pattern, scheme, more, error, message):
        made = plan(sites=(*SITES, site("odd", obstacle="it has hooks")))
        with pytest.raises(error, match=message):
            made.override(pattern, scheme, **more)


class TestPlan:
    def test_it_prints_every_scheme_reason_and_the_total(self, monkeypatch):
        monkeypatch.setattr(native, "unavailable", lambda: "no C++ compiler")
        text = str(plan(rule("*.down_proj", "w8a8"), other_bytes=1000))
        for part in ("plan for cpu", "w4a16_g128", "w8a8", "cpu.int4pack", "cpu.int_mm", "a rule 'router' would"):
            assert part in text
        assert "2 of 4 sites quantized" in text

    def test_it_is_read_by_name_and_in_order(self):
        made = plan()
        assert [planned.site for planned in made] == list(SITES)
        assert len(made) == 4
        with pytest.raises(KeyError):
            made["nothing"]

    def test_bytes_before_are_those_of_the_model_and_bytes_after_those_of_the_result(self):
        model = nn.Sequential(TinyMLP(), nn.Linear(8, 200)).bfloat16()
        shared = nn.Linear(8, 200, bias=False)
        shared.weight = model[1].weight
        model.append(nn.Sequential(nn.Linear(200, 8), shared))
        inputs = (torch.randn(3, 64),)
        config = {"scheme": "w4a16_g32", "rules": [rule("0.last", "w8a8"), rule("1", "w8a16")]}
        made = qcompile.plan(model.bfloat16(), config, example_inputs=(inputs[0].bfloat16(),))
        assert made.bytes_before == stored(model)
        qcompile.quantize(model, made, example_inputs=(inputs[0].bfloat16(),))
        assert made.bytes_after == bytes_after(qcompile.report(model)) == stored(model)


def stored(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
