"""Quantize one weight by what calibration saw of its inputs; what is stored of its activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from . import plugins
from .observers import Statistics, search_clip, static_parameters
from .types import PackedWeight, PlannedSite, Scheme


def reader(planned: PlannedSite) -> tuple[str, str]:
    """What a site reads, and as which numbers: equal for sites that can share the quantized activations."""
    return planned.site.inputs or planned.site.name, str(planned.scheme.activation if planned.scheme else None)


def static(planned: PlannedSite, seen: Sequence[Statistics]) -> dict[str, Tensor]:
    """Stored parameters of static activations within the ranges of all of ``seen``; none for others."""
    activation = planned.scheme.activation if planned.scheme else None
    if activation is None or "input_scale" not in activation.params:
        return {}
    low, high = (torch.stack([getattr(s, end) for s in seen]) for end in ("low", "high"))
    return static_parameters(low.min(), high.max(), activation)


def pack(
    planned: PlannedSite, weight: Tensor, statistics: Statistics | None, parameters: dict[str, Tensor]
) -> PackedWeight:
    """Quantize the weight [out, in] of a Linear or of one expert; without statistics it is rounded to nearest."""
    scheme = planned.scheme
    assert scheme is not None
    bare = Scheme(scheme.weight)
    if statistics is None:
        packed = plugins.find("methods", "rtn").quantize(weight, bare, {}, None, planned.site.dtype)
    else:
        method = plugins.find("methods", planned.method)
        packed = method.quantize(weight, bare, dict(planned.options), statistics, planned.site.dtype)
    if scheme.activation is not None and scheme.activation.clip:
        alpha = 1.0 if statistics is None else search_clip(statistics.rows, weight, packed, scheme.activation)
        parameters = {"alpha": torch.tensor([alpha], device=weight.device)}
    return complete(planned, packed, parameters)


def complete(planned: PlannedSite, packed: PackedWeight, parameters: dict[str, Tensor]) -> PackedWeight:
    """A weight with the scheme of its site, and the parameters of its activations."""
    assert planned.scheme is not None
    return dataclasses.replace(packed, scheme=planned.scheme, **parameters)  # type: ignore[arg-type]
