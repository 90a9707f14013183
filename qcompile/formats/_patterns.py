"""Regular expressions in the config of a checkpoint, which anybody may have written."""

from __future__ import annotations

import regex

from ..errors import FormatError

LIMIT = 1.0
"""Seconds for one name; an ordinary expression takes some microseconds, nested repetitions may take for ever."""


def matches(pattern: str, name: str, where: str, *, anywhere: bool = False) -> bool:
    """Whether ``pattern``, found at ``where`` in config.json, matches the beginning of ``name``, or any part of it.

    FormatError for what is not a regular expression, and for one that takes longer than LIMIT.
    """
    find = regex.search if anywhere else regex.match
    try:
        return find(pattern, name, timeout=LIMIT) is not None
    except regex.error as error:
        raise FormatError(f"config.json: {pattern!r} of {where} is not a regular expression: {error}") from None
    except TimeoutError:
        raise FormatError(
            f"config.json: the regular expression {pattern!r} of {where} takes more than {LIMIT:g} s for {name!r}; "
            "write it without repetitions in repetitions"
        ) from None
