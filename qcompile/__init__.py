"""qcompile: quantized models through the compiler, on any device.

    model = qcompile.quantize(model, "rtn", device="cpu")
    print(qcompile.report(model))
    model = torch.compile(model, backend="qcompile")

The public names are loaded on first use, so that ``import qcompile`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "quantize": "api",
    "plan": "api",
    "report": "api",
    "dequantize": "api",
    "export": "api",
    "save": "checkpoint",
    "load": "checkpoint",
    "inspect": "checkpoint",
    "QuantConfig": "config",
    "Plan": "types",
    "Report": "types",
    "Scheme": "types",
    "QcompileError": "errors",
    "ConfigError": "errors",
    "TraceError": "errors",
    "FormatError": "errors",
    "CalibrationError": "errors",
    "UnsupportedError": "errors",
    "PassError": "errors",
}

__all__ = [*_HOME, "__version__"]  # noqa: PLE0604

if TYPE_CHECKING:
    from .api import dequantize, export, plan, quantize, report
    from .checkpoint import inspect, load, save
    from .config import QuantConfig
    from .errors import (
        CalibrationError,
        ConfigError,
        FormatError,
        PassError,
        QcompileError,
        TraceError,
        UnsupportedError,
    )
    from .types import Plan, Report, Scheme


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    # modules are named otherwise (planning, reporting): importing a submodule would replace the function
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
