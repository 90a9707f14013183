"""Replace every semantic op by the ATen operations of its kernel, so that nothing of ``qcompile::`` is left.

A device's own operation is taken where its backend has one that does not refuse; otherwise the op's definition. Each
distinct call is traced once; its operations are then copied to wherever the same shapes occur.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .. import plugins
from ..fused_ops import DEFINITIONS
from ..moe import run_float_experts
from ..numerics import quantize_activation
from ..ops import activation_of, compute_experts, compute_linears, find_kernel, scheme_of
from .base import Result, described, replace, semantic_name, value_key
from .canonicalize import KEPT

_INPUTS = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)

IMPLEMENTATIONS: dict[str, Callable] = {
    "quantize": lambda x, params, activation: quantize_activation(x, activation_of(activation), params),
    "linear": lambda x, weight, bias, scheme, kernel, out: find_kernel(kernel).linear(
        x, weight, bias, scheme_of(scheme), out
    ),
    "scaled_linear": lambda x, weight, bias, scheme, kernel, out, dtype: find_kernel(kernel).scaled_linear(
        x, weight, bias, scheme_of(scheme), out, dtype
    ),
    "linears": compute_linears,
    "experts": run_float_experts,
    "quant_experts": compute_experts,
    **DEFINITIONS,
}


@dataclass
class Lower:
    """``decompositions``: the table with which kernels are traced; Inductor's, for a graph that Inductor compiles."""

    decompositions: dict | None = None
    name: str = "lower"
    level: str = "aot"
    numerics: str = "reorder"
    expected: int | None = None
    _traced: dict[Any, GraphModule] = field(default_factory=dict)

    def __call__(self, module: GraphModule) -> Result:
        """Rewrite ``module.graph``; ``matches`` counts the ops that it held. One without a lowering is rejected."""
        result = Result()
        for node in list(module.graph.nodes):
            name = semantic_name(node)
            restored = node.target in KEPT and node.target in (self.decompositions or ())
            if (name and self._lower(name, node, result)) or (restored and self._lower("", node, result)):
                result.matches += bool(name)
        return result

    def _lower(self, name: str, node: Node, result: Result) -> bool:
        """Lower one call, and then the ops that a fused one is made of; False if there is no way."""
        implementation = self._implementation(name, node, result) if name else node.target
        if not callable(implementation):
            result.rejected.append((described(node), f"no lowering of qcompile::{name}"))
            return False
        for made in self._inline(node, self._trace(implementation, node)):
            if part := semantic_name(made):
                self._lower(part, made, result)
        return True

    def _implementation(self, name: str, node: Node, result: Result) -> Callable | None:
        values = [item.meta["val"] if isinstance(item, Node) else item for item in pytree.tree_leaves(node.args)]
        device = next((value.device.type for value in values if isinstance(value, Tensor)), "")
        if device in plugins.names("backends"):
            operation = getattr(plugins.find("backends", device), "operations", {}).get(name)
            refusal = operation.refuses(*_values(node)[0]) if operation is not None else ""
            if refusal:
                result.rejected.append((described(node), f"{device} has an operation for it, but {refusal}"))
            elif operation is not None:
                return operation.compute
        return IMPLEMENTATIONS.get(name)

    def _trace(self, implementation: Callable, node: Node) -> GraphModule:
        flat, spec = pytree.tree_flatten(_values(node))
        key = (implementation, spec, *(value_key(value) for value in flat))
        if key not in self._traced:
            inputs = [value for value in flat if isinstance(value, _INPUTS)]

            def run(*given: Any):
                rest = iter(given)
                filled = [next(rest) if isinstance(value, _INPUTS) else value for value in flat]
                args, kwargs = pytree.tree_unflatten(filled, spec)
                return implementation(*args, **kwargs)

            mode = next((t.fake_mode for t in inputs if hasattr(t, "fake_mode")), None)
            with mode or torch.no_grad():
                self._traced[key] = make_fx(run, decomposition_table=self.decompositions)(*map(_distinct, inputs))
        return self._traced[key]

    def _inline(self, node: Node, traced: GraphModule) -> list[Node]:
        """Copy what was traced to before ``node`` and let it take its place; returns the copies."""
        flat = pytree.tree_leaves((node.args, node.kwargs))
        inputs = iter([item for item in flat if isinstance(item, Node)])
        copies: dict[Node, Any] = {}
        made: list[Node] = []
        owners = _owners(node, traced)
        with node.graph.inserting_before(node):
            for inner in traced.graph.nodes:
                if inner.op == "placeholder":
                    copies[inner] = next(inputs)
                elif inner.op == "output":
                    self._rewire(node, inner.args[0], copies)
                elif inner.op == "get_attr":
                    raise AssertionError(f"{described(node)}: its kernel makes a tensor constant {inner.target}")
                else:
                    copies[inner] = node.graph.node_copy(inner, lambda n: copies[n])
                    made.append(copies[inner])
                    if "nn_module_stack" in owners.get(inner, node).meta:
                        copies[inner].meta["nn_module_stack"] = owners.get(inner, node).meta["nn_module_stack"]
        return made

    def _rewire(self, node: Node, outputs: Any, copies: dict[Node, Any]) -> None:
        if isinstance(outputs, Node):
            replace(node, copies[outputs], self.name)
            return
        for user in list(node.users):  # an op with several results: its users are operator.getitem
            replace(user, copies[outputs[user.args[1]]], self.name)
        if not node._erased:
            node.graph.erase_node(node)


def _distinct(value: Any) -> Any:
    """A tensor like ``value``, but no other argument: nodes may share a fake value, and a tracer tells by identity."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _values(node: Node) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a call, with fake values in place of nodes."""
    return pytree.tree_map(
        lambda item: item.meta["val"] if isinstance(item, Node) else item, (list(node.args), dict(node.kwargs))
    )


def _owners(node: Node, traced: GraphModule) -> dict[Node, Node]:
    """Which result of ``node`` each operation in ``traced`` belongs to: of those made with it, the one made first.

    A residual sum that was joined with the norm of the next block is computed in its own block again.
    """
    outputs = traced.graph.output_node().args[0]
    if isinstance(outputs, Node):
        return {}
    made: list[tuple[set[Node], Node]] = []
    for user in node.users:
        ancestors, pending = set[Node](), [outputs[user.args[1]]]  # type: ignore[index]
        while pending:
            inner = pending.pop()
            if isinstance(inner, Node) and inner not in ancestors:
                ancestors.add(inner)
                pending += inner.all_input_nodes
        made.append((ancestors, user))
    owners: dict[Node, Node] = {}
    for ancestors, user in sorted(made, key=lambda pair: len(pair[0])):
        owners |= {inner: user for inner in ancestors if inner not in owners}
    return owners
