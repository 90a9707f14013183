"""Quantize a float checkpoint while it is read: one Linear, or one expert, of float weights at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import numerics, parts, plugins
from .config import QuantConfig
from .errors import ConfigError, FormatError
from .memory import return_memory
from .moe import gate_first
from .planning import make_plan
from .trace import is_language_model, trace
from .types import PackedWeight, Plan, PlannedSite, Site

if TYPE_CHECKING:
    from .survey import Survey


def plan_stream(survey: Survey, settings: QuantConfig) -> Plan:
    """What ``quantize`` would do to the model of a float checkpoint, which is still on the meta device.

    ConfigError for a quantized checkpoint.
    """
    if survey.format is not None:
        raise ConfigError(f"{survey.folder.path} is quantized already, as {survey.format.name}; leave out the config")
    traced = settings.tracing == "export" and is_language_model(survey.model)
    sites = trace(survey.model).sites if traced else tuple(survey.sites)
    return make_plan(settings, sites, survey.device, survey.other_bytes())


def quantize_stored(survey: Survey, planned: PlannedSite) -> tuple[PackedWeight, float]:
    """The packed weight of a site and its signal-to-noise ratio in dB; experts are quantized one after the other."""
    method, scheme, dtype = plugins.find("methods", planned.method), planned.scheme, planned.site.dtype
    signal = noise = 0.0

    def quantized(stored: Tensor) -> PackedWeight:
        nonlocal signal, noise
        weight = stored.to(dtype).contiguous()
        if not numerics.is_finite(weight):
            raise FormatError(f"{planned.site.name}: a stored weight holds NaN or infinite values")
        packed = method.quantize(weight, scheme, dict(planned.options))
        energy = sum(rows.float().square().sum().item() for rows in weight.split(1024))
        signal += energy
        noise += energy / 10 ** (numerics.signal_to_noise(weight, packed) / 10) if energy else 0.0
        return packed

    each = map(quantized, float_weights(survey, planned.site))
    packed = next(each) if planned.site.kind == "linear" else parts.stack(each, planned.site.experts)
    return_memory()
    return packed, 10 * math.log10(signal / noise) if noise else math.inf


def float_weights(survey: Survey, site: Site) -> Iterator[Tensor]:
    """The stored weight [out, in] of a Linear, or of each expert of a layer, gate first."""
    read = survey.folder.read
    if site.kind == "linear":
        yield read(survey.stored_name(f"{site.name}.weight"))
        return
    layout, projection = survey.of_experts[site.name]
    form = layout.arithmetic
    fused = "" if layout.listed else survey.stored_name(f"{layout.name}.{form.weights[projection]}")
    for expert, own in enumerate(survey.pieces[site.name]):
        if fused:
            weight = read(fused, expert)
            weight = weight.t() if form.transposed else weight
            yield gate_first(weight, 0) if form.interleaved and not projection else weight
        else:
            yield torch.cat([read(f"{piece.name}.weight") for piece in own])
