"""Which chip is planned for, and how weights are laid out on it: what constraints depend on besides shapes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from ...errors import ConfigError, did_you_mean

WEIGHT_QUANT_INT8 = "npu_weight_quant_batchmatmul of int8 weights"
WEIGHT_QUANT_INT4 = "npu_weight_quant_batchmatmul of int4 weights"
STATIC_MATMUL = "npu_quant_matmul with static scales"
TOKEN_MATMUL = "npu_quant_matmul with a scale per token"
GROUPED_MATMUL = "npu_grouped_matmul of quantized weights"
GROUPED_FLOAT = "npu_grouped_matmul of bfloat16 and float16 weights"
DYNAMIC_QUANT = "npu_dynamic_quant"
ROUTING = "npu_moe_init_routing_v2 of int8 tokens"
NORMS = "npu_add_rms_norm_quant"
NZ = "FRACTAL_NZ weights as they are laid out here"

_EVERYTHING = frozenset(
    [
        WEIGHT_QUANT_INT8, WEIGHT_QUANT_INT4, STATIC_MATMUL, TOKEN_MATMUL, GROUPED_MATMUL, GROUPED_FLOAT,
        DYNAMIC_QUANT, ROUTING, NORMS, NZ,
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Soc:
    """One generation of chips: float types, and the operations that are documented for it (op-plugin, August 2026)."""

    name: str
    series: str
    dtypes: tuple[torch.dtype, ...]
    operations: frozenset[str]


SOCS = (
    Soc("Ascend910B", "Atlas A2", (torch.bfloat16, torch.float16), _EVERYTHING),
    Soc("Ascend910_93", "Atlas A3", (torch.bfloat16, torch.float16), _EVERYTHING),
    Soc("Ascend310P", "Atlas inference", (torch.float16,), frozenset([WEIGHT_QUANT_INT8, STATIC_MATMUL])),
    Soc("Ascend950", "Atlas A5", (torch.bfloat16, torch.float16), frozenset()),
)


@dataclass(frozen=True)
class Target:
    """``nz``: store weights as FRACTAL_NZ wherever their shapes allow it."""

    soc: Soc = SOCS[0]
    nz: bool = True


_CHOSEN: ContextVar[Target | None] = ContextVar("npu_target", default=None)


def find_soc(name: str) -> Soc:
    """The generation of a chip such as "Ascend910B2" or "Ascend910_9391"; ConfigError for an unknown one."""
    found = [soc for soc in SOCS if name.startswith(soc.name)]
    if not found:
        known = [soc.name for soc in SOCS]
        raise ConfigError(f"there is no chip {name!r}.{did_you_mean(name, known)}")
    return found[0]


def current() -> Target:
    """What ``target`` chose; otherwise the chip that is attached, and without one an Atlas A2."""
    return _CHOSEN.get() or Target(_attached())


def _attached() -> Soc:
    npu = getattr(torch, "npu", None)  # torch_npu puts it there
    if npu is None or not npu.is_available():
        return SOCS[0]
    name = npu.get_device_name()
    return next((soc for soc in SOCS if re.match(soc.name, name)), SOCS[0])


@contextmanager
def target(soc: str | None = None, nz: bool | None = None) -> Iterator[Target]:
    """Plan, load and quantize for the chip ``soc`` ("Ascend910B" ...), with or without FRACTAL_NZ weights."""
    chosen = current()
    if soc is not None:
        chosen = dataclasses.replace(chosen, soc=find_soc(soc))
    if nz is not None:
        chosen = dataclasses.replace(chosen, nz=nz)
    token = _CHOSEN.set(chosen)
    try:
        yield chosen
    finally:
        _CHOSEN.reset(token)
