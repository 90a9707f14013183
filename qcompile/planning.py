"""Config × sites × backend → Plan: the whole answer before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from . import plugins
from .config import FLOAT, QuantConfig, Rule
from .errors import ConfigError, UnsupportedError, did_you_mean
from .kernels import Backend, choose
from .types import Plan, PlannedSite, Scheme, Site

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def find_backend(device: str | torch.device, *, to_run: bool = True) -> Backend:
    """The backend of a device ("cpu", "cuda:0" ...).

    UnsupportedError when there is none, or (with ``to_run``) when the device itself is not there.
    """
    kind = str(device).partition(":")[0]
    if kind not in plugins.names("backends"):
        known = did_you_mean(kind, plugins.names("backends"))
        raise UnsupportedError(f"there is no backend for device {str(device)!r}.{known}")
    backend = plugins.find("backends", kind)
    if to_run and (missing := backend.missing()):
        raise UnsupportedError(f"device {str(device)!r} cannot be used here: {missing}")
    return backend


def make_plan(config: QuantConfig, sites: Iterable[Site], device: str, other_bytes: int = 0) -> Plan:
    """Decide scheme, method and kernel of every site; the device need not be there.

    Raises ConfigError for a rule that matches nothing, when nothing would be quantized, or for a coverage below
    ``config.minimum_coverage``; UnsupportedError when a site that a rule names cannot be quantized as asked.
    """
    if config.budget is not None:
        raise ConfigError(
            f"a budget of {config.budget} is spent by what calibration data tells: call quantize with data=, whose "
            "report has the plan; or leave out the budget"
        )
    sites = tuple(sites)
    backend = find_backend(device, to_run=False)
    _no_idle_rules(config, sites)
    plan = Plan(str(device), tuple(_plan_site(config, site, backend) for site in sites), other_bytes)
    if not plan.quantized:
        why = (
            "; ".join(f"{p.site.name or 'the model'}: {p.reason}" for p in plan.sites[:5])
            or "its graph has no Linear layer"
        )
        raise ConfigError(f"nothing would be quantized: {why}{' ...' if len(plan) > 5 else ''}")
    coverage = len(plan.quantized) / len(plan)
    if coverage < config.minimum_coverage:
        left = ", ".join(f"{p.site.name} ({p.reason})" for p in plan if not p.quantized)
        raise ConfigError(
            f"the plan covers {coverage:.0%} of {len(plan)} sites, below minimum_coverage="
            f"{config.minimum_coverage:.0%}. Float: {left}"
        )
    return plan


def override(plan: Plan, pattern: str, scheme: str | None, method: str, options: Mapping[str, Any]) -> Plan:
    """``Plan.override``: plan the sites that match ``pattern`` again, as if a rule named them."""
    asked = {"match": pattern, "scheme": scheme or FLOAT, "method": method, "options": dict(options)}
    config = QuantConfig(rules=(asked,))
    (rule,) = config.rules
    _no_idle_rules(config, [p.site for p in plan])
    backend = find_backend(plan.device, to_run=False)
    sites = tuple(_plan_site(config, p.site, backend) if rule.matches(p.site) else p for p in plan)
    return dataclasses.replace(plan, sites=sites)


def _no_idle_rules(config: QuantConfig, sites: Iterable[Site]) -> None:
    sites = tuple(sites)
    for rule in config.rules:
        if not any(rule.matches(site) for site in sites):
            known = did_you_mean(rule.match, {site.name for site in sites} | {site.role for site in sites} - {"linear"})
            raise ConfigError(f"rule {rule.match!r} matches no site.{_shortened(known)}")


def _shortened(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."


def _plan_site(config: QuantConfig, site: Site, backend: Backend) -> PlannedSite:
    rule = config.rule_for(site)
    stays = _why_float(config, rule, site)
    if stays:
        return PlannedSite(site, None, stays, bytes_after=site.float_bytes)
    scheme = Scheme.parse(rule.scheme if rule else config.scheme)
    kernel, refusals = choose(backend, site, scheme)
    if kernel is None:
        if rule:
            raise UnsupportedError(f"{site.name} cannot be {scheme} on {backend.name}, as a rule asks: {refusals}")
        return PlannedSite(site, None, f"{backend.name} cannot run {scheme}: {refusals}", bytes_after=site.float_bytes)
    method = (rule and rule.method) or config.method
    options = (rule and rule.options) or config.options
    if reason := plugins.find("methods", method).refuses(scheme, options):
        raise UnsupportedError(f"{site.name} cannot be {scheme} by method {method!r}: {reason}")
    params = scheme.activation.params if scheme.activation else ()
    return PlannedSite(
        site,
        scheme,
        f"{f'rule {rule.match!r}' if rule else 'default'}{f'; {refusals}' if refusals else ''}",
        method=method,
        options=tuple(sorted(options.items())),
        kernel=f"{backend.name}.{kernel.name}",
        bytes_after=kernel.nbytes(site, scheme) + 4 * len(params) * max(1, site.experts),
        refusals=refusals,
    )


def _why_float(config: QuantConfig, rule: Rule | None, site: Site) -> str:
    """Why ``site`` is not quantized, "" when it is."""
    wanted = rule.scheme if rule else config.scheme
    if wanted == FLOAT:
        return f"rule {rule.match!r} keeps it float" if rule else "the config keeps everything float"
    if rule is None and site.role in ("lm_head", "router"):
        return f"it is {'the' if site.role == 'lm_head' else 'a'} {site.role}; a rule {site.role!r} would quantize it"
    obstacle = site.obstacle
    if not obstacle and site.dtype not in _DTYPES:
        obstacle = f"its weight is {site.dtype}, not bfloat16, float16 or float32"
    if obstacle and rule and rule.match in (site.name, site.role):
        raise UnsupportedError(f"{site.name} cannot be quantized, as rule {rule.match!r} asks: {obstacle}")
    return obstacle
