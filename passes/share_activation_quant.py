"""Quantize an activation once for all of its readers: q, k and v share one, gate and up another.

Neither AOTAutograd nor Inductor merges equal calls of a custom op.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from .base import Result, replace, semantic_name


@dataclass
class ShareActivationQuant:
    """Merges ``qcompile.quantize`` calls on the same tensor."""

    name: str = "share_activation_quant"
    numerics: str = "exact"
    expected: int | None = None

    def __call__(self, module: GraphModule) -> Result:
        """Rewrite ``module.graph``; ``matches`` counts calls that were removed."""
        first: dict[tuple, Node] = {}
        result = Result()
        for node in list(module.graph.nodes):
            if semantic_name(node) != "quantize":
                continue
            x, params, activation = node.args
            kept = first.setdefault((x, tuple(params), activation), node)
            if kept is not node:
                replace(node, kept, self.name)
                result.matches += 1
        return result
