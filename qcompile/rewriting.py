"""The exported graph, rewritten like the model whose Linears and experts were quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .modules import QuantExperts, QuantWeight
from .sites import first_names, module_name
from .trace import attribute
from .types import PassRecord, Plan, PlannedSite
from .verify import run_pass


def rewrite_graph(graph: GraphModule, plan: Plan, model: nn.Module) -> tuple[PassRecord, ...]:
    """Rewrite the exported graph like the model; PassError names every planned site that is not in the graph."""
    from .passes.base import Pass
    from .passes.quantize_experts import QuantizeExperts
    from .passes.quantize_linear import QuantizeLinear

    nodes: dict[int, Node] = {}  # one per tensor: sites that share a static scale must be seen to do so
    first = first_names(model)
    names = {module: name for name, module in model.named_modules()}

    def attributes(module: nn.Module, tensors: Sequence[Tensor], node: Node) -> list[Node]:
        for name, tensor in [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]:
            if id(tensor) not in nodes and any(tensor is wanted for wanted in tensors):
                nodes[id(tensor)] = attribute(graph, node.graph, f"{names[module]}.{name}", tensor)
        return [nodes[id(tensor)] for tensor in tensors]

    def of_linear(planned: PlannedSite, node: Node) -> tuple[list[Node], list[Node]]:
        module = cast(QuantWeight, model.get_submodule(planned.site.name))
        return attributes(module, module.tensors(), node), attributes(module, module.params(), node)

    def name_of(node: Node) -> str:
        return first.get(module_name(node), "")

    linears = {p.site.name: p for p in plan.quantized if p.site.kind == "linear"}
    experts = {name: module for module, name in names.items() if isinstance(module, QuantExperts)}
    passes: list[Pass] = [QuantizeLinear(name_of, linears, of_linear), QuantizeExperts(name_of, experts, attributes)]
    return tuple(run_pass(rewrite, graph) for rewrite in passes if rewrite.expected)
