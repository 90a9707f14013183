"""Replace the experts of layers that hold quantized projections by ``qcompile::quant_experts``, one node each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..modules import Projection, QuantExperts
from ..ops import FLOAT
from ..sites import is_experts
from .base import Result, replace
from .quantize_linear import _carry_stack, quantized_input


@dataclass
class QuantizeExperts:
    """Rewrites ``qcompile::experts`` in an exported graph.

    name_of   maps such a node to the name of its experts
    modules   the experts by name; each must be found at least once
    nodes     gives the nodes of tensors of a projection (named as in the module), inserted before a node
    """

    name_of: Callable[[Node], str]
    modules: Mapping[str, QuantExperts]
    nodes: Callable[[Projection, Sequence[Tensor], Node], list[Node]]
    name: str = "quantize_experts"
    level: str = "model"
    numerics: str = "lossy"

    @property
    def expected(self) -> int:
        """Every layer."""
        return len(self.modules)

    def __call__(self, module: GraphModule) -> Result:
        """Rewrite ``module.graph``; ``matches`` counts layers."""
        found, result = set(), Result()
        for node in [node for node in module.graph.nodes if is_experts(node)]:
            name = self.name_of(node)
            if name in self.modules:
                with module.graph.inserting_before(node):
                    replace(node, self._call(node, self.modules[name]), self.name)
                found.add(name)
        missing = [name for name in self.modules if name not in found]
        result.rejected += [(name, "no node of the graph marks these experts") for name in missing]
        result.matches = len(found)
        return result

    def _call(self, node: Node, experts: QuantExperts) -> Node:
        x, ids, routing = node.args[:3]
        parts: list[Any] = [x]
        operands: list[Any] = []
        for i, part in enumerate((experts.up, experts.down)):
            weights, params, bias = (
                self.nodes(part, tensors, node)
                for tensors in (part.tensors(), part.params(), [] if part.bias is None else [part.bias])
            )
            operands += [weights, bias[0] if bias else None, params]
            kind = part.scheme.activation if part.scheme else None
            if i == 0 and kind is not None and not kind.params:
                parts = quantized_input(node, x, [], kind)
        schemes = "|".join(str(part.scheme or FLOAT) for part in (experts.up, experts.down))
        kernels = f"{experts.up.kernel}|{experts.down.kernel}"
        sizes = [experts.up.shape[0], experts.up.in_features, experts.down.in_features]
        new = node.graph.call_function(
            torch.ops.qcompile.quant_experts.default,
            (parts, ids, routing, *operands, schemes, kernels, experts.activation, sizes, node.meta["val"].dtype),
        )
        _carry_stack(node, new)
        return new
