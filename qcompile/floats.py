"""Quantize a float model while it is compiled: ``torch.compile(model, backend="qcompile", options={"config": ...})``.

Dynamo's graph is rewritten by the same pass as an exported one. Weights are packed at the first compilation and shared
by all later graphs of the same parameters; the caller's module keeps its float ones, which the report says.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakIdKeyDictionary

from . import numerics
from .calibrate import refuse_without_data
from .config import QuantConfig
from .errors import ConfigError, UnsupportedError
from .modules import QuantWeight, quantize_site
from .planning import make_plan
from .records import remember_float
from .sites import find_roles, module_name
from .types import PassRecord, Plan, PlannedSite, Report, Site, SiteResult
from .verify import run_pass


@dataclass(frozen=True)
class _Packed:
    module: QuantWeight
    result: SiteResult


_PACKED: WeakIdKeyDictionary = WeakIdKeyDictionary()  # float parameter -> {(scheme, method, options, kernel): _Packed}


def quantize_float_graph(module: GraphModule, example_inputs: Sequence[Any], config: QuantConfig) -> None:
    """Rewrite one of Dynamo's graphs in place; its weights must be real tensors among ``example_inputs``.

    A graph without Linears (after a graph break) is left as it is. Raises like ``qcompile.quantize``.
    """
    from .passes.quantize_linear import QuantizeLinear

    started = time.perf_counter()
    values = dict(zip((n for n in module.graph.nodes if n.op == "placeholder"), example_inputs, strict=True))
    roles = find_roles(module)
    if not roles:
        return
    _refuse_experts(roles, values)
    weights: dict[str, Tensor] = {}
    sites: dict[str, Site] = {}
    for node, role in roles.items():
        site, weight = _site(node, values, role)
        sites.setdefault(site.name, site)
        if weight is not None:
            weights[site.name] = weight
    plan = make_plan(config, sites.values(), next(iter(weights.values())).device.type if weights else "cpu")
    refuse_without_data(plan, "Quantize before compiling: qcompile.quantize(model, config, data=...).")
    packed = {p.site.name: _pack(p, weights[p.site.name]) for p in plan.quantized}

    def tensors(planned: PlannedSite, node: Node) -> tuple[list[Node], list[Node]]:
        found, quantized = [], packed[planned.site.name].module
        for name, tensor in quantized.named_buffers():
            attribute = f"{planned.site.name}_{name}".replace(".", "_")
            if not hasattr(module, attribute):
                _add_weight(module, attribute, tensor)
            found.append(node.graph.get_attr(attribute))
        count = len(quantized.tensors())
        return found[:count], found[count:]

    rewrite = QuantizeLinear(module_name, {p.site.name: p for p in plan.quantized}, tensors)
    record = run_pass(rewrite, module)
    _remember(plan, packed, record, weights, time.perf_counter() - started)


def _refuse_experts(roles: Mapping[Node, str], values: Mapping[Node, Any]) -> None:
    """UnsupportedError for stacked weights of which a router chooses: their experts must be found in the model."""
    sources = [node.args[1] for node, role in roles.items() if role == "router"]
    choices = {values[source].shape[0] for source in sources if isinstance(source, Node) and source in values}
    for node, value in values.items():
        if isinstance(value, nn.Parameter) and value.dim() == 3 and value.shape[0] in choices:
            raise UnsupportedError(
                f"{node.name} holds weights of {value.shape[0]} experts, which cannot be quantized while compiling: "
                "call qcompile.quantize(model, config) first, and compile what it returns"
            )


def _add_weight(module: GraphModule, name: str, tensor: Tensor) -> None:
    """Give one of Dynamo's graphs another weight; AOTAutograd wants to know where each came from."""
    from torch._dynamo.source import SyntheticLocalSource

    module.register_buffer(name, tensor)
    sources: Any = getattr(module, "_param_name_to_source", None)
    if sources is not None:
        sources[name] = SyntheticLocalSource(name)


def _site(node: Node, values: dict[Node, Any], role: str) -> tuple[Site, Tensor | None]:
    source, bias = node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    weight = values.get(source) if isinstance(source, Node) else None
    name = module_name(node)
    if not isinstance(weight, nn.Parameter) or hasattr(weight, "fake_mode"):
        return Site(name, role, 0, 0, torch.float32, obstacle="its weight is computed in the graph"), None
    tied = "" if len(source.users) == 1 else "another use of its parameter"  # type: ignore[union-attr]
    rows, columns = weight.shape
    return Site(name, role, rows, columns, weight.dtype, has_bias=bias is not None, tied_to=tied), weight


def _pack(planned: PlannedSite, weight: Tensor) -> _Packed:
    """Quantize ``weight`` once per (scheme, method, options, kernel), however many graphs read it."""
    packed = _PACKED.setdefault(weight, {})
    key = (planned.scheme, planned.method, planned.options, planned.kernel)
    if key not in packed:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily():
            if not numerics.is_finite(weight):
                raise ConfigError(f"the weight of {planned.site.name} holds NaN or infinite values")
            packed[key] = _Packed(*quantize_site(planned, weight.detach(), None))
    return packed[key]


def _remember(
    plan: Plan, packed: dict[str, _Packed], record: PassRecord, weights: dict[str, Tensor], seconds: float
) -> None:
    results = tuple(packed[p.site.name].result if p.quantized else SiteResult(p, p.site.float_bytes) for p in plan)
    note = "quantized while compiling: the caller's module keeps its float weights beside the packed ones"
    report = Report("compiled float model", plan, results, seconds=seconds, passes=(record,), notes=(note,))
    remember_float(report, list(weights.values()))
