"""Fold a smoothing scale into what makes a Linear's input: ``(x / s) @ (W * s).T`` costs nothing more than ``x @ W.T``.

A value's columns are divided where they are made, in the weight of a norm or in the rows of an earlier Linear, and the
weights of every Linear that reads the value are multiplied. Which parameters these are is found by dataflow in the
exported graph (``foldings``); nothing is known about any architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..errors import CalibrationError
from ..sites import LINEARS, module_name, plain_name
from .base import Result, described
from .matching import op
from .producers import Source, find_source, readers, stripped


@dataclass(frozen=True)
class Folding:
    """A value whose columns can be scaled: the ``sites`` that read it, and where the reciprocal goes.

    sites    names of the modules that read it; ``weights``: their parameters, whose axis 1 is multiplied
    source   the parameters that make it; ``source.rows`` names the producing channel of each column
    """

    sites: tuple[str, ...]
    weights: tuple[str, ...]
    source: Source

    def shared(self, scale: Tensor) -> Tensor:
        """``scale`` with one number, the largest, for columns that come from the same channel (grouped heads)."""
        largest = torch.full((int(self.source.rows.max()) + 1,), -torch.inf, dtype=scale.dtype)
        return largest.scatter_reduce(0, self.source.rows, scale, "amax")[self.source.rows]


def foldings(module: GraphModule) -> tuple[list[Folding], list[tuple[tuple[str, ...], str]]]:
    """The values of an exported graph that Linears read: those that can be scaled; (sites, why not) of the others."""
    found, refused = [], []
    for value in _values(module):
        around = list(readers(value))
        linears = [user for user in around if _is_linear_of(user, value)]
        sites = tuple(dict.fromkeys(module_name(node) for node in linears))
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
            if site in by_site:
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
def fold(model: nn.Module, folding: Folding, scale: Tensor) -> None:
    """Divide the producer by ``scale`` [in] and multiply its readers; in float32, rounded once, in place."""
    source = folding.source
    weight = model.get_parameter(source.weight)
    channel = torch.ones(weight.shape[0]).index_put((source.rows,), scale.float().cpu()).to(weight.device)
    for name in (source.weight, *source.biases):
        parameter, offset = model.get_parameter(name), source.offset if name == source.weight else 0.0
        divisor = channel.view(-1, *[1] * (parameter.dim() - 1))
        parameter.copy_((parameter.float() + offset) / divisor - offset)
    for name in folding.weights:
        parameter = model.get_parameter(name)
        parameter.copy_(parameter.float() * scale.float().to(parameter.device))


def _values(module: GraphModule) -> Iterable[Node]:
    """What Linears read, before reshapes; in order."""
    linears = [node for node in module.graph.nodes if node.op == "call_function" and node.target in LINEARS]
    return dict.fromkeys(stripped(node.args[0]) for node in linears)


def _is_linear_of(node: Node, value: Node) -> bool:
    return node.target in LINEARS and stripped(node.args[0]) is value  # type: ignore[arg-type]


def _folding(value: Node, around: list[Node], linears: list[Node], sites: tuple[str, ...]) -> Folding | str:
    other = next((user for user in around if user not in linears), None)
    if other is not None:
        return f"{described(other)}, a {op(other) or other.op}, reads it as well"
    source = find_source(value)
    if isinstance(source, str):
        return source
    weights = []
    for node in linears:
        weight = node.args[1]
        while op(weight) in ("to", "_to_copy"):
            weight = weight.args[0]  # type: ignore[union-attr]
        if not isinstance(weight, Node) or weight.op != "get_attr":
            return f"the weight of {described(node)} is computed"
        weights.append(plain_name(str(weight.target)))
    for name in (source.weight, *source.biases, *weights):
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
    rows = folding.source.rows
    if tuple(scale.shape) != tuple(rows.shape):
        raise CalibrationError(f"the scale of {site} must have shape {list(rows.shape)}, not {list(scale.shape)}")
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise CalibrationError(f"the scale of {site} must be positive and finite; it is divided by")
    if not torch.equal(folding.shared(scale), scale):
        raise CalibrationError(
            f"columns of {site} that come from the same channel of {folding.source.weight} must have the same scale; "
            "Folding.shared(scale) gives them the largest"
        )
    return scale
