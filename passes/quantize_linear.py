"""Replace planned Linears of a graph by quantized semantic ops.

``aten.linear`` in an exported graph, ``torch._C._nn.linear`` in Dynamo's; both are one node per Linear, whatever the
rank, dtype or bias.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..sites import LINEARS
from ..types import ActivationType, PlannedSite
from .base import Result, replace


@dataclass
class QuantizeLinear:
    """Rewrites every call of a planned site.

    site_of    maps a linear node to the name of its site, "" for none
    planned    the quantized sites by name; each must be found at least once
    weights    gives the nodes of a site's kernel tensors and of its activations' parameters (inserted before the call
               that is being replaced)
    """

    site_of: Callable[[Node], str]
    planned: Mapping[str, PlannedSite]
    weights: Callable[[PlannedSite, Node], tuple[list[Node], list[Node]]]
    name: str = "quantize_linear"
    level: str = "model"
    numerics: str = "lossy"

    @property
    def expected(self) -> int:
        """Every planned site."""
        return len(self.planned)

    def __call__(self, module: GraphModule) -> Result:
        """Rewrite ``module.graph``; ``matches`` counts sites, a site that is called twice once."""
        found, result = set(), Result()
        for node in list(module.graph.nodes):
            if node.op != "call_function" or node.target not in LINEARS:
                continue
            planned = self.planned.get(self.site_of(node))
            if planned is None:
                continue
            with module.graph.inserting_before(node):
                replace(node, self._quantized_call(node, planned), self.name)
            found.add(planned.site.name)
        missing = [name for name in self.planned if name not in found]
        result.rejected += [(name, "no linear node of the graph belongs to this site") for name in missing]
        result.matches = len(found)
        return result

    def _quantized_call(self, node: Node, planned: PlannedSite) -> Node:
        graph, scheme = node.graph, planned.scheme
        assert scheme is not None
        x, bias = node.args[0], node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        weights, params = self.weights(planned, node)
        common = (weights, bias, str(scheme), planned.kernel, planned.site.out_features)
        dtype = planned.site.dtype
        if scheme.activation is None:
            new = graph.call_function(torch.ops.qcompile.linear.default, (x, *common))
        else:
            parts = quantized_input(node, x, params, scheme.activation)
            new = graph.call_function(torch.ops.qcompile.scaled_linear.default, (parts, *common, dtype))
        _carry_stack(node, new)
        return new


def quantized_input(node: Node, x: Any, params: list[Node], activation: ActivationType) -> list[Node]:
    """Nodes before ``node`` that quantize its input ``x``: what ``scaled_linear`` takes."""
    graph = node.graph
    parts = graph.call_function(torch.ops.qcompile.quantize.default, (x, params, str(activation)))
    items = [graph.call_function(operator.getitem, (parts, i)) for i in range(activation.parts)]
    _carry_stack(node, parts, *items)
    if isinstance(x, Node) and isinstance(value := x.meta.get("val"), torch.Tensor):
        values = [param.meta["val"] for param in params]
        parts.meta["val"] = torch.ops.qcompile.quantize.default(value, values, str(activation))
        for item, fake in zip(items, parts.meta["val"], strict=True):
            item.meta["val"] = fake
    return items if activation.dynamic else [*items, *params]


def _carry_stack(old: Node, *new: Node) -> None:
    for node in new:
        if "nn_module_stack" in old.meta:
            node.meta["nn_module_stack"] = old.meta["nn_module_stack"]
