"""The Dynamo backend: ``torch.compile(model, backend="qcompile")``.

Found by its entry point, so that no import of qcompile is needed. Dynamo's graph goes through AOTAutograd; the passes
run on the AOT graph, which is then cut at its decoder blocks and given to Inductor. AOTAutograd's own disk cache is
off, because it is looked up before the passes run; Inductor's is keyed by the lowered graphs, so that processes share
compiled code and a changed pass or kernel is never served stale.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.fx import GraphModule

from . import ops, plugins  # noqa: F401  (the ops must be registered before a graph that calls them is compiled)
from .adopt import adopt_compiled_modules
from .config import QuantConfig, as_config
from .errors import ConfigError, PassError, did_you_mean
from .passes.pipeline import compile_passes
from .records import remember_graph
from .regions import compile_pieces, cut
from .types import GraphRecord, PassRecord
from .verify import no_semantic_ops_left, probe_inputs, run_pass


class Options(BaseModel):
    """What ``torch.compile(..., options={...})`` understands besides Inductor's own settings.

    config       quantize a float model at its first call (a preset, a dict, a QuantConfig or a path)
    regions      compile equal decoder blocks once (default) instead of the whole graph at once
    allow_float  compile a graph in which nothing is quantized instead of raising
    passes       passes to add, by object, class or installed name, and "-name" for each of ours to leave out
    verify       what every pass is held to: "shapes" (default), or "numbers" to run the graph before and after as well
    replay       on a CPU, repeat calls with the same sizes and caches from a recording (default), without Python
    npu_graph    what runs the graph on an NPU: "npugraph_ex", "aclgraph", "torchair" or "eager" (default: the first of
                 them that can be used)
    nz           with config, on an NPU: store weights as FRACTAL_NZ where they allow it (default), or not
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    config: QuantConfig | None = None
    regions: bool = True
    allow_float: bool = False
    passes: tuple[Any, ...] = ()
    verify: Literal["shapes", "numbers"] = "shapes"
    replay: bool = True
    npu_graph: str | None = None
    nz: bool | None = None


def backend(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
):
    """Compile one of Dynamo's graphs. Raises ConfigError for a mode or an option that does not exist."""
    from torch._inductor.compile_fx import compile_fx

    own, inductor = parse_options(mode, options)
    tensors = [x for x in example_inputs if isinstance(x, Tensor) and not hasattr(x, "fake_mode")]
    inputs = [*module.parameters(), *module.buffers(), *example_inputs]  # how AOTAutograd orders them
    compiler = _Inner(own, tensors, inputs if own.verify == "numbers" else None)
    _refuse_options_of_other_devices(own, inductor, compiler, _device(tensors))
    if own.config is not None:
        from .floats import quantize_float_graph

        device: Any = compiler.device
        with nullcontext() if own.nz is None else device.target(nz=own.nz):
            quantize_float_graph(module, example_inputs, own.config)
    elif not own.allow_float:
        _refuse_float(module)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        if compiler.finish is not None:
            from torch._dynamo.backends.common import aot_autograd

            return aot_autograd(fw_compiler=compiler, inference_compiler=compiler)(module, list(example_inputs))
        return compile_fx(
            module,
            list(example_inputs),
            inner_compile=compiler,
            config_patches=inductor,
            decompositions=decompositions(),
        )


def decompositions() -> dict:
    """Inductor's, but for the activations that the passes want to find; the last pass applies the others to them."""
    from torch._inductor.decomposition import select_decomp_table

    from .passes.canonicalize import KEPT

    return {target: function for target, function in select_decomp_table().items() if target not in KEPT}


