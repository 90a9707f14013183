"""What the kernels of this backend share: refusals, a weight that is prepared where there is room, rows and order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...kernels import Kernel
from ...types import PackedWeight, Scheme, Site
from .layouts import Fragments
from .targets import Target, current


class TritonKernel(Kernel):
    """A kernel written in Triton; ``what`` completes "it computes ..." for schemes of other numbers.

    ``order``, where there are several, is that in which its weight is stored: that of wgmma is for GPUs that have it,
    every other NVIDIA GPU from Ampere on, and AMD's, take the other one.
    """

    portable = False  # Python launches it
    what = ""
    order: Fragments = "int8"

    def __init__(self, order: Fragments) -> None:
        self.order = order
        self.name = f"{self.name}_{'sm90' if order == 'wgmma' else 'sm80'}"

    def refuses(self, site: Site, scheme: Scheme) -> str:
        if not self.computes(scheme):
            return f"computes {self.what}, not {scheme}"
        gpu = current()
        if gpu.capability < (8, 0) and not gpu.arch:
            return f"Triton's tensor cores start with compute capability 8.0, and {gpu.name} is older"
        if self.order == "wgmma" and not gpu.has_wgmma:
            return f"its weights are laid out for wgmma, which {gpu.name} does not have"
        return self.refuses_on(gpu, site, scheme)

    def refuses_on(self, gpu: Target, site: Site, scheme: Scheme) -> str:
        """The same, for a GPU that has these tensor cores."""
        return ""

    def prepare(self, packed: PackedWeight) -> list[Tensor]:
        """On the device of the weight; where that has no room for what is needed meanwhile, on the CPU."""
        device = packed.codes.device
        try:
            return self.arrange(packed)
        except torch.OutOfMemoryError:
            stored = packed.tensors() | packed.activation_tensors()
            on_cpu = PackedWeight(packed.scheme, packed.shape, **{name: t.cpu() for name, t in stored.items()})
        tensors = self.arrange(on_cpu)
        try:
            return [tensor.to(device) for tensor in tensors]
        except torch.OutOfMemoryError:
            size = sum(t.numel() * t.element_size() for t in tensors)
            raise UnsupportedError(
                f"no room on {device} for a {packed.scheme} weight {list(packed.shape)} of {size / 2**20:.0f} MiB; "
                "what is done so far can be used where there is room: model.to('cpu')"
            ) from None

    def arrange(self, packed: PackedWeight) -> list[Tensor]:
        """The prepared tensors, on the device of ``packed``."""
        raise NotImplementedError


def in_stored_order(x: Tensor, permutation: Sequence[Tensor], ends: Tensor | None) -> Tensor:
    """Columns of x in the order of the weight's: that of each row's expert where there are several."""
    if not permutation:
        return x
    if ends is None:
        return x.index_select(-1, permutation[0])
    return x.gather(1, permutation[0].index_select(0, owners(x, ends)).long())


def owners(rows: Tensor, ends: Tensor) -> Tensor:
    """The expert of each of the sorted rows; of rows that belong to nobody the last one."""
    every = torch.arange(rows.shape[0], dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends, every, right=True).clamp(max=ends.shape[0] - 1)
