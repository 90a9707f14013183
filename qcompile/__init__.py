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

if TYPE_CHECKING:
    from .api import dequantize, export, plan, quantize, report
    from .checkpoint import inspect, load, save
    from .config import QuantConfig
    from .conversion import convert
    from .errors import (
        CalibrationError,
        ConfigError,
        FormatError,
        ParallelError,
        PassError,
        QcompileError,
        TraceError,
        UnsupportedError,
    )
    from .huggingface import TransformersConfig
    from .types import Plan, Report, Scheme

_HOME = {
    "api": ("quantize", "plan", "report", "dequantize", "export"),
    "checkpoint": ("save", "load", "inspect"),
    "config": ("QuantConfig",),
    "conversion": ("convert",),
    "huggingface": ("TransformersConfig",),
    "types": ("Plan", "Report", "Scheme"),
    "errors": (
        "QcompileError",
        "ConfigError",
        "TraceError",
        "FormatError",
        "CalibrationError",
        "UnsupportedError",
        "PassError",
        "ParallelError",
    ),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "CalibrationError",
    "ConfigError",
    "FormatError",
    "ParallelError",
    "PassError",
    "Plan",
    "QcompileError",
    "QuantConfig",
    "Report",
    "Scheme",
    "TraceError",
    "TransformersConfig",
    "UnsupportedError",
    "convert",
    "dequantize",
    "export",
    "inspect",
    "load",
    "plan",
    "quantize",
    "report",
    "save",
]


def __getattr__(name: str):
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE[name]}", __name__), name)
    # modules are named otherwise (planning, reporting): importing a submodule would replace the function
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
