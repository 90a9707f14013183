"""Run a pass and hold it to its contract: a sound graph, the expected matches, the same outputs, nothing left over."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import GraphModule

from .errors import PassError
from .types import PassRecord

if TYPE_CHECKING:
    from .passes.base import Pass

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-10}
"""Largest deviation, relative to the largest value of the output, that a change of summation order may cause."""


def run_pass(pass_: Pass, module: GraphModule, probe: Sequence[Tensor] | None = None) -> PassRecord:
    """Apply ``pass_`` to ``module`` and check what it declares; PassError says which check failed and where.

    Shapes and dtypes of every replaced value are checked by ``passes.base.replace``. With ``probe`` inputs the graph
    is also run before and after: bit for bit for "exact" passes, within TOLERANCE for "reorder".
    """
    from .passes.base import signature

    before = [signature(node.meta.get("val")) for node in _outputs(module)]
    reference = copy.deepcopy(module) if probe is not None and pass_.numerics != "lossy" else None
    nodes_before = len(module.graph.nodes)
    result = pass_(module)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()

    if pass_.expected is not None and result.matches != pass_.expected:
        raise PassError(
            f"pass {pass_.name} matched {result.matches} of {pass_.expected}: "
            + ("; ".join(f"{node}: {why}" for node, why in result.rejected) or "nothing came close")
        )
    after = [signature(node.meta.get("val")) for node in _outputs(module)]
    if before != after:
        raise PassError(f"pass {pass_.name} changed the graph's outputs from {before} to {after}")
    if reference is not None and probe is not None:
        _replay(pass_, module, reference, probe)
    return PassRecord(
        pass_.name, pass_.numerics, result.matches, nodes_before, len(module.graph.nodes), tuple(result.rejected)
    )


def no_semantic_ops_left(module: GraphModule, rejected: Sequence[tuple[str, str]] = ()) -> None:
    """PassError that names every ``qcompile::`` op in ``module`` or in a graph inside it."""
    from .passes.base import described, semantic_name

    left = []
    for graph_module in module.modules():
        if isinstance(graph_module, GraphModule):
            left += [f"{semantic_name(n)} at {described(n)}" for n in graph_module.graph.nodes if semantic_name(n)]
    if left:
        reasons = "; ".join(f"{node}: {why}" for node, why in rejected)
        raise PassError(f"after lowering, these semantic ops are left: {', '.join(left)}. {reasons}")


def close(actual: Tensor, expected: Tensor, factor: float = 1.0) -> bool:
    """Whether ``actual`` is within ``factor`` times the tolerance of its dtype of ``expected``."""
    limit = TOLERANCE[actual.dtype] * factor * max(expected.abs().max().item(), 1e-30) if expected.numel() else 0.0
    return not expected.numel() or (actual.double() - expected.double()).abs().max().item() <= limit


def _outputs(module: GraphModule) -> list[torch.fx.Node]:
    leaves = torch.utils._pytree.tree_leaves(module.graph.output_node().args)
    return [leaf for leaf in leaves if isinstance(leaf, torch.fx.Node)]


def _replay(pass_: Pass, module: GraphModule, reference: GraphModule, probe: Sequence[Tensor]) -> None:
    leaves = torch.utils._pytree.tree_leaves
    with torch.no_grad():
        results, expected = leaves(module(*probe)), leaves(reference(*probe))
    for i, (got, want) in enumerate(zip(results, expected, strict=True)):
        if not isinstance(want, Tensor):
            continue
        same = torch.equal(got, want) if pass_.numerics == "exact" or not want.is_floating_point() else close(got, want)
        if not same:
            raise PassError(
                f"pass {pass_.name} promises numerics {pass_.numerics!r}, but output {i} changed on the probe"
            )
