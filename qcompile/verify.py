"""Run a pass and hold it to its contract: a sound graph, the expected matches, the same outputs, nothing left over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .errors import PassError, QcompileError
from .types import PassRecord

if TYPE_CHECKING:
    from .passes.base import Pass

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-10}
"""Largest deviation, relative to the largest value of the output, that a change of summation order may cause."""

STEPS = 5e-2
"""The same in norm where activations are quantized: a difference of rounding before may be another code after."""


def run_pass(pass_: Pass, module: GraphModule, probe: Sequence[Any] | None = None) -> PassRecord:
    """Apply ``pass_`` to ``module`` and hold it to what it declares; PassError names pass, node and contract.

    In this order: the graph is one of its level; it is sound afterwards (lint); the matches are as many as expected;
    the graph's outputs have the shapes and dtypes that they had; every new node computes, on fake tensors, the shape
    and dtype that it says it does; nothing new overwrites its inputs unless that was declared. With ``probe`` inputs
    the graph is also run before and after: bit for bit for "exact" passes, within TOLERANCE or STEPS for "reorder".
    """
    from .passes.base import Result, described, semantic_name, signature

    _check_level(pass_, module)
    before = [signature(node.meta.get("val")) for node in _outputs(module)]
    expected = _run(module, probe) if probe is not None and pass_.numerics != "lossy" else None
    steps = any("quantize" in semantic_name(node) for node in module.graph.nodes)
    known, wanted = set(module.graph.nodes), pass_.expected
    try:
        result = pass_(module)
    except QcompileError:
        raise
    except Exception as error:  # a pass of somebody else may fail in any way
        raise PassError(f"pass {pass_.name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(result, Result):
        raise PassError(f"pass {pass_.name} returned {result!r}, not a Result that says how often it matched")
    module.graph.eliminate_dead_code()
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise PassError(f"pass {pass_.name} left a graph that is not sound: {error}") from error
    module.recompile()

    if wanted is not None and result.matches != wanted:
        raise PassError(
            f"pass {pass_.name} matched {result.matches} of {wanted}: "
            + ("; ".join(f"{node}: {why}" for node, why in result.rejected) or "nothing came close")
        )
    for node, was in zip(_outputs(module), before, strict=True):
        if signature(node.meta.get("val")) != was:
            raise PassError(
                f"pass {pass_.name} changed the graph's output {described(node)} from {was} to "
                f"{signature(node.meta.get('val'))}: shape, dtype and device must stay"
            )
    _check_new_nodes(pass_, [node for node in module.graph.nodes if node not in known])
    if expected is not None and probe is not None:
        _compare(pass_, module, expected, _run(module, probe), steps)
    return PassRecord(
        pass_.name, pass_.numerics, result.matches, len(known), len(module.graph.nodes), tuple(result.rejected)
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


def _check_level(pass_: Pass, module: GraphModule) -> None:
    """An AOT graph calls overloads of operators only; a Linear in it has become a matrix product."""
    from .passes.base import described
    from .sites import LINEARS

    if pass_.level not in ("model", "aot"):
        raise PassError(f"pass {pass_.name} declares the level {pass_.level!r}; there are 'model' and 'aot'")
    for node in module.graph.nodes if pass_.level == "aot" else ():
        if node.op in ("call_method", "call_module") or (node.op == "call_function" and node.target in LINEARS[1:]):
            raise PassError(
                f"pass {pass_.name} works on the graph of AOTAutograd, but {described(node)} is a {node.op} of "
                f"{node.target}, which belongs to a graph of the model"
            )


def _check_new_nodes(pass_: Pass, nodes: Sequence[torch.fx.Node]) -> None:
    from .passes.base import described, fake_result, signature

    known: dict[Any, Any] = {}
    for node in nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target._schema.is_mutable and not getattr(pass_, "mutates", False):
            raise PassError(
                f"pass {pass_.name} inserted {described(node)}, a call of {node.target}, which overwrites its inputs: "
                "use an operation without side effects, or declare mutates = True"
            )
        said = node.meta.get("val")
        if said is None or torch.Tag.dynamic_output_shape in node.target.tags:
            continue
        try:
            computed = fake_result(node, known)
        except Exception as error:  # a fake kernel may raise anything about arguments that do not fit
            raise PassError(f"pass {pass_.name} inserted {described(node)}, which cannot run: {error}") from error
        if computed is not None and signature(computed) != signature(said):
            raise PassError(
                f"pass {pass_.name} inserted {described(node)}, a call of {node.target}, as {signature(said)}, but it "
                f"computes {signature(computed)}"
            )


def probe_inputs(module: GraphModule, values: Sequence[Any]) -> list[Any]:
    """``values`` as inputs of an AOT graph; PassError if they are not what its placeholders take."""
    from .passes.base import signature

    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    probe = [value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat) else value for value in values]
    ranks = [len(signature(value)[0]) if isinstance(value, Tensor) else 0 for value in probe]
    if ranks != [node.meta["val"].dim() if isinstance(node.meta["val"], Tensor) else 0 for node in nodes]:
        raise PassError(
            f"the passes cannot be verified by numbers: the graph has {len(nodes)} inputs of other shapes than the "
            f"{len(probe)} that the call has; use options={{'verify': 'shapes'}}"
        )
    return probe


def _compare(pass_: Pass, module: GraphModule, expected: Sequence[Any], results: Sequence[Any], steps: bool) -> None:
    """Outputs of the graph before and after, on the probe; steps: whether it quantizes activations."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from .passes.base import described

    outputs = torch.utils._pytree.tree_leaves(module.graph.output_node().args)
    for node, got, want in zip(outputs, results, expected, strict=True):
        if not isinstance(want, Tensor):
            continue
        with unset_fake_temporarily():
            exact = pass_.numerics == "exact" or not want.is_floating_point()
            if torch.equal(got, want) if exact else close(got, want):
                continue
            difference = got.double() - want.double()
            if steps and not exact and difference.norm() <= STEPS * want.double().norm():
                continue
            deviation = difference.abs().max().item()
        raise PassError(
            f"pass {pass_.name} promises numerics {pass_.numerics!r}, but the output {described(node)} changed on "
            f"the probe, by {deviation:.3g}"
        )


def _run(module: GraphModule, probe: Sequence[Any]) -> list[Any]:
    """Outputs of ``module`` on real inputs, of which those that it overwrites are copied first."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    written = {node.args[0] for node in module.graph.nodes if node.target is torch.ops.aten.copy_.default}
    with torch.no_grad(), unset_fake_temporarily():
        inputs = [value.clone() if node in written else value for node, value in zip(placeholders, probe, strict=True)]
        return torch.utils._pytree.tree_leaves(module(*inputs))
