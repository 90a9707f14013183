"""The passes on a compiled graph, in order. To add one: write its file, and one line here.

Users add theirs by ``torch.compile(model, backend="qcompile", options={"passes": [...]})``: an object (or a class) that
is a ``Pass``, the name of one that a package installs under the entry point group ``qcompile.passes``, or "-name" to
leave one of ours out. A pass of theirs runs before the one that its attribute ``before`` names, otherwise before
"lower".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

from ..errors import ConfigError, did_you_mean
from .attend_shared_heads import AttendSharedHeads
from .base import Pass
from .canonicalize import Canonicalize
from .fuse_gated_act_quant import FuseGatedActQuant
from .fuse_norm_quant import FuseNormQuant
from .lower import Lower
from .merge_linears import MergeLinears
from .pack_activations import PackActivations
from .share_activation_quant import ShareActivationQuant

BUILT_IN: tuple[Callable[[], Pass], ...] = (
    Canonicalize, ShareActivationQuant, PackActivations, MergeLinears, FuseNormQuant, FuseGatedActQuant,
    AttendSharedHeads,
)  # fmt: skip


def compile_passes(decompositions: dict | None = None, asked: Sequence[Any] = ()) -> list[Pass]:
    """Passes from semantic ops to a device's own; ``asked`` is what the option "passes" holds.

    ConfigError for a name that does not exist and for an object that is no pass.
    """
    passes: list[Pass] = [*(make() for make in BUILT_IN), Lower(decompositions)]
    for item in asked:
        if isinstance(item, str) and item.startswith("-"):
            _leave_out(passes, item[1:])
        else:
            added = _installed(item) if isinstance(item, str) else item() if isinstance(item, type) else item
            _check(added)
            names = [pass_.name for pass_ in passes]
            place = getattr(added, "before", "lower")
            if place not in names:
                raise ConfigError(f"pass {added.name!r} wants to run before {place!r}.{did_you_mean(place, names)}")
            passes.insert(names.index(place), added)
    return passes


def _leave_out(passes: list[Pass], name: str) -> None:
    names = [pass_.name for pass_ in passes[:-1]]
    if name == "lower":
        raise ConfigError("the pass 'lower' cannot be left out: nothing else makes operations of a device")
    if name not in names:
        raise ConfigError(f"there is no pass {name!r} to leave out.{did_you_mean(name, names)}")
    del passes[names.index(name)]


def _installed(name: str) -> Pass:
    found = {entry.name: entry for entry in entry_points(group="qcompile.passes")}
    if name not in found:
        known = did_you_mean(name, found)
        raise ConfigError(f"no installed package offers a pass {name!r} (entry points 'qcompile.passes').{known}")
    loaded = found[name].load()
    return loaded() if isinstance(loaded, type) else loaded


def _check(added: Any) -> None:
    missing = [name for name in ("name", "level", "numerics", "expected") if not hasattr(added, name)]
    if missing or not callable(added):
        what = f"it has no {', '.join(missing)}" if missing else "it cannot be called with a graph module"
        raise ConfigError(
            f"{added!r} is no pass: {what}. A pass has a name, a level ('aot'), numerics ('exact', 'reorder' or "
            "'lossy'), expected matches (or None), and is called with a GraphModule; see qcompile.passes.base.Pass"
        )
    if added.numerics not in ("exact", "reorder", "lossy"):
        raise ConfigError(f"pass {added.name!r} declares numerics {added.numerics!r}, not exact, reorder or lossy")
