"""The nouns of qcompile. Everything else in the package speaks in these; they know torch and nothing more."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import ConfigError, FormatError


@dataclass(frozen=True)
class WeightType:
    """How one weight is stored: ``W = (q - z) * s`` with unsigned integer codes ``q`` of ``bits`` bits.

    ``group_size`` counts input features that share one scale; ``None`` is one group per output channel. Symmetric
    weights have the implied zero point ``2 ** (bits - 1)``.
    """

    bits: int
    symmetric: bool = True
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ConfigError(f"weight bits must be 2 to 8, not {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(
                f"group size must be positive, not {self.group_size}; leave it out for one group per output channel"
            )

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of ``in_features`` weights; the last one may be short."""
        return 1 if self.group_size is None else math.ceil(in_features / self.group_size)


@dataclass(frozen=True)
class ActivationType:
    """How the input of a matrix product is quantized: dynamically per token, or with a stored scale."""

    bits: int
    dynamic: bool = True

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise ConfigError(f"activation bits must be 8 (or 16 for float activations), not {self.bits}")
        if not self.dynamic:
            raise ConfigError("static activation scales are not supported yet; use dynamic ones, for example 'w8a8'")


_SCHEME = re.compile(r"w(?P<w>\d+)a(?P<a>\d+)(_g(?P<g>-?\d+))?(?P<asym>_asym)?(?P<static>_static)?")
_SCHEME_GRAMMAR = "w<bits>a<bits>[_g<group size>][_asym], for example w4a16_g128, w4a16_g32_asym, w8a16, w8a8"


@dataclass(frozen=True)
class Scheme:
    """The numbers of one site; prints and parses as a short name such as ``w4a16_g128_asym`` or ``w8a8``."""

    weight: WeightType
    activation: ActivationType | None = None

    def __post_init__(self) -> None:
        if self.activation and (self.weight.bits != 8 or self.weight.group_size or not self.weight.symmetric):
            raise ConfigError(
                "int8 activations go with symmetric int8 weights per output channel ('w8a8'), "
                f"not with {self.weight.bits}-bit weights, group size {self.weight.group_size}, "
                f"{'symmetric' if self.weight.symmetric else 'asymmetric'}"
            )

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """Parse a scheme name; raises ConfigError that shows the grammar."""
        match = _SCHEME.fullmatch(name)
        if not match:
            raise ConfigError(f"{name!r} is not a scheme name; schemes are written {_SCHEME_GRAMMAR}")
        bits, activation = int(match["w"]), int(match["a"])
        weight = WeightType(bits, symmetric=not match["asym"], group_size=int(match["g"]) if match["g"] else None)
        if activation == 16 and match["static"]:
            raise ConfigError(f"{name!r}: '_static' is about quantized activations, and a16 leaves them float")
        return cls(weight, None if activation == 16 else ActivationType(activation, dynamic=not match["static"]))

    def __str__(self) -> str:
        weight, activation = self.weight, self.activation
        return (
            f"w{weight.bits}a{activation.bits if activation else 16}"
            + (f"_g{weight.group_size}" if weight.group_size else "")
            + ("" if weight.symmetric else "_asym")
            + ("" if activation is None or activation.dynamic else "_static")
        )


