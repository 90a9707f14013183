"""AWQ: what AutoAWQ, llm-awq, gptqmodel and AutoRound write. 4-bit weights in one of three layouts.

Of a Linear [out, in] with G groups (AutoAWQ 0.2.9, ``awq/modules/linear``; checked against files of its packers):

    gemm       qweight int32 [in, out / 8], qzeros int32 [G, out / 8], scales float16 [G, out]. In word c the 4 bits at
               4 k are output 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[k]. gptqmodel stores bfloat16 scales for a bfloat16 model
    gemv       qweight int32 [out, in / 8], qzeros int32 [out, z], scales float16 [out, 8 z], all in natural order;
               groups are padded with 0 to 8 z, where z is a multiple of 4 for group size 32, 2 for 64, else 1
    gemv_fast  qweight int16 [out / 4, in]: 4 rows are interleaved in blocks of 64 columns, see ``_fast_codes``; scales
    (llm-awq)  float16 [8 z, out]; -z * s in float16 [8 z, out], named qzeros by AutoAWQ and scaled_zeros by llm-awq

``W[o, i] = (q[o, i] - z[o, i // group_size]) * s[o, i // group_size]``, one rounding in the scales' dtype.

Config: bits (w_bit), group_size (q_group_size), zero_point, version; modules_to_not_convert lists substrings of names.
Which tensors exist decides what is quantized; a module that the list names in full must not be. With "zero_point":
false or "sym": true every z must be 8. gemm is written, with "zero_point": true, which vLLM's fast kernels want, and
"sym": true when every weight is symmetric; scales as float16, and refused where that would change them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..errors import FormatError, UnsupportedError
from ..types import PackedWeight, Scheme, WeightType
from . import Format, Get, Shape, StoredSite, TensorHeader
from ._headers import FLOATS, Stored, Wanted, by_module, every, finite, fits
from ._qweight import (
    AUTO_ROUND,
    check_module,
    half_refusal,
    input_order,
    is_permuted,
    method_of,
    packing_of,
    scheme_of,
    section_of,
    settings_of,
)
from ._words import from_words, to_words, unpack_words

_MARKS = ("qweight", "qzeros", "scaled_zeros")
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the columns in a word of gemm
_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)
_LAYOUTS = {"gemm": "gemm", "exllama": "gemm", "ipex": "gemm", "gemv": "gemv", "gemv_fast": "fast", "llm_awq": "fast"}


class Awq(Format):
    """Reads every layout, writes gemm."""

    name = "awq"
    side_files = ("quant_config.json",)

    def detect(self, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> bool:
        """Whether config.json says so."""
        return method_of(section_of(config)) == "awq"

    def sites(
        self,
        config: Mapping[str, Any],
        headers: Mapping[str, TensorHeader],
        linears: Mapping[str, Shape],
        experts: Collection[str] = (),
    ) -> tuple[StoredSite, ...]:
        """Every quantized Linear; see ``Format.sites``."""
        section = section_of(config)
        layout = _layout(section)
        modules = by_module(headers, linears, _MARKS)
        return every(linears, lambda name: _site(name, linears[name], modules.get(name, {}), section, layout))

    def read(self, site: StoredSite, get: Get) -> PackedWeight:
        """The canonical weight; bit for bit what AutoAWQ's packers were given."""
        (out, inn), weight, layout = site.shape, site.scheme.weight, site.layout["layout"]
        groups, zeros_name = weight.groups(inn), f"{site.name}.{site.layout['zeros']}"
        scales, stored = finite(get(f"{site.name}.scales"), f"{site.name}.scales"), get(zeros_name)
        words = get(f"{site.name}.qweight")
        if layout == "gemm":
            codes = numerics.pack_codes(_unpack_gemm(words, out).t().contiguous(), 4)
            scales, zeros = scales.t(), _unpack_gemm(stored, out).t()
        elif layout == "gemv":
            codes = from_words(words, 4, inn, False)
            scales, zeros = scales[:, :groups], unpack_words(stored, 4, groups, False)
        else:
            codes = numerics.pack_codes(_fast_codes(words), 4)
            scales = scales[:groups].t()
            zeros = _integer_zeros(stored[:groups].t(), scales, zeros_name)
        if weight.symmetric and not bool((zeros == 8).all()):
            seen = ", ".join(map(str, zeros.unique().tolist()))
            raise FormatError(
                f"{zeros_name} holds the zero points {seen}, but config.json says that weights are symmetric, so that "
                "all must be 8; set zero_point to true if they are right"
            )
        kept = None if weight.symmetric else zeros.contiguous()
        return PackedWeight(site.scheme, site.shape, codes, scales.contiguous(), kept)

    def order_of(self, site: StoredSite) -> str:
        """Of gemm inputs come first; the others pad groups or interleave rows."""
        return "io" if site.layout["layout"] == "gemm" else ""

    def refuses(self, scheme: Scheme, shape: Shape, packed: PackedWeight | None = None) -> str:
        """Why a weight cannot be written."""
        (out, inn), weight = shape, scheme.weight
        if scheme.activation:
            return "AWQ has no quantized activations; use compressed-tensors"
        if weight.number != "int":
            return f"AWQ stores integers, not {weight.number}; use compressed-tensors"
        if weight.bits != 4:
            return f"AWQ stores 4 bits, not {weight.bits}; use gptq or compressed-tensors"
        if out % 8:
            return f"AWQ needs a multiple of 8 output features, not {out}"
        if weight.group_size and inn % weight.group_size:
            return f"the group size {weight.group_size} does not divide its {inn} input features, as AWQ readers expect"
        if packed is None:
            return ""
        if is_permuted(packed):
            return "AWQ cannot store columns in another order (act-order); use gptq or compressed-tensors"
        return half_refusal(packed.scales)

    def write(self, name: str, packed: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """The tensors of one module; the inverse of ``read``."""
        zeros = packed.zeros
        if zeros is None:
            zeros = torch.full(packed.scales.shape, 8, dtype=torch.uint8)
        tensors = {
            "qweight": _pack_gemm(input_order(packed).t()),
            "qzeros": _pack_gemm(zeros.t()),
            "scales": packed.scales.t().to(torch.float16).contiguous(),
        }
        return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}

    def quantization_config(
        self, sites: Sequence[StoredSite], float_modules: Sequence[str], floats: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The section of config.json; UnsupportedError for what its one group size and its substrings cannot say."""
        by_size: dict[int, str] = {}
        for site in sites:
            by_size.setdefault(site.scheme.weight.group_size or -1, site.name)
        if len(by_size) > 1:
            sizes = " and ".join(f"{size} ({name})" for size, name in by_size.items())
            raise UnsupportedError(
                f"AWQ has one group size for all modules, not {sizes}; use gptq or compressed-tensors"
            )
        for skipped in float_modules:
            if caught := [site.name for site in sites if skipped in site.name]:
                raise UnsupportedError(
                    f"AWQ skips modules by parts of their names: leaving {skipped} float would leave {caught[0]} float "
                    "as well; use gptq or compressed-tensors"
                )
        symmetric = all(site.scheme.weight.symmetric for site in sites)
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": next(iter(by_size)),
            "zero_point": True,
            **({"sym": True} if symmetric else {}),
            "modules_to_not_convert": list(float_modules) or None,
        }


FORMAT = Awq()


# ------------------------------------------------------------------------------------------- configuration, headers


def _layout(section: Mapping[str, Any]) -> str:
    if section.get("quant_method") in AUTO_ROUND:
        if packing_of(section) not in ("auto_round:auto_awq", "auto_round:awq"):
            raise UnsupportedError(f"config.json: the AutoRound layout {packing_of(section)!r} is not read")
        return "gemm"
    version = str(section.get("version") or section.get("checkpoint_format") or section.get("format") or "gemm")
    layout = _LAYOUTS.get(version.lower().replace("-", "_"))
    if layout is None:
        raise UnsupportedError(f"config.json: the AWQ version {version!r} is not read; known: {', '.join(_LAYOUTS)}")
    return layout


def _site(name: str, shape: Shape, stored: Stored, section: Mapping[str, Any], layout: str) -> StoredSite | None:
    """The Linear ``name`` as stored, or None when it is float; the tensors that exist decide."""
    marks = [stored[mark] for mark in _MARKS if mark in stored]
    if not marks:
        return None
    settings, origin = settings_of(name, section)
    skipped = next((part for part in _names(section) if _is_whole(part, name)), None)
    if settings is None or skipped is not None:
        origin = f"modules_to_not_convert has {skipped!r}" if skipped else origin
        raise FormatError(
            f"{marks[0].file}: {marks[0].name} is stored quantized, but config.json excludes {name} ({origin})"
        )
    symmetric = settings.get("zero_point") is False or settings.get("sym") is True
    scheme = scheme_of(name, settings, origin, symmetric, (4,))
    zeros = "scaled_zeros" if "scaled_zeros" in stored else "qzeros"
    wanted = _wanted(layout, shape, scheme.weight, zeros)
    about = "" if fits(stored, wanted) else _about(name, stored, scheme, shape, layout, zeros)
    check_module(name, stored, wanted, about)
    if layout == "fast" and (shape[0] % 4 or shape[1] % 64):
        raise UnsupportedError(f"{name}: {_called(layout)} packs 4 rows by 64 columns, which {list(shape)} is not")
    tensors = tuple(f"{name}.{suffix}" for suffix in wanted)
    return StoredSite(name, scheme, shape, tensors, {"layout": layout, "zeros": zeros})


def _about(name: str, stored: Stored, scheme: Scheme, shape: Shape, layout: str, zeros: str) -> str:
    """What the config says, and what the tensors look like instead."""
    about = f"config.json makes {name} {scheme} in the layout {_called(layout)}, of shape {list(shape)}"
    for other in ("gemm", "gemv", "fast"):
        if other != layout and fits(stored, _wanted(other, shape, scheme.weight, zeros)):
            about += f"; but its tensors are those of the layout {_called(other)}"
    if fits(stored, {"qweight": (("I32",), (shape[1] // 8, shape[0]))}):
        about += "; qweight has the shape of GPTQ"
    return about


def _names(section: Mapping[str, Any]) -> Iterable[str]:
    parts = section.get("modules_to_not_convert") or ()
    if isinstance(parts, str) or not all(isinstance(part, str) for part in parts):
        raise FormatError(f"config.json: modules_to_not_convert must be a list of names, not {parts!r}")
    return parts


def _is_whole(part: str, name: str) -> bool:
    """Whether a skipped part covers whole components of a name: then every reader agrees that it is skipped.

    As a mere substring ("mlp.gate" of "mlp.gate_proj") it means so to AutoAWQ and vLLM, not to transformers.
    """
    return f".{part.strip('.')}." in f".{name}."


def _called(layout: str) -> str:
    return " or ".join(repr(version) for version, meant in _LAYOUTS.items() if meant == layout)


def _wanted(layout: str, shape: Shape, weight: WeightType, zeros: str) -> Wanted:
    (out, inn), groups = shape, weight.groups(shape[1])
    if layout == "gemm":
        words = -(-out // 8)
        return {
            "qweight": (("I32",), (inn, words)),
            zeros: (("I32",), (groups, words)),
            "scales": (FLOATS, (groups, out)),
        }
    multiple = {32: 4, 64: 2}.get(weight.group_size or inn, 1)
    blocks = -(-groups // 8 // multiple) * multiple
    if layout == "gemv":
        return {
            "qweight": (("I32",), (out, -(-inn // 8))),
            zeros: (("I32",), (out, blocks)),
            "scales": (FLOATS, (out, 8 * blocks)),
        }
    padded = (8 * blocks, out)
    return {"qweight": (("I16",), (out // 4, inn)), zeros: (FLOATS, padded), "scales": (FLOATS, padded)}


# ------------------------------------------------------------------------------------------------------ tensor data


def _unpack_gemm(words: Tensor, out: int) -> Tensor:
    """Codes uint8 [n, out] of int32 words [n, ceil(out / 8)]."""
    columns = unpack_words(words, 4, words.shape[1] * 8, False).unflatten(1, (-1, 8))
    return columns[..., list(_INVERSE)].flatten(1)[:, :out]


def _pack_gemm(codes: Tensor) -> Tensor:
    """int32 words [n, out / 8] of codes uint8 [n, out]."""
    columns = codes.unflatten(1, (-1, 8))[..., list(_ORDER)].flatten(1)
    return to_words(numerics.pack_codes(columns, 4))


def _fast_codes(words: Tensor) -> Tensor:
    """Codes uint8 [out, in] of int16 words [out / 4, in], in the order of AutoAWQ's ``pack_intweight``.

    The packer permuted every 32 columns of a row, viewed as (a: 4, b: 4, c: 2), to (b, a, c), and then, in every 8 of
    them, viewed as (a: 4, c: 2), to (c, a). Of 4 rows, it then laid each 64 columns one after the other, and put 4
    consecutive codes into a word.
    """
    quarter, inn = words.shape
    nibbles = torch.stack([(words >> (4 * t)) & 15 for t in range(4)], -1).to(torch.uint8)
    rows = nibbles.view(quarter, inn // 64, 4, 64).transpose(1, 2).reshape(4 * quarter, inn)
    eights = rows.reshape(-1, inn // 32, 4, 2, 4).transpose(3, 4)
    return eights.reshape(-1, inn // 32, 4, 4, 2).transpose(2, 3).reshape(4 * quarter, inn)


def _integer_zeros(scaled: Tensor, scales: Tensor, name: str) -> Tensor:
    """Zero points uint8 of ``-z * s``; FormatError where they are no integers of 4 bits."""
    safe = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    zeros = torch.round(-scaled.float() / safe)
    again = (-(zeros * scales.float())).to(scaled.dtype)
    if not (torch.isfinite(scaled).all() and bool(((zeros >= 0) & (zeros <= 15) & (again == scaled)).all())):
        raise FormatError(f"{name} does not hold -z * scale for zero points z of 0 to 15")
    return zeros.to(torch.uint8)
