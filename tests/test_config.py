"""What the user asks for: presets, dicts, files, rules, and what is said when something is wrong."""

import json

import pytest
import torch
import yaml

from qcompile.config import PRESETS, QuantConfig, Rule, as_config
from qcompile.errors import ConfigError
from qcompile.types import Scheme, Site


def site(name: str, role: str = "linear") -> Site:
    return Site(name, role, 8, 8, torch.float32)


# ----------------------------------------------------------------------------------------------- what is a config


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_configs(name):
    assert as_config(name) == QuantConfig(**PRESETS[name])


@pytest.mark.parametrize("name", ["w3a16_g32_asym", "w8a8_static", "w4a8_clip", "wfp8afp8", "wnvfp4a16", "wmxfp4a16"])
def test_a_scheme_name_is_a_preset(name):
    assert as_config(name) == QuantConfig(scheme=name)


def test_names_of_small_floats_mean_weights_and_activations():
    schemes = {name: Scheme.parse(as_config(name).scheme) for name in ("fp8", "fp8_static", "fp8_block", "nvfp4")}
    assert all(scheme.activation is not None for scheme in schemes.values())
    assert schemes["fp8_static"].activation.params == ("input_scale",)
    assert schemes["fp8_block"].weight.block == (128, 128)
    assert schemes["fp8_block"].activation.group_size == 128


FULL = {
    "scheme": "w4a16_g64",
    "options": {"observer": "mse"},
    "minimum_coverage": 0.9,
    "rules": [
        {"match": "lm_head", "scheme": "w8a16"},
        {"match": "re:model\\.layers\\.0\\.", "scheme": "float"},
        {"match": "*.down_proj", "scheme": "w8a16", "method": "rtn", "options": {"observer": "minmax"}},
    ],
}


@pytest.mark.parametrize(
    ("suffix", "dump"), [(".yaml", yaml.safe_dump), (".yml", yaml.safe_dump), (".json", json.dumps)]
)
def test_files_say_the_same_as_dicts(tmp_path, suffix, dump):
    path = tmp_path / f"config{suffix}"
    path.write_text(dump(FULL))
    config = as_config(FULL)
    assert config.rules[2].options == {"observer": "minmax"}
    assert as_config(path) == as_config(str(path)) == config
    assert as_config(config) is config
    assert as_config(config.model_dump()) == config


def test_configs_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        QuantConfig().scheme = "w8a8"


# ------------------------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize(
    ("match", "name", "role", "expected"),
    [
        ("*.down_proj", "model.layers.0.mlp.down_proj", "linear", True),
        ("*.down_proj", "down_proj", "linear", False),
        ("*.DOWN_proj", "a.down_proj", "linear", False),
        ("model.layers.[01].*", "model.layers.1.mlp.up_proj", "linear", True),
        ("model.layers.1", "model.layers.1.mlp", "linear", False),
        (r"re:.*\.(q|k)_proj$", "a.k_proj", "linear", True),
        (r"re:q_proj", "a.q_proj", "linear", False),
        (r"re:model\.layers\.1\.", "model.layers.10.q_proj", "linear", False),
        ("lm_head", "output", "lm_head", True),
        ("lm_head", "lm_head", "lm_head", True),
        ("router", "a.gate", "router", True),
        ("router", "a.gate", "linear", False),
        ("linear", "a.q_proj", "linear", False),
        ("linear", "linear", "linear", True),
    ],
)
def test_a_rule_matches_by_glob_regex_or_role(match, name, role, expected):
    assert Rule(match=match, scheme="w8a16").matches(site(name, role)) is expected


def test_the_first_rule_that_matches_wins():
    config = as_config(FULL)
    assert config.rule_for(site("model.layers.0.mlp.down_proj")) is config.rules[1]
    assert config.rule_for(site("model.layers.1.mlp.down_proj")) is config.rules[2]
    assert config.rule_for(site("output", "lm_head")) is config.rules[0]
    assert config.rule_for(site("model.layers.1.mlp.up_proj")) is None


# ------------------------------------------------------------------------------------------------------ wrong configs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("rtnn", r"unknown preset 'rtnn'\. Did you mean 'rtn'\?.*w4a16_g64_asym"),
        ("w4a16_gg", "'w4a16_gg' is not a scheme name; schemes are written"),
        ("w9a16", "weight bits must be 2 to 8"),
        (4, "not int"),
        (None, "not NoneType"),
        ({"shceme": "w8a16"}, r"config: unknown option 'shceme'\. Did you mean 'scheme'\?"),
        ({"scheme": "int4"}, "config: scheme: 'int4' is not a scheme name"),
        ({"scheme": 4}, "scheme: .*string"),
        ({"method": "rnt"}, r"unknown method 'rnt'\. Did you mean 'rtn'\?"),
        ({"options": {"observr": "mse"}}, "method 'rtn' has no option 'observr'. Known: observer"),
        ({"options": {"observer": "max"}}, r"must be one of \('minmax', 'mse'\), not 'max'"),
        ({"minimum_coverage": 1.5}, "minimum_coverage: .*less than or equal to 1"),
        ({"rules": [{"match": "*"}]}, "rules.0.scheme: Field required"),
        ({"rules": [{"match": "", "scheme": "w8a16"}]}, "rules.0.match: .*at least 1"),
        ({"rules": [{"match": "re:(", "scheme": "w8a16"}]}, r"rule 're:\(' is not a regular expression"),
        ({"rules": [{"match": "*", "scheme": "w8a3"}]}, "rules.0.scheme: activation bits must be"),
        ({"rules": [{"mach": "*", "scheme": "w8a16"}]}, r"'rules.0.mach'\. Did you mean 'match'\?"),
        ({"rules": [{"match": "*", "scheme": "w8a16", "method": "awk"}]}, "unknown method 'awk'"),
        ({"rules": [{"match": "*", "scheme": "w8a16", "options": {"x": 1}}]}, "has no option 'x'"),
        ({1: 2}, "config: .*strings"),
    ],
)
def test_a_wrong_config_is_explained(config, message):
    with pytest.raises(ConfigError, match=message):
        as_config(config)


def test_every_problem_is_named_at_once():
    with pytest.raises(ConfigError, match=r"'w1' is not.*unknown option 'extra'"):
        as_config({"scheme": "w1", "extra": 1})


def test_a_config_made_in_code_is_explained_alike():
    with pytest.raises(ConfigError, match=r"unknown option 'shceme'\. Did you mean 'scheme'\?"):
        QuantConfig(shceme="w8a16")
    with pytest.raises(ConfigError, match="'int4' is not a scheme name"):
        QuantConfig(scheme="int4")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", "{", "cannot be read"),
        ("c.yaml", "a: [", "cannot be read"),
        ("c.yaml", "- 1", "must hold a mapping, not list"),
        ("c.yaml", "", "must hold a mapping, not NoneType"),
        ("c.yaml", "scheme: w0a16", "c.yaml: scheme: weight bits"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        as_config(path)
    assert str(path) in str(caught.value)


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml does not exist"):
        as_config(str(tmp_path / "missing.yaml"))
