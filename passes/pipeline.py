"""The passes on a compiled graph, in order. To add one: write its file, and one line here."""

from __future__ import annotations

from .base import Pass
from .canonicalize import Canonicalize
from .fuse_gated_act_quant import FuseGatedActQuant
from .fuse_norm_quant import FuseNormQuant
from .lower import Lower
from .pack_activations import PackActivations
from .share_activation_quant import ShareActivationQuant


def compile_passes(decompositions: dict | None = None) -> list[Pass]:
    """Passes from semantic ops to a device's own."""
    return [
        Canonicalize(),
        ShareActivationQuant(),
        PackActivations(),
        FuseNormQuant(),
        FuseGatedActQuant(),
        Lower(decompositions),
    ]
