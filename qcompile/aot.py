"""Ahead of time: a package that a fresh process runs with torch alone."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from .errors import TraceError
from .trace import bind, example_input_ids, input_dims
from .verify import no_semantic_ops_left, run_pass


def package(graph: GraphModule, model: nn.Module, example_inputs: tuple[Any, ...] | None, path: Path) -> Path:
    """Lower a traced graph over the tensors of ``model``, compile it with AOTInductor and write it to ``path``.

    example_inputs: None for a language model (input_ids). Batch and sequence stay dynamic, as they were traced.
    """
    from torch.export import export

    from .passes.lower import Lower

    bound = bind(graph, model)
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
