"""Fold a smoothing scale into what makes a Linear's input: ``(x / s) @ (W * s).T`` costs nothing more than ``x @ W.T``.

A value's columns are divided where they are made, in the weight of a norm or in the rows of an earlier Linear, and the
weights of every Linear that reads the value, and of experts, are multiplied. Which parameters these are is found by
dataflow in the exported graph (``foldings``); nothing is known about any architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .. import gates
from ..errors import CalibrationError
from ..sites import LINEARS, is_experts, module_name, plain_name
from .base import Result, described
from .matching import op
from .producers import Source, find_source, readers, stripped


@dataclass(frozen=True)
class Folding:
    """A value whose columns can be scaled: the ``sites`` that read it, and where the reciprocal goes.

    sites    names of what reads it: Linears, and projections of experts; ``weights``: their parameters, whose last axis
             is multiplied (those of experts as ``float_experts.fuse`` makes them, [experts, out, in])
    source   the parameters that make it; ``source.rows`` names the producing channel of each column
    experts  of a value inside of experts, how many there are, each with a scale of its own; else 0
    """

    sites: tuple[str, ...]
    weights: tuple[str, ...]
    source: Source
    experts: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a scale: [in], or [experts, in]."""
        return (self.experts, len(self.source.rows)) if self.experts else (len(self.source.rows),)

    def missing(self, model: nn.Module) -> str:
        """A parameter that ``model`` does not hold, because its experts are not fused; else ""."""
        known = dict(model.named_parameters(remove_duplicate=False))
        return next(
            (name for name in (self.source.weight, *self.source.biases, *self.weights) if name not in known), ""
        )

    def shared(self, scale: Tensor) -> Tensor:
        """``scale`` with one number, the largest, for columns that come from the same channel (grouped heads)."""
        if self.experts:
            return scale
        rows = self.source.rows.to(scale.device)
        largest = scale.new_full((int(rows.max()) + 1,), -torch.inf)
        return largest.scatter_reduce(0, rows, scale, "amax")[rows]

    def storable(self, model: nn.Module, scale: Tensor) -> Tensor:
        """The scale near ``scale`` by which a norm's weight can be divided without rounding in its dtype.

        Then nothing is lost but in what is multiplied. ``scale`` itself for rows of a Linear.
        """
        weight = model.get_parameter(self.source.weight).detach()
        if weight.dim() > 1:
            return scale
        rows, offset = self.source.rows.to(weight.device), self.source.offset
        exact = (weight.float() + offset)[rows]
        stored = (exact / scale - offset).to(weight.dtype).float() + offset
        found = exact / stored
        usable = torch.isfinite(found) & (found > 0.5 * scale) & (found < 2 * scale)
        return torch.where(usable, found, scale)


def foldings(module: GraphModule) -> tuple[list[Folding], list[tuple[tuple[str, ...], str]]]:
    """The values of an exported graph that Linears and experts read: those that can be scaled; (sites, why not) of the
    others, among them the values between the two projections of experts.
    """
    found: list[Folding] = []
    refused: list[tuple[tuple[str, ...], str]] = []
    experts = [node for node in module.graph.nodes if is_experts(node)]
    for node in experts:
        answer = _inside(node)
        if isinstance(answer, str):
            refused.append(((_projection(node.args[5]),), answer))
        else:
            found.append(answer)
    for value in _values(module):
        around = list(readers(value))
        linears = [user for user in around if _is_linear_of(user, value)]
        sites = tuple(dict.fromkeys(_site(node) for node in linears))
        answer = _folding(value, around, linears, sites)
        if isinstance(answer, str):
            refused.append((sites, answer))
        else:
            found.append(answer)
    return found, refused


@dataclass
class FoldScales:
    """Folds ``scales`` (by the name of any site that reads the value, one per input column) into ``model``.

    The graph names the parameters and is not changed; those of ``model`` are, in place. Scales of one value must be
    given once. CalibrationError for a scale that is not positive and finite, has another length, or differs between
    columns that come from the same channel (see ``Folding.shared``): nothing has been changed then. What was folded is
    removed from ``scales``: the pass does not fold it again.
    """

    model: nn.Module
    scales: Mapping[str, Tensor]
    name: str = "fold_scales"
    level: str = "model"
    numerics: str = "reorder"

    @property
    def expected(self) -> int:
        """Every scale."""
        return len(self.scales)

    def __call__(self, module: GraphModule) -> Result:
        """``matches`` counts the scales that were folded; those that cannot be are rejected with the reason."""
        result = Result()
        found, refused = foldings(module)
        by_site = {site: folding for folding in found for site in folding.sites}
        reasons = {site: reason for sites, reason in refused for site in sites}
        jobs = []
        for site, scale in self.scales.items():
            if site in by_site and (missing := by_site[site].missing(self.model)):
                result.rejected.append((site, f"the model holds no parameter {missing}: its experts are not fused"))
            elif site in by_site:
                jobs.append((by_site[site], _checked(site, scale, by_site[site])))
            else:
                result.rejected.append((site, reasons.get(site, "no Linear of the graph has this name")))
        if len({id(folding) for folding, _ in jobs}) < len(jobs):
            raise CalibrationError(f"of {', '.join(self.scales)}, several read the same value: give its scale once")
        if not result.rejected:
            for folding, scale in jobs:
                fold(self.model, folding, scale)
            result.matches = len(jobs)
            self.scales = {}
        return result


