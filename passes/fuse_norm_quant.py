"""Join a norm with the quantization of its result, so that a device makes both in one pass over each row.

Somebody else may read the float result, as the router of a mixture of experts does: it is then kept beside the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from .base import Result, apply_rules
from .fusing import FuseQuantize


@dataclass
class FuseNormQuant:
    """``quantize(rms_norm(x))``, with or without a residual addition before it."""

    name: str = "fuse_norm_quant"
    level: str = "aot"
    numerics: str = "exact"
    expected: int | None = None

    def __call__(self, module: GraphModule) -> Result:
        """Rewrite ``module.graph``; ``matches`` counts norms."""
        ops = torch.ops.qcompile
        fused = {"rms_norm": ops.rms_norm_quantize.default, "add_rms_norm": ops.add_rms_norm_quantize.default}
        return apply_rules([FuseQuantize(fused)], module, self.name)
