"""At home in transformers: quantize while ``from_pretrained`` loads.

    config = qcompile.TransformersConfig("w4a16_g128")
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)

Registered through transformers' own registration when ``qcompile.TransformersConfig`` is first used.
"""

from __future__ import annotations

import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .api import dequantize, quantize, report
from .config import QuantConfig, as_config
from .errors import ConfigError, UnsupportedError, did_you_mean
from .planning import find_backend
from .reporting import summary

METHOD = "qcompile"
_OPTIONS = inspect.signature(quantize).parameters.keys() - {"model", "config", "device"}

logger = logging.get_logger(f"transformers.{METHOD}")


@register_quantization_config(METHOD)
class TransformersConfig(QuantizationConfigMixin):
    """What ``from_pretrained(path, quantization_config=...)`` quantizes, and how.

    config: as for ``qcompile.quantize``: a preset or scheme name, a QuantConfig, a dict, a YAML or JSON file. options:
    the other arguments of ``quantize``, above all ``data``. The device is that of the model (``device_map``), and the
    default of ``progress`` follows transformers' ``disable_progress_bar``.

    The float model is in memory until it is quantized; ``qcompile.load(path, config=...)`` quantizes while it reads.
    Raises ConfigError for what is not well-formed, before anything is loaded.
    """

    def __init__(
        self, config: QuantConfig | dict[str, Any] | str | Path = "rtn", *, quant_method: str = METHOD, **options: Any
    ) -> None:
        if quant_method != METHOD:
            raise ConfigError(f"quant_method is {METHOD!r} here, not {quant_method!r}")
        for name in options.keys() - _OPTIONS:
            raise ConfigError(f"quantize has no option {name!r}.{did_you_mean(name, _OPTIONS)}")
        self.quant_method: Any = METHOD
        self.config = as_config(config)
        self.options = options

    def __deepcopy__(self, memo: dict) -> TransformersConfig:
        return copy.copy(self)  # transformers copies model configs often; calibration data need not be copyable

    def to_dict(self) -> dict[str, Any]:
        """What config.json can hold: without the options, which may be data."""
        return {"quant_method": METHOD, "config": self.config.model_dump(exclude_defaults=True)}


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """Quantizes a float model when transformers has loaded it."""

    quantization_config: TransformersConfig

    def __init__(self, quantization_config: TransformersConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized:
            raise ConfigError(
                "this config.json asks for quantizing with qcompile, and names no format that its weights are in: "
                "delete its quantization_config and pass quantization_config=qcompile.TransformersConfig(...)"
            )

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """UnsupportedError before loading, for a device that is not there or more than one."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map or "cpu"]
        devices = {str(torch.device("cuda", p) if isinstance(p, int) else p) for p in places}
        if len(devices) > 1:
            raise UnsupportedError(f"qcompile quantizes a model on one device, not over {', '.join(sorted(devices))}")
        if (device := devices.pop()) not in ("auto", "balanced", "balanced_low_0", "sequential"):
            find_backend(device)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise UnsupportedError(f"the model was spread over {model.hf_device_map}; pass device_map={{'': device}}")
        options: dict[str, Any] = {"progress": logging.is_progress_bar_enabled() and sys.stderr.isatty()}
        options |= self.quantization_config.options
        del model.hf_quantizer  # by which quantize recognises models that are quantized already
        quantize(model, self.quantization_config.config, device=str(model.device), **options)
        self.quantization_config = TransformersConfig(self.quantization_config.config)  # lets go of the data
        model.config.quantization_config = self.quantization_config
        model.hf_quantizer = self
        logger.info(summary(report(model)))
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize(model)

    def is_serializable(self) -> bool:
        """``model.save_pretrained`` writes compressed-tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Integer weights have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Not by ``generate`` on its own, with another backend: ``torch.compile(model, backend="qcompile")`` does."""
        return False
