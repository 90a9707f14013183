"""What the user asks for: ordered rules from site names to schemes, with presets by name.

    QuantConfig(scheme="w4a16_g128")
    QuantConfig(scheme="w4a16_g128", rules=[{"match": "*.down_proj", "scheme": "w8a16"}])

The same as a dict, a YAML or JSON file, or a preset's name.
"""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from . import plugins
from .budget import Budget, ladder
from .errors import ConfigError, did_you_mean
from .types import Scheme, Site

PRESETS: dict[str, dict[str, Any]] = {
    "rtn": {"scheme": "w4a16_g128"},
    "gptq": {"scheme": "w4a16_g128", "method": "gptq"},
    "awq": {"scheme": "w4a16_g128_asym", "method": "awq"},
    "smoothquant": {"scheme": "w8a8", "method": "smoothquant"},
    "fp8": {"scheme": "wfp8afp8"},
    "fp8_static": {"scheme": "wfp8afp8_tensor_static"},
    "fp8_block": {"scheme": "wfp8afp8_b128x128"},
    "nvfp4": {"scheme": "wnvfp4anvfp4"},
    "mxfp4": {"scheme": "wmxfp4amxfp4"},
    "mxfp8": {"scheme": "wmxfp8amxfp8"},
}
"""Preset names; any scheme name ("w4a16_g32_asym", "w8a8", "w8a8_static", "w4a8") is one as well, rounded to nearest.

Those of small floats quantize weights and activations, as the presets of the same names of compressed-tensors do.
"""

FLOAT = "float"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _valid_scheme(value: str) -> str:
    return value if value == FLOAT else str(Scheme.parse(value))


class Rule(_Strict):
    """Sites whose name matches get this scheme; ``match`` is a glob ("*.down_proj"), "re:<regex>" or a role.

    Roles are found in the graph: "lm_head" and "router". Scheme "float" leaves a site as it is.
    """

    match: str = Field(min_length=1, description='A glob, "re:" and a regular expression, or a role.')
    scheme: str = Field(description='A scheme such as w8a16, or "float".')
    method: str | None = Field(default=None, description="How to quantize these (default: that of the config).")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the method.")

    _scheme = field_validator("scheme")(_valid_scheme)

    @field_validator("match")
    @classmethod
    def _valid_pattern(cls, value: str) -> str:
        if value.startswith("re:"):
            try:
                re.compile(value[3:])
            except re.error as error:
                raise ConfigError(f"rule {value!r} is not a regular expression: {error}") from None
        return value

    def matches(self, site: Site) -> bool:
        """Whether this rule is about ``site``: by role, by regular expression from the start, or by glob."""
        if self.match == site.role and site.role != "linear":
            return True
        if self.match.startswith("re:"):
            return re.match(self.match[3:], site.name) is not None
        return fnmatch.fnmatchcase(site.name, self.match)


class QuantConfig(_Strict):
    """The default scheme and method, and rules before it (the first match wins).

    budget: bits per quantized weight, scales included ("4.5 bits"), or bytes of the whole model ("1.2 GB"). Then every
    site that no rule matches gets the scheme with more or fewer bits, as measured on calibration data.

    ``lm_head`` and routers stay float unless a rule matches them. ``minimum_coverage`` is checked against all
    sites; below it ``quantize`` raises before any work.
    """

    scheme: str = Field(default="w4a16_g128", description="The numbers of weights and activations, such as w8a8.")
    method: str = Field(default="rtn", description="How weights are quantized, such as rtn or gptq.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the method.")
    rules: tuple[Rule, ...] = Field(default=(), description="Exceptions; the first that matches a site wins.")
    minimum_coverage: float = Field(
        default=0.0, ge=0.0, le=1.0, description="Share of the sites below which nothing is quantized, but an error."
    )
    budget: str | None = Field(
        default=None, description="Bits per weight or bytes to spend, as '4.5 bits' or '1.2 GB'."
    )
    tracing: Literal["export", "module_walk"] = Field(
        default="export", description="How sites are found: in the exported graph, or by walking over the modules."
    )

    _scheme = field_validator("scheme")(_valid_scheme)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None

    @field_validator("budget")
    @classmethod
    def _valid_budget(cls, value: str | None) -> str | None:
        if value is not None:
            Budget.parse(value)
        return value

    @model_validator(mode="after")
    def _known_methods(self) -> QuantConfig:
        plugins.find("methods", self.method).check(self.options)
        if self.budget is not None:
            ladder(self.scheme)
        for rule in self.rules:
            plugins.find("methods", rule.method or self.method).check(rule.options)
        return self

    def without_budget(self) -> QuantConfig:
        """The same, with one scheme for all sites that no rule matches."""
        return self.model_copy(update={"budget": None})

    def rule_for(self, site: Site) -> Rule | None:
        """The first rule that matches ``site``."""
        return next((rule for rule in self.rules if rule.matches(site)), None)


def as_config(config: QuantConfig | str | Path | dict[str, Any]) -> QuantConfig:
    """Turn what the user gave into a QuantConfig; raises ConfigError that says what is wrong."""
    if isinstance(config, QuantConfig):
        return config
    if isinstance(config, dict):
        return _from_dict(config, "config")
    if isinstance(config, Path) or (isinstance(config, str) and config.endswith((".yaml", ".yml", ".json"))):
        return _from_file(Path(config))
    if isinstance(config, str):
        if config in PRESETS:
            return _from_dict(dict(PRESETS[config]), f"preset {config!r}")
        if re.match(r"w[a-z]*\d+a", config):
            return QuantConfig(scheme=_valid_scheme(config))
        raise ConfigError(
            f"unknown preset {config!r}.{did_you_mean(config, PRESETS)} A scheme name such as 'w4a16_g64_asym', "
            "a dict, a QuantConfig or a path to a .yaml or .json file will do as well."
        )
    raise ConfigError(
        f"a config is a preset's name, a QuantConfig, a dict or a path to a .yaml or .json file, "
        f"not {type(config).__name__}"
    )


def _from_file(path: Path) -> QuantConfig:
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    text = path.read_text()
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path} must hold a mapping, not {type(data).__name__}")
    return _from_dict(data, str(path))


def _from_dict(data: dict[str, Any], where: str) -> QuantConfig:
    try:
        return QuantConfig(**data)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _explain(error: ValidationError) -> str:
    """Every problem that pydantic found, in our words."""
    problems = []
    for problem in error.errors():
        place = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            known = Rule.model_fields if problem["loc"][0] == "rules" else QuantConfig.model_fields
            problems.append(f"unknown option {place!r}.{did_you_mean(str(problem['loc'][-1]), known)}")
        else:
            problems.append(f"{place + ': ' if place else ''}{problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(problems)
