"""The nouns of qcompile. Everything else in the package speaks in these; they know torch and nothing more."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import FormatError
from .schemes import ActivationType, Scheme, WeightType

__all__ = [
    "ActivationType", "FrontierPoint", "GraphRecord", "Moment", "PackedWeight", "PassRecord", "Plan", "PlannedSite",
    "Report", "Scheme", "Sensitivity", "Site", "SiteResult", "State", "WeightType",
]  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One quantizable place of a model, found in its graph.

    ``inputs`` labels the tensor it reads: sites with the same label read the same one. ``producer`` says what made
    it (an operator name). ``block`` is the decoder block, or "" outside of any. ``obstacle`` says why it cannot be
    rewritten, if so. A site of kind "experts" is one projection of all ``experts`` of a layer; its features are those
    of one expert, gate and up together.
    """

    name: str
    role: str  # "linear" | "lm_head" | "router" | "experts"
    out_features: int
    in_features: int
    dtype: torch.dtype
    has_bias: bool = False
    inputs: str = ""
    producer: str = ""
    block: str = ""
    tied_to: str = ""
    obstacle: str = ""
    kind: str = "linear"  # | "experts"
    experts: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (experts, out, in)."""
        features = (self.out_features, self.in_features)
        return (self.experts, *features) if self.kind == "experts" else features

    @property
    def float_bytes(self) -> int:
        """Bytes of the float weight; zero where it is shared with an embedding that stays."""
        return 0 if self.tied_to else math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized weight in the one canonical layout: ``W[o, i] = (q[o, i] - z[o, g]) * s[o, g]``, or ``q * s``.

    shape is (out, in), or (experts, out, in); then every tensor has the experts as its first dimension.

    codes        uint8 [out, ceil(in * bits / 8)]: unsigned codes (of small floats: their bits), a little-endian bit
                 stream along ``in``
    scales       float [out, groups]; [ceil(out / rows), ceil(in / columns)] of blocks; [1, 1] per tensor. May be
                 negative or zero. Those of nvfp4 are float8_e4m3fn, of the mx formats float8_e8m0fnu
    zeros        uint8 [out, groups], or None for symmetric weights (zero point 2 ** (bits - 1))
    permutation  int32 [in] or None: stored column j is input feature permutation[j]; groups are of stored columns
    outer        float32 [1], by which nvfp4 divides its scales; None for every other type
    input_scale  float32 [1]: step of static activations; what nvfp4 activations divide their scales by. Positive
    input_zero   int32 [1]: their zero point in the signed range, unless they are symmetric
    alpha        float32 [1]: share of a row's maximum at which clipped activations are clamped, above 0 and up to 1

    FormatError for a tensor that is missing, or that is there without need; for shapes, dtypes and values (of outer,
    input_scale, input_zero and alpha; where they can be read) that are not as said.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    permutation: Tensor | None = None
    outer: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None
    alpha: Tensor | None = None

    def __post_init__(self) -> None:
        experts, (out, inn) = self.shape[:-2], self.shape[-2:]
        weight, activation = self.scheme.weight, self.scheme.activation
        params = activation.params if activation else ()
        one = experts or (1,)
        groups = (*experts, weight.scale_rows(out), weight.groups(inn))
        layout: dict[str, tuple[tuple[int, ...], str, bool | None]] = {  # shape, dtype, whether it must be there
            "codes": ((*experts, out, math.ceil(inn * weight.bits / 8)), "uint8", True),
            "scales": (groups, "float", True),
            "zeros": (groups, "uint8", not weight.symmetric),
            "permutation": ((*experts, inn), "int32", None),
            "outer": ((*experts, 1), "float32", weight.number == "nvfp4"),
            "input_scale": (one, "float32", "input_scale" in params),
            "input_zero": (one, "int32", "input_zero" in params),
            "alpha": (one, "float32", "alpha" in params),
        }
        for name, (shape, dtype, needed) in layout.items():
            tensor = getattr(self, name)
            if needed is not None and needed != (tensor is not None):
                raise FormatError(f"a {self.scheme} weight {'needs' if needed else 'has no'} {name}")
            if tensor is None:
                continue
            is_right = tensor.dtype.is_floating_point if dtype == "float" else str(tensor.dtype) == f"torch.{dtype}"
            if tuple(tensor.shape) != shape or not is_right:
                raise FormatError(
                    f"{name} of a {self.scheme} weight {list(self.shape)} must be {dtype} {list(shape)}, "
                    f"not {tensor.dtype} {list(tensor.shape)}"
                )
        self._check_values()

    def _check_values(self) -> None:
        """FormatError for a scale, zero point or clip that no calibration makes; a zero scale would divide by zero."""
        largest = torch.finfo(torch.float32).max
        bits = self.scheme.activation.bits if self.scheme.activation else 8
        allowed = {
            "outer": (0.0, largest, "positive and finite"),
            "input_scale": (0.0, largest, "positive and finite"),
            "input_zero": (-(2 ** (bits - 1)) - 1, 2 ** (bits - 1) - 1, f"an int{bits} code"),
            "alpha": (0.0, 1.0, "above 0 and at most 1"),
        }
        for name, (above, highest, words) in allowed.items():
            tensor = getattr(self, name)
            if tensor is None or tensor.is_meta:
                continue
            wrong = ~((tensor > above) & (tensor <= highest))
            if wrong.any():
                raise FormatError(
                    f"{name} of a {self.scheme} weight {list(self.shape)} must be {words}, "
                    f"not {tensor[wrong][0].item()}"
                )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the weight is made of, by name, without those that are None."""
        named = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros, "outer": self.outer}
        named["permutation"] = self.permutation
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def activation_tensors(self) -> dict[str, Tensor]:
        """The stored parameters of its activations, by name, in the order that ``qcompile::quantize`` takes them in."""
        named = {"input_scale": self.input_scale, "input_zero": self.input_zero, "alpha": self.alpha}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        stored = [*self.tensors().values(), *self.activation_tensors().values()]
        return sum(t.numel() * t.element_size() for t in stored)

    def expert(self, index: int) -> PackedWeight:
        """The weight of one expert, as that of a Linear."""
        parts = {name: tensor[index] for name, tensor in self.tensors().items()}
        parts |= {name: tensor[index : index + 1] for name, tensor in self.activation_tensors().items()}
        return PackedWeight(self.scheme, self.shape[-2:], **parts)

    @classmethod
    def of_experts(cls, weights: Sequence[PackedWeight]) -> PackedWeight:
        """The weight of experts from those of each one; the inverse of ``expert``."""
        first, own = weights[0], [weight.activation_tensors() for weight in weights]
        parts = {name: torch.stack([weight.tensors()[name] for weight in weights]) for name in first.tensors()}
        parts |= {name: torch.cat([tensors[name] for tensors in own]) for name in own[0]}
        return cls(first.scheme, (len(weights), *first.shape), **parts)


