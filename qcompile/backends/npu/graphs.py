"""What runs a lowered graph on an NPU. All use of torch_npu's graph interfaces is here, since they move.

npugraph_ex  captured, by the compiler of that name in torch_npu
aclgraph     captured, by torch_npu's graph trees: the counterpart of CUDA graphs
torchair     converted to a graph of Ascend's graph engine
eager        one operation after the other
"""

from __future__ import annotations

import importlib
import importlib.util
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ...errors import ConfigError, UnsupportedError, did_you_mean

Compiled = Callable[..., Any]


def finish(module: GraphModule, inputs: Sequence[Any], static: Sequence[int], mode: str | None = None) -> Compiled:
    """A function like ``module`` that runs on the NPU.

    inputs: fake; static: which of them are weights, always at the same address. mode: a name from above, None for the
    first that can be used. Raises ConfigError for any other name, UnsupportedError that says what is missing.
    """
    if mode is None:
        mode = next(name for name in MODES if not why_not(name, module))
    elif mode not in MODES:
        raise ConfigError(f"unknown npu_graph {mode!r}.{did_you_mean(mode, MODES)}")
    elif reason := why_not(mode, module):
        raise UnsupportedError(f"npu_graph={mode!r} cannot be used: {reason}")
    return MODES[mode](module, inputs, list(static))


def why_not(mode: str, module: GraphModule) -> str:
    """Why ``mode`` cannot run this graph here, "" when it can."""
    if mode == "eager":
        return ""
    if missing := missing_package():
        return missing
    if importlib.util.find_spec(_NEEDS[mode]) is None:
        return f"this torch_npu has no module {_NEEDS[mode]}"
    broken = torch.ops.npu.npu_weight_quant_batchmatmul.default
    if mode == "npugraph_ex" and any(node.target is broken for node in module.graph.nodes):
        return f"it fails at {broken} (seen in torch_npu 2.13.0: its config has no experimental_config)"
    return ""


def missing_package() -> str:
    """That torch_npu is not installed, and in which version it would fit; "" when it is."""
    if importlib.util.find_spec("torch_npu") is not None:
        return ""
    release = torch.__version__.partition("+")[0]
    return (
        "torch_npu is not installed; it comes with Ascend's CANN toolkit and in the version of torch: "
        f"pip install torch-npu=={release}"
    )


def _boxed(function: Callable) -> Compiled:
    """AOTAutograd hands over its inputs as one list, which may then be emptied."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


def _eager(module: GraphModule, inputs: Sequence[Any], static: list[int]) -> Compiled:
    def run(arguments: list[Any]) -> Any:
        taken = tuple(arguments)
        arguments.clear()
        return module(*taken)

    return _boxed(run)


def _aclgraph(module: GraphModule, inputs: Sequence[Any], static: list[int]) -> Compiled:
    """Captured once for each combination of sizes, at the first call with it."""
    from torch._dynamo.backends.cudagraphs import find_input_mutations, get_stack_traces
    from torch._inductor.cudagraph_utils import get_placeholder_info

    trees: Any = importlib.import_module(_NEEDS["aclgraph"])
    captured: Compiled | None = None

    def run(arguments: list[Any]) -> Any:
        nonlocal captured
        if captured is None:
            device = next(a.device.index for a in arguments if isinstance(a, torch.Tensor))
            captured = trees.npugraphify_impl(
                _eager(module, inputs, static), arguments, static, device_index=device, is_backward=False,
                is_inference=True, stack_traces=get_stack_traces(module),
                placeholders=get_placeholder_info(module.graph), mutated_input_idxs=find_input_mutations(module.graph),
            )  # fmt: skip
        return captured(arguments)

    return _boxed(run)


def _torchair(module: GraphModule, inputs: Sequence[Any], static: list[int]) -> Compiled:
    torchair = _set_up("torchair")
    return torchair.get_compiler(torchair.CompilerConfig())(convertible(module), list(inputs))


def convertible(module: GraphModule) -> GraphModule:
    """The same graph in operations that torchair can convert; changes it in place.

    torch_npu 2.13.0 has no converters of aten.amax and aten.amin, which plain quantization of activations needs, and
    none of what npu_moe_token_unpermute consists of.
    """
    aten = torch.ops.aten
    for node in list(module.graph.nodes):
        with module.graph.inserting_before(node):
            if node.target in (aten.amax.default, aten.amin.default) and len(node.args[1]) == 1:
                other = aten.max.dim if node.target is aten.amax.default else aten.min.dim
                both = module.graph.call_function(other, (node.args[0], node.args[1][0], *node.args[2:]), node.kwargs)
                _replace(node, module.graph.call_function(operator.getitem, (both, 0)))
            elif str(node.target) == "npu._npu_moe_token_unpermute.default":
                (result,) = [user for user in node.users if user.args[1] == 0 or user.users]
                _replace(result, _combined(module.graph, *node.args[:3]))
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _combined(graph: Graph, rows: Node, place: Node, routing: Node) -> Node:
    """``RowMajor.combine`` in plain operations."""
    aten, value, k = torch.ops.aten, rows.meta["val"], routing.meta["val"].shape[1]
    chosen = graph.call_function(aten.index_select.default, (rows, 0, place))
    wide = graph.call_function(aten._to_copy.default, (chosen,), {"dtype": torch.float32})
    each = graph.call_function(aten.view.default, (wide, [-1, k, value.shape[1]]))
    weighted = graph.call_function(aten.mul.Tensor, (each, graph.call_function(aten.unsqueeze.default, (routing, -1))))
    total = graph.call_function(aten.sum.dim_IntList, (weighted, [1]))
    return graph.call_function(aten._to_copy.default, (total,), {"dtype": value.dtype})


def _replace(node: Node, other: Node) -> None:
    other.meta.update(node.meta)
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def _npugraph_ex(module: GraphModule, inputs: Sequence[Any], static: list[int]) -> Compiled:
    package = _set_up("npugraph_ex")
    for i in static:
        if isinstance(inputs[i], torch.Tensor):
            inputs[i]._torchair_is_parameter = True  # as its own front end marks weights: they are not copied
    config = package.CompilerConfig()
    config.mode = "npugraph_ex"
    return package.get_compiler(config)(module, list(inputs))


def _set_up(name: str) -> Any:
    """A package of torch_npu that is importable by its short name after torch_npu has set Dynamo up."""
    importlib.import_module("torch_npu.utils._dynamo")._lazy_dynamo_setup()
    return importlib.import_module(name)


MODES: dict[str, Callable[[GraphModule, Sequence[Any], list[int]], Compiled]] = {
    "npugraph_ex": _npugraph_ex, "aclgraph": _aclgraph, "torchair": _torchair, "eager": _eager,
}  # fmt: skip
"""Best first."""

_NEEDS = {
    "npugraph_ex": "torch_npu.dynamo.npugraph_ex", "aclgraph": "torch_npu.npu._graph_tree",
    "torchair": "torch_npu.dynamo.torchair",
}  # fmt: skip