def parse_options(mode: str | None, options: dict[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Split options into ours and Inductor's config patches; a name that is neither is an error."""
    from torch._inductor import config as inductor_config
    from torch._inductor import list_mode_options

    patches: dict[str, Any] = {}
    if mode is not None:
        modes = ("default", *list_mode_options())
        if mode not in modes:
            raise ConfigError(f"unknown mode {mode!r}.{did_you_mean(mode, modes)}")
        patches |= list_mode_options(mode) if mode != "default" else {}
    given = dict(options or {})
    mine = {name: given.pop(name) for name in Options.model_fields if name in given}
    if "config" in mine and mine["config"] is not None:
        mine["config"] = as_config(mine["config"])
    for name in ("regions", "allow_float", "replay", "nz"):
        if name in mine and not isinstance(mine[name], bool):
            raise ConfigError(f"option {name!r} must be True or False, not {mine[name]!r}")
    if mine.get("verify", "shapes") not in ("shapes", "numbers"):
        raise ConfigError(f"option 'verify' must be 'shapes' or 'numbers', not {mine['verify']!r}")
    if "passes" in mine:
        if not isinstance(mine["passes"], list | tuple):
            raise ConfigError(f"option 'passes' must be a list, not {mine['passes']!r}")
        compile_passes(None, mine["passes"])
    known = inductor_config.get_config_copy()
    for name, value in given.items():
        if name not in known:
            near = did_you_mean(name, [*Options.model_fields, *known]).partition(" Known:")[0]
            raise ConfigError(
                f"unknown option {name!r}.{near} Options of qcompile: {', '.join(Options.model_fields)}; "
                "any setting of torch._inductor.config is understood as well"
            )
        patches[name] = value
    return Options(**mine), patches


def _refuse_options_of_other_devices(own: Options, inductor: dict[str, Any], compiler: _Inner, device: str) -> None:
    """ConfigError for options that would have no effect where this model is."""
    for name in ("npu_graph", "nz"):
        if getattr(own, name) is not None and compiler.finish is None:
            raise ConfigError(f"option {name!r} is about NPUs, but this model is on {device}")
    if own.nz is not None and own.config is None:
        raise ConfigError(
            "option 'nz' is about weights that are packed while compiling, with option 'config'; quantize or load this "
            "model under qcompile.backends.npu.target(nz=...) instead"
        )
    if inductor and compiler.finish is not None:
        raise ConfigError(f"{', '.join(inductor)} are settings of Inductor, which does not compile for {device}")


def _refuse_float(module: GraphModule) -> None:
    """A graph with Linears of which none is quantized is compiled only on request: it would be plain Inductor."""
    from .passes.base import semantic_name
    from .sites import LINEARS

    nodes = module.graph.nodes
    if any(semantic_name(node) for node in nodes) or not any(node.target in LINEARS for node in nodes):
        return
    raise ConfigError(
        "nothing in this graph is quantized: call qcompile.quantize(model, ...) or qcompile.load(...) first, or "
        "quantize while compiling with options={'config': 'rtn'}; options={'allow_float': True} compiles it as it is"
    )


def _device(tensors: Sequence[Tensor]) -> str:
    """Where the inputs of a graph are."""
    return next((tensor.device.type for tensor in tensors), "cpu")


class _Inner:
    """``inner_compile`` of compile_fx: passes, cut, Inductor; or passes and what the device itself runs graphs with."""

    def __init__(self, options: Options, tensors: Sequence[Tensor], inputs: Sequence[Any] | None = None) -> None:
        self.options, self.tensors, self.inputs = options, tensors, inputs
        device = _device(tensors)
        self.device = plugins.find("backends", device) if device in plugins.names("backends") else None
        self.finish = getattr(self.device, "finish", None)

    def __call__(self, module: GraphModule, example_inputs: Sequence[Any], **kwargs: Any):
        from torch._inductor.decomposition import select_decomp_table

        started = time.perf_counter()
        with getattr(self.device, "while_lowering", nullcontext)():
            records = self._run_passes(module)
        # the graph is decomposed already; a table of our own would keep Inductor from caching what it compiles
        kwargs |= {"get_decomp_fn": select_decomp_table} if "get_decomp_fn" in kwargs else {}
        if kwargs.get("is_backward"):
            raise PassError("quantized models are for inference: compile under torch.no_grad()")
        compiled, regions, distinct = self._compile(module, example_inputs, kwargs)
        seconds = time.perf_counter() - started
        nodes = len(module.graph.nodes)
        record = GraphRecord(_dynamic_inputs(module), nodes, tuple(records), regions, distinct, seconds)
        remember_graph(record, self.tensors)
        return compiled

    def _run_passes(self, module: GraphModule) -> list[PassRecord]:
        from torch._inductor.decomposition import select_decomp_table

        table = select_decomp_table() if self.finish is None else None
        probe = None if self.inputs is None else probe_inputs(module, self.inputs)
        records = [run_pass(pass_, module, probe) for pass_ in compile_passes(table, self.options.passes)]
        no_semantic_ops_left(module, [near for record in records for near in record.rejected])
        return records

    def _compile(self, module: GraphModule, example_inputs: Sequence[Any], kwargs: dict[str, Any]):
        from torch._inductor.compile_fx import compile_fx_inner

        if self.finish is not None:
            metadata = torch._guards.TracingContext.get().fw_metadata
            weights = metadata.static_input_indices if metadata is not None else []
            return self.finish(module, example_inputs, weights, self.options.npu_graph), 1, 1
        pieces = cut(module) if self.options.regions else []
        weights = list(kwargs.get("static_input_idxs") or ())
        if len(pieces) < 2:
            whole = compile_fx_inner(module, example_inputs, **kwargs)
            return self._repeated(whole, [whole], module, weights), 1, 1
        made: list[Any] = []
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        static = {placeholders[i] for i in weights}

        def compile_one(piece, inputs):
            positions = [i for i, node in enumerate(piece.inputs) if node in static]
            with _no_output_strides():
                made.append(compile_fx_inner(piece.module, inputs, **{**kwargs, "static_input_idxs": positions}))
            return made[-1]

        with getattr(self.device, "while_compiling", nullcontext)():
            function, distinct = compile_pieces(pieces, module, compile_one)
        return self._repeated(function, made, module, weights), len(pieces), distinct

    def _repeated(self, function: Any, compiled: list[Any], module: GraphModule, weights: list[int]) -> Any:
        """``function``, by whatever the device has to run it again with less effort."""
        repeat = getattr(self.device, "repeat", None) if self.options.replay else None
        return function if repeat is None else repeat(function, compiled, module.graph, weights)


def _dynamic_inputs(module: GraphModule, limit: int = 3) -> str:
    """Shapes of the first inputs that are not weights: integers, or of symbolic size."""
    values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    shapes = [
        f"[{', '.join(map(str, v.shape))}]"
        for v in values
        if isinstance(v, Tensor) and (v.dtype == torch.int64 or any(not isinstance(s, int) for s in v.shape))
    ]
    return " ".join(shapes[:limit]) + (" ..." if len(shapes) > limit else "")


@contextmanager
def _no_output_strides() -> Iterator[None]:
    """Inductor reports the strides of the one graph it compiles for AOTAutograd; those of a piece are not asked for."""
    context = torch._guards.TracingContext.try_get()
    before = None if context is None else context.output_strides
    if context is not None:
        context.output_strides = None
    try:
        yield
    finally:
        if context is not None:
            context.output_strides = before


adopt_compiled_modules(backend)
