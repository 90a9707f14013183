"""Which GPU is planned for: the one that is attached, or any other by name, such as "sm_80"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from ...errors import ConfigError

SMS = {(8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}
"""Multiprocessors of the largest common chip of each capability, to plan for where none is attached."""


SHARED = {
    (8, 0): 163 * 2**10, (8, 7): 163 * 2**10, (9, 0): 227 * 2**10, (10, 0): 227 * 2**10, (10, 3): 227 * 2**10,
}  # fmt: skip
"""Bytes of shared memory that a block can have (CUDA programming guide, "technical specifications"); of others, from
8.6 on, 99 KiB. 64 KiB of AMD's (CDNA 3 ISA)."""


@dataclass(frozen=True)
class Target:
    """A GPU: compute capability of NVIDIA's, or the architecture of AMD's (capability (0, 0)); multiprocessors.

    device: the name of the chip that is attached, such as "NVIDIA H200"; "" for one that is only planned for.
    """

    capability: tuple[int, int] = (9, 0)
    arch: str = ""
    multiprocessors: int = 132
    device: str = ""

    @property
    def name(self) -> str:
        """ "sm_90", "gfx942" ..."""
        return self.arch or "sm_{}{}".format(*self.capability)

    @property
    def has_wgmma(self) -> bool:
        """Whether tensor cores take a left operand from the registers of a whole warp group."""
        return self.capability[0] == 9

    @property
    def has_pdl(self) -> bool:
        """Whether a kernel can start before the one before it is complete (programmatic dependent launch)."""
        return self.capability >= (9, 0)

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a block can have."""
        return 64 * 2**10 if self.arch else SHARED.get(self.capability, 99 * 2**10)

    @property
    def has_fp8(self) -> bool:
        """Whether tensor cores multiply e4m3."""
        return self.capability >= (8, 9)


_CHOSEN: ContextVar[Target | None] = ContextVar("cuda_target", default=None)


def parse(name: str) -> Target:
    """The GPU called "sm_90" or "gfx942"; ConfigError for any other word."""
    if match := re.fullmatch(r"sm_(\d+)(\d)a?", name):
        capability = int(match[1]), int(match[2])
        return Target(capability, "", SMS.get(capability, 108))
    if re.fullmatch(r"gfx\w+", name):
        return Target((0, 0), name, 304)
    raise ConfigError(f"there is no GPU {name!r}; name its architecture, such as sm_80, sm_90 or gfx942")


def current() -> Target:
    """What ``target`` chose; otherwise the GPU that is attached, and without one an H100 or H200."""
    return _CHOSEN.get() or attached()


def attached() -> Target:
    """The GPU that torch uses now; without one an H100 or H200."""
    if not torch.cuda.is_available():
        return Target()
    properties = torch.cuda.get_device_properties()
    if torch.version.hip:
        return Target(
            (0, 0), properties.gcnArchName.partition(":")[0], properties.multi_processor_count, properties.name
        )
    return Target((properties.major, properties.minor), "", properties.multi_processor_count, properties.name)


@contextmanager
def target(soc: str | None = None) -> Iterator[Target]:
    """Plan, load and quantize for the GPU ``soc`` ("sm_80", "gfx942" ...)."""
    chosen = current() if soc is None else parse(soc)
    token = _CHOSEN.set(chosen)
    try:
        yield chosen
    finally:
        _CHOSEN.reset(token)
