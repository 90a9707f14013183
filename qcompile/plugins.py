"""Finding methods, formats and backends by name: built-ins by file name, others by entry point.

    [project.entry-points."qcompile.methods"]
    my_method = "my_package.my_module"

A plug-in is a module (methods and formats: one object named like its kind, ``METHOD`` or ``FORMAT``; backends:
``BACKEND``). An import error inside a plug-in is raised, never swallowed.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from .errors import ConfigError, did_you_mean

_OBJECTS = {"methods": "METHOD", "formats": "FORMAT", "backends": "BACKEND"}


@functools.cache
def names(group: str) -> tuple[str, ...]:
    """Names of all plug-ins of a group ("methods", "formats" or "backends")."""
    package = importlib.import_module(f"{__package__}.{group}")
    built_in = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]
    return tuple(sorted({*built_in, *(e.name for e in entry_points(group=f"qcompile.{group}"))}))


@functools.cache
def find(group: str, name: str) -> Any:
    """The plug-in ``name`` of ``group``; raises ConfigError with the known names."""
    if name not in names(group):
        raise ConfigError(f"unknown {group[:-1]} {name!r}.{did_you_mean(name, names(group))}")
    for entry in entry_points(group=f"qcompile.{group}"):
        if entry.name == name:
            return _object(entry.load(), group)
    return _object(importlib.import_module(f"{__package__}.{group}.{name}"), group)


def _object(loaded: Any, group: str) -> Any:
    return getattr(loaded, _OBJECTS[group]) if isinstance(loaded, ModuleType) else loaded
