"""The errors of qcompile: one small tree, so that a caller can tell whose fault it is.

Every message says what was wrong, where, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
import re
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


class ParallelError(QcompileError, RuntimeError):
    """The ranks of a mesh do not agree, or one of them is gone."""


class PassError(QcompileError, RuntimeError):
    """A pass broke its contract, or a graph holds what it must not hold."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'? Known: a, b.`` for an error about an unknown name."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(names) or 'none'}."


def shortened(names: Iterable[str], limit: int = 8) -> str:
    """Sorted names for a message: those that differ in one number as a range, the rest of a long list as a count.

    ``experts.3.down``, ``experts.4.down``, ``experts.7.down`` are ``experts.3-4,7.down``.
    """
    parts = {tuple(re.split(r"(\d+)", name)) for name in names}  # text and numbers in turn
    for place in range(max(map(len, parts), default=0) - 2, 0, -2):
        alike: dict[tuple[str, ...], set[str]] = {}
        for part in parts:
            others = (*part[:place], "", *part[place + 1 :]) if place < len(part) else part
            alike.setdefault(others, set()).add(part[place] if place < len(part) else "")
        parts = {
            (*others[:place], _ranges(seen), *others[place + 1 :]) if place < len(others) else others
            for others, seen in alike.items()
        }
    ordered = sorted("".join(part) for part in parts)
    return ", ".join(ordered[:limit]) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")


def _ranges(numbers: set[str]) -> str:
    """Numbers, or ranges of an earlier turn, as one text: 0-2,5."""
    if not all(map(str.isdigit, numbers)):
        return ",".join(sorted(numbers))
    runs: list[list[str]] = []
    for number in sorted(numbers, key=int):
        if runs and int(number) == int(runs[-1][1]) + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join("-".join(dict.fromkeys(run)) for run in runs)
