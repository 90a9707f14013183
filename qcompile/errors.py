"""The errors of qcompile: one small tree, so that a caller can tell whose fault it is.

Every message says what was wrong, where, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QcompileError(Exception):
    """Base of everything that qcompile raises on purpose."""


class ConfigError(QcompileError, ValueError):
    """What the user asked for is not well-formed, or names something that does not exist."""


class TraceError(QcompileError, RuntimeError):
    """The model could not be turned into a graph."""


class FormatError(QcompileError, ValueError):
    """A checkpoint, a file or a tensor is not what its format says."""


class CalibrationError(QcompileError, RuntimeError):
    """Weights or calibration data cannot be quantized as they are."""


class UnsupportedError(QcompileError, RuntimeError):
    """The request is well-formed, but this device, kernel or model cannot do it."""


class PassError(QcompileError, RuntimeError):
    """A pass broke its contract, or a graph holds what it must not hold."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'? Known: a, b.`` for an error about an unknown name."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(names) or 'none'}."
