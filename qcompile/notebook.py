"""What a notebook shows of a quantized model: its report."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def show_reports() -> None:
    """In a notebook, have a quantized model shown as its report; elsewhere do nothing."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None:
        shell.display_formatter.formatters["text/html"].for_type(nn.Module, _html)


def _html(model: nn.Module) -> str | None:
    """The report of a model that qcompile quantized; None leaves others to ``repr``."""
    from .api import report
    from .modules import state_of

    original = getattr(model, "_orig_mod", model)
    return report(original)._repr_html_() if state_of(original) is not None else None