@dataclass(frozen=True)
class Site:
    """One quantizable place of a model, found in its graph.

    ``inputs`` labels the tensor it reads: sites with the same label read the same one. ``producer`` says what made
    it (an operator name). ``block`` is the decoder block, or "" outside of any. ``obstacle`` says why it cannot be
    rewritten, if so.
    """

    name: str
    role: str  # "linear" | "lm_head" | "router"
    out_features: int
    in_features: int
    dtype: torch.dtype
    has_bias: bool = False
    inputs: str = ""
    producer: str = ""
    block: str = ""
    tied_to: str = ""
    obstacle: str = ""
    kind: str = "linear"

    @property
    def float_bytes(self) -> int:
        """Bytes of the float weight; zero where it is shared with an embedding that stays."""
        return 0 if self.tied_to else self.out_features * self.in_features * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized weight in the one canonical layout, ``W[o, i] = (q[o, i] - z[o, g]) * s[o, g]``.

    codes        uint8 [out, ceil(in * bits / 8)]: unsigned codes, a little-endian bit stream along ``in``
    scales       float [out, groups]; may be negative or zero
    zeros        uint8 [out, groups], or None for symmetric weights (zero point 2 ** (bits - 1))
    permutation  int32 [in] or None: stored column j is input feature permutation[j]; groups are of stored columns
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    permutation: Tensor | None = None

    def __post_init__(self) -> None:
        out, inn = self.shape
        weight = self.scheme.weight
        groups = (out, weight.groups(inn))
        expected: list[tuple[str, Tensor | None, tuple[int, ...], str, bool]] = [
            ("codes", self.codes, (out, math.ceil(inn * weight.bits / 8)), "uint8", self.codes.dtype == torch.uint8),
            ("scales", self.scales, groups, "float", self.scales.dtype.is_floating_point),
        ]
        if self.zeros is not None:
            expected.append(("zeros", self.zeros, groups, "uint8", self.zeros.dtype == torch.uint8))
        if self.permutation is not None:
            expected.append(("permutation", self.permutation, (inn,), "int32", self.permutation.dtype == torch.int32))
        for name, tensor, shape, dtype, dtype_is_right in expected:
            if tensor is not None and (tuple(tensor.shape) != shape or not dtype_is_right):
                raise FormatError(
                    f"{name} of a {self.scheme} weight [{out}, {inn}] must be {dtype} {list(shape)}, "
                    f"not {tensor.dtype} {list(tensor.shape)}"
                )
        if (self.zeros is None) != weight.symmetric:
            raise FormatError(f"a {self.scheme} weight {'has no' if weight.symmetric else 'needs'} zero points")

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name, without those that are None."""
        named = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros, "permutation": self.permutation}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


@dataclass(frozen=True)
class PlannedSite:
    """The answer for one site: its scheme (None stays float), method and kernel, and the reason."""

    site: Site
    scheme: Scheme | None
    reason: str
    method: str = ""
    options: tuple[tuple[str, object], ...] = ()
    kernel: str = ""
    bytes_after: int = 0

    @property
    def quantized(self) -> bool:
        """Whether this site will be (or was) quantized."""
        return self.scheme is not None


@dataclass(frozen=True)
class Plan:
    """What will be done to every site, decided before any work. Print it, edit it with ``override``, pass it on."""

    device: str
    sites: tuple[PlannedSite, ...]
    other_bytes: int = 0  # parameters and buffers that belong to no site
    notes: tuple[str, ...] = ()

    def __iter__(self):
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> PlannedSite:
        for planned in self.sites:
            if planned.site.name == name:
                return planned
        raise KeyError(name)

    @property
    def quantized(self) -> tuple[PlannedSite, ...]:
        """The sites that have a scheme."""
        return tuple(p for p in self.sites if p.quantized)

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters and buffers of the float model."""
        return self.other_bytes + sum(p.site.float_bytes for p in self.sites)

    @property
    def bytes_after(self) -> int:
        """Estimated bytes of the quantized model."""
        return self.other_bytes + sum(p.bytes_after for p in self.sites)

    def override(self, pattern: str, scheme: str | None, *, method: str = "rtn", **options: object) -> Plan:
        """Return a plan in which the sites that match ``pattern`` have another scheme (None or "float": float)."""
        from .planning import override

        return override(self, pattern, scheme, method, options)

    def __str__(self) -> str:
        from .reporting import plan_text

        return plan_text(self)


@dataclass(frozen=True)
class SiteResult:
    """What happened to one site. ``sqnr`` is the weight's signal-to-noise ratio in dB (None: float, or unknown)."""

    planned: PlannedSite
    bytes_after: int
    sqnr: float | None = None

    @property
    def quantized(self) -> bool:
        """Whether the site is quantized in the model; a loaded one is, though its float weight is not known."""
        return self.planned.quantized and (self.sqnr is not None or self.planned.method == "stored")


@dataclass(frozen=True)
class PassRecord:
    """What one pass did in one graph; ``rejected`` holds (node, reason) of every near-miss."""

    name: str
    numerics: str
    matches: int
    nodes_before: int
    nodes_after: int
    rejected: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class GraphRecord:
    """One compilation: its inputs' shapes, its passes, its regions (how many were compiled, how many reused it)."""

    inputs: str
    nodes: int
    passes: tuple[PassRecord, ...]
    regions: int
    compiled_regions: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """What was done, what was not, and why; numbers per site. Prints as a table."""

    model: str
    plan: Plan
    sites: tuple[SiteResult, ...]
    seconds: float = 0.0
    passes: tuple[PassRecord, ...] = ()
    graphs: tuple[GraphRecord, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def coverage(self) -> float:
        """Share of the planned sites that are quantized in the model; 1.0 unless something is wrong."""
        planned = len(self.plan.quantized)
        return sum(r.quantized for r in self.sites) / planned if planned else 0.0

    def with_graphs(self, graphs: tuple[GraphRecord, ...]) -> Report:
        """The same report, with the compilations seen so far."""
        return dataclasses.replace(self, graphs=graphs)

    def __str__(self) -> str:
        from .reporting import report_text

        return report_text(self)

    def to_dict(self) -> dict:
        """The same facts as plain data, for ``json.dumps``."""
        from .reporting import report_dict

        return report_dict(self)

    def to_html(self) -> str:
        """The same facts as one self-contained HTML page."""
        from .reporting import report_html

        return report_html(self)

    def _repr_html_(self) -> str:
        from .reporting import report_html

        return report_html(self, page=False)


@dataclass
class State:
    """What a quantized model carries: its plan, its report, and its rewritten graph (names instead of weights)."""

    plan: Plan
    report: Report
    graph: torch.fx.GraphModule | None = field(default=None, repr=False)

    def __deepcopy__(self, memo: dict) -> State:
        return State(self.plan, self.report, self.graph)  # nothing in it is ever changed, and the graph has no weights

    def __getstate__(self) -> dict:
        return {"plan": self.plan, "report": self.report, "graph": None}  # traced again when it is needed
