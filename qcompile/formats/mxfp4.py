"""The experts of gpt-oss in MXFP4, as OpenAI published them; read only, since compressed-tensors stores the same.

The experts of a layer are fused: blocks uint8 [experts, rows, in / 32, 16], byte i of a block holds column 2 i in its
low 4 bits and 2 i + 1 in its high ones (e2m1); scales uint8 [experts, rows, in / 32] are exponents of two, plus 127.
Rows of gate_up_proj alternate between gate and up. Everything else is float, biases of experts too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ..errors import FormatError, UnsupportedError
from ..types import PackedWeight, Scheme
from . import Format, Get, Shape, StoredSite, TensorHeader
from ._headers import finite
from ._qweight import section_of

_NAME = re.compile(r"(.+)\.(\d+)\.(gate|up|down)_proj")
_FUSED = {"gate": ("gate_up_proj", 0, 2), "up": ("gate_up_proj", 1, 2), "down": ("down_proj", 0, 1)}  # first row, step
_SCHEME = Scheme.parse("wmxfp4a16")


class Mxfp4(Format):
    """Reads fused experts."""

    name = "mxfp4"

    def detect(self, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> bool:
        """Whether config.json says so."""
        return section_of(config).get("quant_method") == "mxfp4"

    def sites(
        self,
        config: Mapping[str, Any],
        headers: Mapping[str, TensorHeader],
        linears: Mapping[str, Shape],
        experts: Collection[str] = (),
    ) -> tuple[StoredSite, ...]:
        """Every quantized Linear of an expert; see ``Format.sites``."""
        matches = [match for name in linears if name in experts and (match := _NAME.fullmatch(name))]
        counts = Counter((match[1], match[3]) for match in matches)
        found = (_site(match, linears[match[0]], counts[match[1], match[3]], headers) for match in matches)
        return tuple(site for site in found if site)

    def read(self, site: StoredSite, get: Get) -> PackedWeight:
        """The canonical weight; the bytes of its rows."""
        (out, inn), (blocks, scales) = site.shape, site.tensors
        expert, rows = site.layout["expert"], slice(site.layout["first"], None, site.layout["step"])
        codes = get(blocks, expert).view(-1, inn // 2)[rows].contiguous()
        exponents = get(scales, expert).view(-1, inn // 32)[rows].contiguous()
        return PackedWeight(site.scheme, (out, inn), codes, finite(exponents.view(torch.float8_e8m0fnu), scales))

    def order_of(self, site: StoredSite) -> str:
        """Gate and up alternate; an expert is read as a whole."""
        return ""

    def refuses(self, scheme: Scheme, shape: Shape, packed: PackedWeight | None = None) -> str:
        """Always, since it is not written."""
        return "it is only read; use compressed-tensors, which stores the same weights"

    def write(self, name: str, packed: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        """UnsupportedError: see ``refuses``."""
        raise UnsupportedError(self.refuses(packed.scheme, packed.shape))

    def quantization_config(
        self, sites: Sequence[StoredSite], float_modules: Sequence[str], floats: Sequence[str] = ()
    ) -> dict[str, Any]:
        """UnsupportedError: see ``refuses``."""
        raise UnsupportedError(self.refuses(sites[0].scheme, sites[0].shape))


FORMAT = Mxfp4()


def _site(match: re.Match[str], shape: Shape, experts: int, headers: Mapping[str, TensorHeader]) -> StoredSite | None:
    """One Linear of an expert, or None when the layer is float."""
    name, first, step = _FUSED[match[3]]
    (out, inn), stem = shape, f"{match[1]}.{name}"
    tensors = (f"{stem}_blocks", f"{stem}_scales")
    present = [headers[tensor] for tensor in tensors if tensor in headers]
    if not present:
        return None
    wanted = {tensors[0]: (experts, step * out, inn // 32, 16), tensors[1]: (experts, step * out, inn // 32)}
    for tensor, expected in wanted.items():
        header = headers.get(tensor)
        if header is None:
            raise FormatError(f"{present[0].file}: {tensor} is missing, but {present[0].name} is there")
        if header.dtype != "U8" or header.shape != expected or inn % 32:
            raise FormatError(
                f"{header.file}: {tensor} is {header.dtype} {list(header.shape)}, but must be U8 {list(expected)} for "
                f"{experts} experts of shape {list(shape)}"
            )
    layout = {"expert": int(match[2]), "first": first, "step": step}
    return StoredSite(match[0], _SCHEME, shape, tensors, layout)
