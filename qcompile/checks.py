"""What must hold before a model is touched, and after: models, plans and weights."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from . import numerics
from .errors import CalibrationError, ConfigError, UnsupportedError
from .experts import ExpertsLayout
from .float_experts import parts, projections
from .modules import quantized_modules
from .types import Plan, Site


def check_model(model: Any) -> None:
    """ConfigError for what is no module, and for a model that is compiled or quantized already."""
    if not isinstance(model, nn.Module):
        hint = "; load it first, for example by AutoModelForCausalLM.from_pretrained" if isinstance(model, str) else ""
        raise ConfigError(f"expected a torch.nn.Module, not {type(model).__name__} {str(model)[:80]!r}{hint}")
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ConfigError(
                f"{name or 'this model'} is already compiled: quantize first, then "
                "torch.compile(model, backend='qcompile')"
            )
    if modules := quantized_modules(model):
        raise ConfigError(
            f"{type(model).__name__} is already quantized ({next(iter(modules))} and {len(modules) - 1} more); "
            "qcompile.dequantize(model) would undo it"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError(
            f"{type(model).__name__} was loaded by transformers with {type(model.hf_quantizer).__name__}; "
            "load the float model, or use qcompile.load for a quantized checkpoint"
        )


def checked_plan(plan: Plan, sites: tuple[Site, ...]) -> Plan:
    """The plan; ConfigError where its sites are not those of the model."""
    found = {site.name: site for site in sites}
    for planned in plan:
        if found.get(planned.site.name) != planned.site:
            raise ConfigError(
                f"the plan was made for another model: its site {planned.site.name} is "
                f"{planned.site}, this model's is {found.get(planned.site.name)}"
            )
    return plan


def check_weights(model: nn.Module, plan: Plan, experts: tuple[ExpertsLayout, ...]) -> None:
    """CalibrationError for a planned weight that is not loaded or not finite; nothing has been touched yet."""
    of_experts = projections(experts)
    for planned in plan.quantized:
        name = planned.site.name
        if name in of_experts:
            layout, projection = of_experts[name]
            label, weights = name, parts(model.get_submodule(layout.name), layout, projection)
        else:
            label, weights = f"{name}.weight", [cast(Tensor, model.get_submodule(name).weight)]
        if any(weight.device.type == "meta" for weight in weights):
            raise CalibrationError(f"{label} is on the meta device: load the weights before quantizing")
        if not all(numerics.is_finite(weight) for weight in weights):
            raise CalibrationError(f"{label} holds NaN or infinite values; nothing was quantized")


def check_coverage(model: nn.Module, plan: Plan) -> None:
    """UnsupportedError if what the plan says is quantized is not quantized in the model."""
    modules = quantized_modules(model)
    if missing := [p.site.name for p in plan.quantized if p.site.name not in modules]:
        raise UnsupportedError(f"planned but not quantized in the model: {', '.join(missing)}")
