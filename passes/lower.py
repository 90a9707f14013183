"""Replace every semantic op by the ATen operations of its kernel, so that nothing of ``qcompile::`` is left.

Each distinct call is traced once; its operations are then copied to wherever the same shapes occur.
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

from ..numerics import quantize_activation
from ..ops import activation_of, compute_experts, find_kernel, scheme_of
from .base import Result, described, replace, semantic_name, signature

IMPLEMENTATIONS: dict[str, Callable] = {
    "quantize": lambda x, params, activation: quantize_activation(x, activation_of(activation), params),
    "linear": lambda x, weight, bias, scheme, kernel, out: find_kernel(kernel).linear(
        x, weight, bias, scheme_of(scheme), out
    ),
    "scaled_linear": lambda x, weight, bias, scheme, kernel, out, dtype: find_kernel(kernel).scaled_linear(
        x, weight, bias, scheme_of(scheme), out, dtype
    ),
    "quant_experts": compute_experts,
}


@dataclass
class Lower:
    """``decompositions``: the table with which kernels are traced; Inductor's, for a graph that Inductor compiles."""

    decompositions: dict | None = None
    name: str = "lower"
    numerics: str = "reorder"
    expected: int | None = None
    _traced: dict[Any, GraphModule] = field(default_factory=dict)

    def __call__(self, module: GraphModule) -> Result:
        """Rewrite ``module.graph``; an op without an implementation is rejected by name."""
        result = Result()
        for node in list(module.graph.nodes):
            name = semantic_name(node)
            if not name:
                continue
            if name not in IMPLEMENTATIONS:
                result.rejected.append((described(node), f"no lowering of qcompile::{name}"))
                continue
            self._inline(node, self._trace(name, node))
            result.matches += 1
        return result

    def _trace(self, name: str, node: Node) -> GraphModule:
        flat, spec = pytree.tree_flatten(node.args)
        values = [item.meta["val"] if isinstance(item, Node) else item for item in flat]
        key = (name, *(_key(value) for value in values))
        if key not in self._traced:
            tensors = [value for value in values if isinstance(value, Tensor)]

            def run(*given: Tensor):
                rest = iter(given)
                args = [next(rest) if isinstance(value, Tensor) else value for value in values]
                return IMPLEMENTATIONS[name](*pytree.tree_unflatten(args, spec))

            mode = next((t.fake_mode for t in tensors if hasattr(t, "fake_mode")), None)
            with mode or torch.no_grad():
                self._traced[key] = make_fx(run, decomposition_table=self.decompositions)(*tensors)
        return self._traced[key]

    def _inline(self, node: Node, traced: GraphModule) -> None:
        flat, _ = pytree.tree_flatten(node.args)
        tensors = iter([item for item in flat if isinstance(item, Node)])
        copies: dict[Node, Any] = {}
        graph = node.graph
        with graph.inserting_before(node):
            for inner in traced.graph.nodes:
                if inner.op == "placeholder":
                    copies[inner] = next(tensors)
                elif inner.op == "output":
                    self._rewire(node, inner.args[0], copies)
                elif inner.op == "get_attr":
                    raise AssertionError(f"{described(node)}: its kernel makes a tensor constant {inner.target}")
                else:
                    copies[inner] = graph.node_copy(inner, lambda n: copies[n])
                    if "nn_module_stack" in node.meta:
                        copies[inner].meta["nn_module_stack"] = node.meta["nn_module_stack"]

    def _rewire(self, node: Node, outputs: Any, copies: dict[Node, Any]) -> None:
        if isinstance(outputs, Node):
            replace(node, copies[outputs], self.name)
            return
        for user in list(node.users):  # an op with several results: its users are operator.getitem
            replace(user, copies[outputs[user.args[1]]], self.name)
        node.graph.erase_node(node)


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return signature(value), tuple(str(stride) for stride in value.stride())
    return str(value)
