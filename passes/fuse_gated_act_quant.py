"""Join a gated activation with the quantization of its result, the input of the down projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from .base import Result, apply_rules
from .fusing import FuseQuantize


@dataclass
class FuseGatedActQuant:
    """``quantize(gated_act(gate, up))``."""

    name: str = "fuse_gated_act_quant"
    level: str = "aot"
    numerics: str = "exact"
    expected: int | None = None

    def __call__(self, module: GraphModule) -> Result:
        """Rewrite ``module.graph``; ``matches`` counts activations."""
        fused = {"gated_act": torch.ops.qcompile.gated_act_quantize.default}
        return apply_rules([FuseQuantize(fused)], module, self.name)
