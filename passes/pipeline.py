"""The passes on a compiled graph, in order. To add one: write its file, and one line here."""

from __future__ import annotations

from .base import Pass
from .lower import Lower
from .share_activation_quant import ShareActivationQuant


def compile_passes(decompositions: dict | None = None) -> list[Pass]:
    """Passes from semantic ops to a device's own."""
    return [
        ShareActivationQuant(),
        Lower(decompositions),
    ]
