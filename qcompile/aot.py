"""Ahead of time: a package that a fresh process runs with torch alone."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule, Node

from . import plugins
from .errors import TraceError, UnsupportedError
from .modules import QuantLinear, quantized_modules
from .ops import find_kernel
from .sites import plain_name
from .trace import bind, example_input_ids, input_dims
from .types import Site
from .verify import no_semantic_ops_left, run_pass


def package(graph: GraphModule, model: nn.Module, example_inputs: tuple[Any, ...] | None, path: Path) -> Path:
    """Lower a traced graph over the tensors of ``model``, compile it with AOTInductor and write it to ``path``.

    example_inputs: None for a language model (input_ids). Batch and sequence stay dynamic, as they were traced.
    """
    from torch.export import export

    from .passes.lower import Lower

    _refuse_devices_without_inductor(model)
    bound = bind(graph, model)
    _use_portable_kernels(bound, model)
    record = run_pass(Lower(), bound)
    no_semantic_ops_left(bound, record.rejected)
    inputs = (example_input_ids(),) if example_inputs is None else example_inputs
    dims = tuple(input_dims(x) for x in inputs)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*treespec.*", category=FutureWarning)  # torch about itself
            program = export(bound, inputs, dynamic_shapes=dims, strict=False)
    except Exception as error:
        raise TraceError(f"the lowered graph of {type(model).__name__} cannot be exported again: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / path.name))
        os.replace(written, path)
    return path


def _refuse_devices_without_inductor(model: nn.Module) -> None:
    """UnsupportedError for a model whose kernels belong to a device that runs graphs with something else."""
    for name, module in quantized_modules(model).items():
        backend = module.kernel.partition(".")[0]
        if hasattr(plugins.find("backends", backend), "finish"):
            raise UnsupportedError(
                f"a package is compiled by Inductor, which has no {backend}, where {name} is: "
                "torch.compile(model, backend='qcompile') runs it there"
            )


def _use_portable_kernels(bound: GraphModule, model: nn.Module) -> None:
    """Give every linear whose kernel needs a library of its own to the best one of its backend that does not."""
    from .passes.base import semantic_name

    repacked: dict[tuple[str, ...], tuple[list[Node], str]] = {}
    for node in list(bound.graph.nodes):
        if semantic_name(node) not in ("linear", "scaled_linear") or find_kernel(str(node.args[4])).portable:
            continue
        x, weight, bias, scheme, kernel, *rest = node.args
        targets = tuple(str(tensor.target) for tensor in cast(list[Node], weight))
        if targets not in repacked:
            name = plain_name(targets[0]).rpartition(".")[0]
            module = cast(QuantLinear, model.get_submodule(name))
            site = Site(name, "linear", module.out_features, module.in_features, module.dtype)
            backend = str(kernel).partition(".")[0]
            suited = (k for k in plugins.find("backends", backend).kernels if k.portable and "linear" in k.kinds)
            chosen = next(k for k in suited if not k.refuses(site, module.scheme))
            nodes: list[Node] = []
            with bound.graph.inserting_before(node):
                for tensor in chosen.prepare(module.packed()):
                    attribute = f"packaged_{len(repacked)}_{len(nodes)}"
                    bound.register_buffer(attribute, tensor)
                    nodes.append(bound.graph.get_attr(attribute))
                    nodes[-1].meta["val"] = tensor
            repacked[targets] = nodes, f"{backend}.{chosen.name}"
        nodes, chosen_name = repacked[targets]
        node.args = (x, nodes, bias, scheme, chosen_name, *rest)
    bound.recompile()
