"""What was compiled in this process, remembered by the tensors it reads, so that a report can tell."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor, nn

from .types import GraphRecord, Report

_GRAPHS: list[tuple[GraphRecord, tuple[weakref.ref[Tensor], ...]]] = []
_FLOAT_REPORTS: list[tuple[Report, tuple[weakref.ref[Tensor], ...]]] = []


def remember_graph(record: GraphRecord, tensors: Sequence[Tensor]) -> None:
    """Keep the record of one compilation that reads ``tensors``."""
    _GRAPHS.append((record, tuple(weakref.ref(t) for t in tensors)))


def remember_float(report: Report, tensors: Sequence[Tensor]) -> None:
    """Keep the report about a float model whose ``tensors`` were packed during compilation."""
    _FLOAT_REPORTS.append((report, tuple(weakref.ref(t) for t in tensors)))


def graphs_of(model: nn.Module) -> tuple[GraphRecord, ...]:
    """Compilations that read a parameter or buffer of ``model``, oldest first."""
    mine = _identities(model)
    return tuple(record for record, references in _GRAPHS if _shares(references, mine))


def report_of_compiled_float(model: nn.Module) -> Report | None:
    """The report about a float model that was compiled with a config; None if it was not."""
    mine = _identities(model)
    for report, references in reversed(_FLOAT_REPORTS):
        if _shares(references, mine):
            return report.with_graphs(graphs_of(model))
    return None


def _identities(model: nn.Module) -> set[int]:
    return {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}


def _shares(references: Sequence[weakref.ref[Tensor]], mine: set[int]) -> bool:
    return any((tensor := reference()) is not None and id(tensor) in mine for reference in references)