@dataclass(frozen=True)
class PlannedSite:
    """The answer for one site: its scheme (None stays float), method and kernel, and the reason.

    ``refusals`` says why each better kernel for this scheme cannot run it; it is a part of the reason, too.
    """

    site: Site
    scheme: Scheme | None
    reason: str
    method: str = ""
    options: tuple[tuple[str, object], ...] = ()
    kernel: str = ""
    bytes_after: int = 0
    refusals: str = ""

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

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        from .reporting import plan_html

        return plan_html(self, page=False)


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
class FrontierPoint:
    """One plan on the way from the fewest to the most bits (``budget``): bytes of the model, mean bits of its quantized
    weights, and the divergence that was predicted for it. ``chosen``: it is the plan that was taken.
    """

    nbytes: int
    bits: float
    divergence: float
    chosen: bool = False


@dataclass(frozen=True)
class Sensitivity:
    """What a budget learned of one site: (scheme, divergence that it alone causes), from the fewest bits to the most.

    The first divergence was measured, the others follow the error of the weight.
    """

    site: str
    divergences: tuple[tuple[str, float], ...]


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
class Moment:
    """The memory of this process at one time of a run: ``seconds`` after its start, when ``what`` was done."""

    seconds: float
    resident_bytes: int
    what: str


@dataclass(frozen=True)
class Report:
    """What was done, what was not, and why; numbers per site. Prints as a table.

    ``expert_tokens`` holds, for sites of experts that were calibrated, how many tokens of the data each expert saw.
    ``memory`` is empty where the system does not tell. ``frontier`` and ``sensitivity`` are those of a budget; their
    divergences are in nats per token for a language model, else the squared error of its outputs over their square.
    """

    model: str
    plan: Plan
    sites: tuple[SiteResult, ...]
    seconds: float = 0.0
    passes: tuple[PassRecord, ...] = ()
    graphs: tuple[GraphRecord, ...] = ()
    notes: tuple[str, ...] = ()
    expert_tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()
    memory: tuple[Moment, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()

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

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        from .reporting import report_html

        return report_html(self, page=False)


@dataclass
class State:
    """What a quantized model carries: its plan, its report, and its rewritten graph (names instead of weights).

    ranks: how many divide the model, of which this is the part of one.
    """

    plan: Plan
    report: Report
    graph: torch.fx.GraphModule | None = field(default=None, repr=False)
    ranks: int = 1

    def __deepcopy__(self, memo: dict) -> State:
        # nothing in it is ever changed, and the graph has no weights
        return State(self.plan, self.report, self.graph, self.ranks)

    def __getstate__(self) -> dict:
        # the graph is traced again when it is needed
        return {"plan": self.plan, "report": self.report, "graph": None, "ranks": self.ranks}
