"""The story in one file: what happens, in order, when a user calls plan, quantize, report, dequantize or export."""

from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.fx import GraphModule

from . import budget, numerics
from .calibrate import Calibration, RareExperts, plan_needs, refuse_without_data
from .calibration_data import calibration_inputs, described
from .checks import check_coverage, check_model, check_weights, checked_plan
from .config import QuantConfig, as_config
from .errors import CalibrationError, ConfigError
from .experts import ExpertsLayout, find_experts
from .float_experts import fuse, unfuse
from .memory import Timeline, return_memory
from .modules import (
    FloatWeight,
    quantize_site,
    quantized_modules,
    replace_module,
    set_state,
    state_of,
)
from .planning import find_backend, make_plan
from .resume import ResumeFolder, digest, sample
from .rewriting import rewrite_graph
from .sites import walk_sites
from .trace import as_called, is_language_model, trace
from .types import (
    FrontierPoint,
    PackedWeight,
    Plan,
    PlannedSite,
    Report,
    Sensitivity,
    Site,
    SiteResult,
    State,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .parallel.quantizing import Division

Config = QuantConfig | Plan | dict | str | Path


def plan(
    model: nn.Module,
    config: QuantConfig | dict | str | Path = "rtn",
    *,
    device: str = "cpu",
    example_inputs: tuple[Any, ...] | None = None,
) -> Plan:
    """Decide what ``quantize`` would do to every site, without touching a weight.

    The plan can be printed, edited (``plan.override("*.down_proj", "w8a16")``) and given to ``quantize`` as its config.
    """
    check_model(model)
    settings = as_config(config)
    find_backend(device, to_run=False)
    sites = _find_sites(model, settings, example_inputs)[0]
    return make_plan(settings, sites, device, _other_bytes(model, sites))


def quantize(
    model: nn.Module,
    config: Config = "rtn",
    *,
    device: str = "cpu",
    example_inputs: tuple[Any, ...] | None = None,
    data: Any = None,
    tokenizer: Any = None,
    samples: int = 128,
    sequence: int | None = None,
    rare_experts: str = "error",
    expert_tokens: int = 16,
    resume: str | Path | None = None,
    mesh: DeviceMesh | None = None,
    ep: int | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Quantize ``model`` in place and return it: the same class, with QuantLinear at the names of its Linears.

    config: a preset or scheme name, a QuantConfig, a dict, a path to a YAML or JSON file, or a Plan. example_inputs:
    positional inputs of ``forward``, needed for anything but a transformers language model. progress: show a bar
    (default: when stderr is a terminal).

    data: what static activations and some methods are calibrated on: texts (tokenizer: of these, default the one beside
    the model), token ids in any form, a DataLoader or a dataset of either; for other models an iterable of tuples of
    positional inputs. It is joined and cut into at most ``samples`` sequences of ``sequence`` tokens (default 512, or
    as many as the model has positions), in its order.

    rare_experts: what happens to an expert that sees fewer than ``expert_tokens`` tokens of it: "error"; "all_tokens",
    every expert sees every token (experts / k times the work); or "rtn", it is rounded to nearest, its static scale is
    that of the others.

    A config with a budget reads data, too, and chooses the bits of every site by it; ``frontier`` and ``sensitivity``
    of the report hold what each amount of bytes would have bought, and what each site costs.

    resume: a folder that keeps what is done after each part of the calibration. When a run was interrupted, load the
    float model again and call this with the same arguments: it goes on where it was, with the same result.

    mesh: ranks that all call this with the same float model and data: each runs a share of the sequences, with the same
    result as one rank, and keeps its part of the model in the end; ep: into how many parts experts are dealt. See
    ``load``.

    In order: trace, plan, check all weights, quantize site by site (each float weight is freed before the next one is
    read; with data decoder block by decoder block), then rewrite the exported graph alike and hold both to the plan.

    Raises before the first weight is touched whenever it can: ConfigError, TraceError, UnsupportedError,
    CalibrationError (weights that are NaN, infinite or not loaded; data that is missing or cannot be used). Activations
    that turn out NaN or infinite are a CalibrationError, too; the model is then quantized up to that block only.
    """
    started, timeline = time.perf_counter(), Timeline()
    check_model(model)
    settings = None if isinstance(config, Plan) else as_config(config)
    rare = RareExperts(rare_experts, expert_tokens)
    find_backend(config.device if isinstance(config, Plan) else device)
    sites, graph, experts = _find_sites(model, settings, example_inputs)
    division = None if mesh is None else _division(mesh, ep, graph, sites, experts)
    if settings is None:
        assert isinstance(config, Plan)
        decided = checked_plan(config, sites)
    else:
        decided = make_plan(settings.without_budget(), sites, device, _other_bytes(model, sites))
    amount = settings.budget if settings else None
    if amount and data is None:
        raise CalibrationError(f"a budget of {amount} is spent by what calibration data tells: pass data=")
    inputs, notes = _calibration_inputs(
        model, decided, graph, example_inputs, data, tokenizer, samples, sequence, bool(amount)
    )
    check_weights(model, decided, experts)
    frontier: tuple[FrontierPoint, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    if settings is not None and amount:
        fuse(model, _affected(experts, decided))
        decided, frontier, sensitivity = _spent(model, settings, decided, example_inputs, inputs, progress)
        notes += (f"a budget of {amount} was spent by divergences that were measured",)
    if division is not None:
        division.decide(model, decided, resume)
    folder, unused = _resume_folder(resume, model, decided, inputs, rare)
    notes += unused
    timeline.mark("planned")

    def install(planned: PlannedSite, packed: PackedWeight | None) -> SiteResult:
        result = _quantize_site(model, planned, packed)
        timeline.mark(planned.site.name)
        return result

    if not frontier:
        fuse(model, _affected(experts, decided))
    calibration = Calibration(
        model, decided, graph, example_inputs, inputs, rare, folder,
        weight_of=lambda planned: _float_module(model, planned).weight.detach(),
        install=install, exchange=division.exchange if division else None,
    )  # fmt: skip
    quantized = calibration.run(progress)
    results = tuple(quantized.get(p.site.name) or SiteResult(p, p.bytes_after) for p in decided)
    check_coverage(model, decided)
    records = rewrite_graph(graph, decided, model) if graph is not None else ()
    notes += (*calibration.notes, *_untie(model, decided))
    timeline.mark("rewritten")
    report_ = Report(
        type(model).__name__,
        decided,
        results,
        seconds=time.perf_counter() - started,
        passes=records,
        notes=notes,
        expert_tokens=calibration.expert_tokens,
        memory=tuple(timeline.moments),
        frontier=frontier,
        sensitivity=sensitivity,
    )
    model.requires_grad_(False)  # integer weights have no gradient, and compiling for one would fail later
    if division is None:
        set_state(model, State(decided, report_, graph))
    else:
        division.divide(model, report_)
    gc.collect()  # the tracer leaves cycles that would keep fake tensors of every layer
    return_memory()
    return model


def report(model: nn.Module) -> Report:
    """What was done to ``model``, what was not, and why; includes the graphs compiled so far."""
    from .records import graphs_of, report_of_compiled_float

    original = getattr(model, "_orig_mod", model)
    state = state_of(original)
    if state is None:
        compiled = report_of_compiled_float(original)
        if compiled is None:
            raise ConfigError(f"{type(original).__name__} was not quantized by qcompile: there is nothing to report")
        return compiled
    return state.report.with_graphs(graphs_of(original))


def dequantize(model: nn.Module) -> nn.Module:
    """Turn every QuantLinear of ``model`` back into a Linear that holds the dequantized weight; in place.

    Quantized experts become what they were before, a module with 3-D parameters or a list, in the block that was there.
    """
    modules = quantized_modules(model)
    if not modules:
        raise ConfigError(f"{type(model).__name__} holds no quantized module: there is nothing to dequantize")
    unfuse(model)
    for module in quantized_modules(model).values():
        packed = module.packed()
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        weight = numerics.dequantize_packed(packed, module.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = cast(nn.Parameter, module.bias)
        replace_module(model, module, linear.train(module.training))
    set_state(model, None)
    config: Any = getattr(model, "config", None)
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:  # transformers' marks of a quantized model
        quantizer.remove_quantization_config(model)
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    return model


def export(
    model: nn.Module, path: str | Path, *, example_inputs: tuple[Any, ...] | None = None, overwrite: bool = False
) -> Path:
    """Compile ``model`` ahead of time into a package (.pt2) that runs in a fresh process with torch alone.

    A transformers language model becomes ``input_ids [batch, sequence] -> logits [batch, sequence, vocabulary]``; run
    it with ``torch._inductor.aoti_load_package(path)(input_ids)``. Any other model needs ``example_inputs``, at least
    for its shapes. The package is written beside ``path`` first and then renamed.
    """
    from .aot import package

    path = Path(path)
    if path.suffix != ".pt2":
        raise ConfigError(f"a package's name ends in .pt2, which {path} does not")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; pass overwrite=True to replace it")
    original = getattr(model, "_orig_mod", model)
    state = state_of(original)
    graph = state.graph if state is not None and state.graph is not None else trace(original, example_inputs).graph
    return package(graph, original, example_inputs, path)


# --------------------------------------------------------------------------------------------------------------- steps


def _find_sites(
    model: nn.Module, config: QuantConfig | None, example_inputs: tuple[Any, ...] | None
) -> tuple[tuple[Site, ...], GraphModule | None, tuple[ExpertsLayout, ...]]:
    if config is not None and config.tracing == "module_walk":
        experts = find_experts(model)
        return walk_sites(model, experts), None, experts
    traced = trace(model, example_inputs)
    return traced.sites, traced.graph, traced.experts


def _division(mesh: DeviceMesh, *found: Any) -> Division:
    from .parallel.quantizing import Division

    return Division(mesh, *found)


def _affected(experts: tuple[ExpertsLayout, ...], plan: Plan) -> list[ExpertsLayout]:
    """The experts that are quantized, at least in part, and those whose own form cannot be compiled."""
    planned = {p.site.name for p in plan.quantized}
    return [e for e in experts if e.block is not None or any(f"{e.name}.{name}" in planned for name in e.projections)]


def _other_bytes(model: nn.Module, sites: tuple[Site, ...]) -> int:
    """Bytes of all parameters and buffers that are not the weight of a site; a shared tensor counts once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    return total - sum(site.float_bytes for site in sites)


def _float_module(model: nn.Module, planned: PlannedSite) -> nn.Linear | FloatWeight:
    return cast(nn.Linear | FloatWeight, model.get_submodule(planned.site.name))


def _calibration_inputs(
    model: nn.Module,
    plan: Plan,
    graph: GraphModule | None,
    example_inputs: tuple[Any, ...] | None,
    data: Any,
    tokenizer: Any,
    samples: int,
    sequence: int | None,
    always: bool = False,
) -> tuple[list[tuple[Any, ...]], tuple[str, ...]]:
    """What to run for calibration, and a note on it; nothing if no site of the plan needs any, unless ``always``."""
    if not always and not plan_needs(plan):
        unused = "data was not read: no scheme and no method of this plan is calibrated"
        return [], () if data is None else (unused,)
    if data is None:
        refuse_without_data(plan, "Pass data= (--data FILE): some hundred texts like those that the model will see.")
    inputs = calibration_inputs(
        model, data, tokenizer=tokenizer, samples=samples, sequence=sequence, graph=graph, example_inputs=example_inputs
    )
    return inputs, (described(inputs),)


def _spent(
    model: nn.Module,
    settings: QuantConfig,
    plan: Plan,
    example_inputs: tuple[Any, ...] | None,
    inputs: list[tuple[Any, ...]],
    progress: bool | None,
) -> tuple[Plan, tuple[FrontierPoint, ...], tuple[Sensitivity, ...]]:
    """The plan that the budget of a config buys, what else could have been bought, and what each site costs."""
    sites, asked = [p.site for p in plan], settings.without_budget()
    plans = [
        make_plan(asked.model_copy(update={"scheme": scheme}), sites, plan.device, plan.other_bytes)
        for scheme in budget.ladder(settings.scheme)
    ]
    choices = budget.alternatives(plans)
    smallest = dataclasses.replace(
        plan, sites=tuple(choices[p.site.name][0] if p.site.name in choices else p for p in plan)
    )
    amount = budget.Budget.parse(cast(str, settings.budget))
    budget.check(amount, smallest)
    divergences = budget.measure(
        as_called(model, example_inputs),
        choices,
        lambda planned: _float_module(model, planned).weight.detach(),
        inputs,
        is_language_model(model) and example_inputs is None,
        progress,
    )
    return *budget.spend(smallest, choices, divergences, amount), budget.sensitivities(choices, divergences)


def _resume_folder(
    path: str | Path | None, model: nn.Module, plan: Plan, inputs: list[tuple[Any, ...]], rare: RareExperts
) -> tuple[ResumeFolder | None, tuple[str, ...]]:
    """The folder of a run that is described by all that its result depends on; a note where it is not needed."""
    if path is None:
        return None, ()
    if not inputs:
        return None, ("nothing was kept for resuming: no scheme and no method of this plan is calibrated",)
    run = {
        "plan": digest([(p.site.name, str(p.scheme), p.method, p.options, p.kernel) for p in plan]),
        "data": digest([inputs]),
        "model": digest([(name, list(tensor.shape), sample(tensor)) for name, tensor in model.named_parameters()]),
        "choice for rare experts": digest([repr(rare)]),
    }
    return ResumeFolder(path, run), ()


def _quantize_site(model: nn.Module, planned: PlannedSite, packed: PackedWeight | None) -> SiteResult:
    return_memory()
    module = _float_module(model, planned)

    def release() -> None:
        module.weight = nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)

    quantized, result = quantize_site(planned, module.weight.detach(), module.bias, packed, release)
    replace_module(model, module, quantized.train(module.training))
    return result


def _untie(model: nn.Module, plan: Plan) -> tuple[str, ...]:
    """A quantized lm_head no longer shares the embedding's weight; the config must not claim that it does."""
    tied = [p.site for p in plan.quantized if p.site.tied_to]
    config = getattr(model, "config", None)
    if config is not None and any(site.role == "lm_head" for site in tied):
        config.tie_word_embeddings = False
    return tuple(f"{site.name} shared its weight with {site.tied_to}: each has its own now" for site in tied)