@torch.no_grad()
def fold(model: nn.Module, folding: Folding, scale: Tensor, exact: dict[str, Tensor] | None = None) -> None:
    """Divide the producer by ``scale`` ([in], or [experts, in]) and multiply its readers; in float32, in place.

    Parameters are rounded to their dtype. exact: float32 values by name of what was folded before, unrounded; they are
    read, and set for every parameter that is folded now.
    """
    exact = {} if exact is None else exact
    source = folding.source
    scale = scale.float()

    def put(name: str, value: Tensor) -> None:
        exact[name] = value
        model.get_parameter(name).copy_(value)

    def value_of(name: str) -> Tensor:
        return exact[name] if name in exact else model.get_parameter(name).float()

    for name in (source.weight, *source.biases):
        value, offset = value_of(name), source.offset if name == source.weight else 0.0
        channel = scale.new_ones((*scale.shape[:-1], value.shape[scale.dim() - 1]))
        channel[..., source.rows.to(scale.device)] = scale
        divisor = channel.view(*channel.shape, *[1] * (value.dim() - channel.dim())).to(value.device)
        put(name, (value + offset) / divisor - offset)
    for name in folding.weights:
        value = value_of(name)
        put(name, value * scale[..., None, :].to(value.device))


def _values(module: GraphModule) -> Iterable[Node]:
    """What Linears and experts read, before reshapes; in order."""
    products = [node for node in module.graph.nodes if node.op == "call_function" and _is_product(node)]
    return dict.fromkeys(stripped(node.args[0]) for node in products)


def _is_product(node: Node) -> bool:
    return node.target in LINEARS or is_experts(node)


def _is_linear_of(node: Node, value: Node) -> bool:
    return _is_product(node) and stripped(node.args[0]) is value  # type: ignore[arg-type]


def _site(node: Node) -> str:
    """Name of the site that reads the first argument of a product."""
    return _projection(node.args[3]) if is_experts(node) else module_name(node)


def _projection(weight: Any) -> str:
    """Name of the site of experts whose weight the get_attr node ``weight`` is."""
    return plain_name(str(weight.target))


def _inside(node: Node) -> Folding | str:
    """The value between the two projections of experts: the rows of up, after those of gate, are divided."""
    up, up_bias, down, activation = node.args[3], node.args[4], node.args[5], str(node.args[7])
    gate = gates.parse(activation)
    if not gate.is_gated or gate.limit is not None or gate.shift:
        return f"the experts compute {activation}, which is not linear in the up projection"
    for weight in (up, down):
        if (times := _uses(node.graph.owning_module, _projection(weight))) > 1:
            return f"{_projection(weight)} is used {times} times"
    shape = down.meta["val"].shape  # type: ignore[union-attr]
    inner = int(shape[-2] if node.args[8] else shape[-1])
    name = _projection(up)
    biases = () if up_bias is None else (f"{name}.bias",)
    source = Source(f"{name}.weight", torch.arange(inner, 2 * inner), biases)
    return Folding((_projection(down),), (f"{_projection(down)}.weight",), source, int(shape[0]))


def _folding(value: Node, around: list[Node], linears: list[Node], sites: tuple[str, ...]) -> Folding | str:
    other = next((user for user in around if user not in linears), None)
    if other is not None:
        return f"{described(other)}, a {op(other) or other.op}, reads it as well"
    source = find_source(value)
    if isinstance(source, str):
        return source
    weights, names = [], []
    for node in linears:
        if is_experts(node):
            names.append(_site(node))
            weights.append(f"{_site(node)}.weight")
            continue
        weight = node.args[1]
        while op(weight) in ("to", "_to_copy"):
            weight = weight.args[0]  # type: ignore[union-attr]
        if not isinstance(weight, Node) or weight.op != "get_attr":
            return f"the weight of {described(node)} is computed"
        weights.append(plain_name(str(weight.target)))
        names.append(weights[-1])
    for name in (source.weight, *source.biases, *names):
        times = _uses(value.graph.owning_module, name)
        if times > 1:
            return f"{name} is used {times} times"
    return Folding(sites, tuple(weights), source)


def _uses(module: GraphModule | None, name: str) -> int:
    """How often a graph reads the parameter ``name``."""
    assert module is not None
    nodes = [n for n in module.graph.nodes if n.op == "get_attr" and plain_name(str(n.target)) == name]
    return sum(len([user for user in node.users if op(user) != "_assert_tensor_metadata"]) for node in nodes)


def _checked(site: str, scale: Tensor, folding: Folding) -> Tensor:
    if tuple(scale.shape) != folding.shape:
        raise CalibrationError(f"the scale of {site} must have shape {list(folding.shape)}, not {list(scale.shape)}")
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise CalibrationError(f"the scale of {site} must be positive and finite; it is divided by")
    if not torch.equal(folding.shared(scale), scale):
        raise CalibrationError(
            f"columns of {site} that come from the same channel of {folding.source.weight} must have the same scale; "
            "Folding.shared(scale) gives them the largest"
        )
    return scale
