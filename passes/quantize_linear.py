"""Replace planned Linears of a graph by quantized semantic ops.

``aten.linear`` in an exported graph, ``torch._C._nn.linear`` in Dynamo's; both are one node per Linear, whatever the
rank, dtype or bias.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ..sites import LINEARS
from ..types import PlannedSite
from .base import Result, replace


@dataclass
class QuantizeLinear:
    """Rewrites every call of a planned site.

    site_of    maps a linear node to the name of its site, "" for none
    planned    the quantized sites by name; each must be found at least once
    weights    gives the nodes of a site's kernel tensors (inserted before the call that is being replaced)
    """

    site_of: Callable[[Node], str]
    planned: Mapping[str, PlannedSite]
    weights: Callable[[PlannedSite, Node], list[Node]]
    name: str = "quantize_linear"
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
        weights = self.weights(planned, node)
        common = (weights, bias, str(scheme), planned.kernel, planned.site.out_features)
        dtype = planned.site.dtype
        if scheme.activation is None:
            new = graph.call_function(torch.ops.qcompile.linear.default, (x, *common))
        else:
            pair = graph.call_function(torch.ops.qcompile.quantize.default, (x,))
            codes, scale = (graph.call_function(operator.getitem, (pair, i)) for i in range(2))
            new = graph.call_function(torch.ops.qcompile.scaled_linear.default, (codes, scale, *common, dtype))
            _carry_stack(node, pair, codes, scale)
            if isinstance(x, Node) and isinstance(value := x.meta.get("val"), torch.Tensor):
                pair.meta["val"] = torch.ops.qcompile.quantize.default(value)
                codes.meta["val"], scale.meta["val"] = pair.meta["val"]
        _carry_stack(node, new)
        return new


def _carry_stack(old: Node, *new: Node) -> None:
    for node in new:
        if "nn_module_stack" in old.meta:
            node.meta["nn_module_stack"] = old.meta["nn_module_stack"]
