"""The numbers of one quantized site, and their short names: ``w4a16_g128_asym``, ``w8a8_static``, ``wfp8afp8``.

    w<number>a<number>[_g<size>|_b<rows>x<columns>|_tensor][_asym][_static|_dynamic][_sym|_asym][_clip]

A number is a count of bits (integers), ``fp8`` (e4m3), ``nvfp4``, ``mxfp4`` or ``mxfp8``; ``a16`` leaves activations
float. The first ``_asym`` is about weights; ``_sym`` and ``_asym`` after ``_static`` or ``_dynamic`` are about
activations.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import ConfigError

GROUPS = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}
"""Number formats whose scales belong to groups of a fixed size (OCP Microscaling 1.0; NVFP4)."""

BITS = {"fp8": 8, "nvfp4": 4, "mxfp4": 4, "mxfp8": 8}
"""Bits of a code of each floating-point number format."""


@dataclass(frozen=True)
class WeightType:
    """How one weight is stored: integer codes ``W = (q - z) * s``, or small floats ``W = q * s``.

    number      "int", "fp8" (e4m3), "nvfp4" (e2m1, e4m3 scales under one float32 scale), "mxfp4" and "mxfp8" (e2m1,
                e4m3, power-of-two scales)
    group_size  input features that share one scale; ``None`` is one scale per output channel
    block       (rows, columns) that share one scale, instead of groups
    per_tensor  one scale for the whole weight

    Symmetric integers have the implied zero point ``2 ** (bits - 1)``.
    """

    bits: int
    symmetric: bool = True
    group_size: int | None = None
    number: str = "int"
    block: tuple[int, int] | None = None
    per_tensor: bool = False

    def __post_init__(self) -> None:
        _check_number("weights", self.number, self.bits)
        if self.number == "int" and self.bits not in range(2, 9):
            raise ConfigError(f"weight bits must be 2 to 8, not {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(
                f"group size must be positive, not {self.group_size}; leave it out for one group per output channel"
            )
        if self.block is not None and min(self.block) < 1:
            raise ConfigError(f"block sizes must be positive, not {self.block}")
        if self.number != "int" and not self.symmetric:
            raise ConfigError(f"{self.number} weights have no zero points: leave out '_asym'")
        fixed = GROUPS.get(self.number)
        if fixed and (self.group_size != fixed or self.block or self.per_tensor):
            raise ConfigError(f"{self.number} weights have groups of {fixed}, and the name of the scheme says no other")
        if (self.block or self.per_tensor) and self.number != "fp8":
            raise ConfigError("scales per block or per tensor go with fp8 weights")
        if (self.group_size is not None) + (self.block is not None) + self.per_tensor > 1:
            raise ConfigError("a weight has one scale per group, per block or for the whole tensor: one of the three")

    @property
    def scale_columns(self) -> int | None:
        """Input features that share a scale: those of a group or of a block; None where all of them do."""
        return self.block[1] if self.block else self.group_size

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of ``in_features`` weights; the last one may be short."""
        size = self.scale_columns
        return 1 if size is None else math.ceil(in_features / size)

    def scale_rows(self, out_features: int) -> int:
        """Number of rows of the scales of a weight with ``out_features`` rows."""
        if self.per_tensor:
            return 1
        return math.ceil(out_features / self.block[0]) if self.block else out_features


@dataclass(frozen=True)
class ActivationType:
    """How the input of a matrix product is quantized: dynamically per token, or with a stored scale per tensor.

    group_size  columns of a token that share one scale (fp8 beside block weights; the fp4 and mx formats)
    clip        each row is clamped to ``alpha * max|row|`` first, with a learned alpha per expert (or per linear)

    Symmetric integers have no zero point. Prints as its part of a scheme's name: "8", "8_static", "8_dynamic_asym".
    """

    bits: int
    dynamic: bool = True
    symmetric: bool = True
    number: str = "int"
    group_size: int | None = None
    clip: bool = False

    def __post_init__(self) -> None:
        _check_number("activations", self.number, self.bits)
        if self.number == "int" and self.bits not in (4, 8):
            raise ConfigError(f"activation bits must be 4 or 8 (or 16 for float activations), not {self.bits}")
        if self.number != "int" and not self.symmetric:
            raise ConfigError(f"{self.number} activations have no zero points")
        if self.group_size and (self.number == "int" or not self.dynamic):
            kind = "integer" if self.number == "int" else "static"
            raise ConfigError(f"{kind} activations have no groups of columns with a scale of their own")
        if self.number in GROUPS and (self.group_size != GROUPS[self.number] or not self.dynamic):
            raise ConfigError(f"{self.number} activations have dynamic scales of {GROUPS[self.number]} columns")
        if not self.dynamic and self.bits == 4 and self.number == "int":
            raise ConfigError("4-bit activations are dynamic: one scale for all tokens would leave nothing of them")
        if self.clip and not (self.dynamic and self.symmetric and self.number == "int"):
            raise ConfigError("'_clip' goes with dynamic symmetric integer activations, as in 'w4a8_clip'")

    @property
    def params(self) -> tuple[str, ...]:
        """The stored tensors that its quantization needs: static scale and zero point, clip, nvfp4's second scale."""
        if self.number == "nvfp4":
            return ("input_scale",)
        if self.dynamic:
            return ("alpha",) if self.clip else ()
        return ("input_scale",) if self.symmetric else ("input_scale", "input_zero")

    @property
    def parts(self) -> int:
        """How many tensors its quantization returns: codes; a dynamic scale; a dynamic zero point."""
        return 1 if not self.dynamic else 2 if self.symmetric else 3

    @classmethod
    def parse(cls, name: str) -> ActivationType:
        """Inverse of ``str``."""
        match = _ACTIVATION.fullmatch(name)
        if not match:
            raise ConfigError(f"{name!r} is not an activation type, such as '8', '8_static' or 'fp8_g128'")
        return _activation(match["a"], match["static"], match["sym"], bool(match["clip"]), match["g"])

    def __str__(self) -> str:
        size = f"_g{self.group_size}" if self.group_size and self.number not in GROUPS else ""
        return self._number() + size + self._suffix()

    def _number(self) -> str:
        return str(self.bits) if self.number == "int" else self.number

    def _suffix(self) -> str:
        """What a scheme's name says after the weight."""
        text = "" if self.dynamic else "_static"
        if self.number == "int" and self.symmetric != self.dynamic:
            text = f"_{'dynamic' if self.dynamic else 'static'}_{'sym' if self.symmetric else 'asym'}"
        return text + ("_clip" if self.clip else "")


def _check_number(what: str, number: str, bits: int) -> None:
    if number != "int" and number not in BITS:
        raise ConfigError(f"{what} are integers or one of {', '.join(BITS)}, not {number!r}")
    if number in BITS and bits != BITS[number]:
        raise ConfigError(f"{number} has {BITS[number]} bits, not {bits}")


_NUMBER = r"\d+|fp8|nvfp4|mxfp4|mxfp8"
_TAIL = r"(_(?P<static>static|dynamic)(_(?P<sym>sym|asym))?)?(?P<clip>_clip)?"
_ACTIVATION = re.compile(rf"(?P<a>{_NUMBER})(_g(?P<g>\d+))?{_TAIL}")
_SCHEME = re.compile(
    rf"w(?P<w>{_NUMBER})a(?P<a>{_NUMBER})(_g(?P<g>-?\d+)|_b(?P<b>\d+x\d+)|(?P<tensor>_tensor))?(?P<asym>_asym)?{_TAIL}"
)
_GRAMMAR = (
    "w<number>a<number>[_g<group size>|_b<rows>x<columns>|_tensor][_asym][_static|_dynamic][_sym|_asym][_clip], "
    "for example w4a16_g128, w4a16_g32_asym, w8a8, w8a8_static, w4a8_g128, wfp8afp8"
)


def _activation(
    number: str, mode: str | None, symmetry: str | None, clip: bool, group_size: str | None
) -> ActivationType:
    if number in BITS:
        if symmetry:
            raise ConfigError(f"{number} activations have no zero points: leave out '_{symmetry}'")
        if number in GROUPS and mode:
            raise ConfigError(f"the format {number} itself says how activations are scaled: leave out '_{mode}'")
        size = GROUPS.get(number) or (int(group_size) if group_size else None)
        return ActivationType(BITS[number], mode != "static", True, number, size, clip)
    dynamic = mode != "static"
    symmetric = symmetry == "sym" if symmetry else dynamic
    return ActivationType(int(number), dynamic, symmetric, "int", int(group_size) if group_size else None, clip)


@dataclass(frozen=True)
class Scheme:
    """The numbers of one site; prints and parses as a short name such as ``w4a16_g128_asym`` or ``w8a8``."""

    weight: WeightType
    activation: ActivationType | None = None

    def __post_init__(self) -> None:
        weight, activation = self.weight, self.activation
        if activation is not None and activation.number != weight.number:
            raise ConfigError(
                f"{activation.number} activations go with {activation.number} weights, not with {weight.number} ones"
            )
        if activation is None or activation.number != "fp8":
            return
        if activation.group_size != (weight.block[1] if weight.block and activation.dynamic else None):
            raise ConfigError("dynamic fp8 activations have groups of columns exactly where the weight has blocks")

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """Parse a scheme name; raises ConfigError that shows the grammar."""
        match = _SCHEME.fullmatch(name)
        if not match:
            raise ConfigError(f"{name!r} is not a scheme name; schemes are written {_GRAMMAR}")
        number, block = match["w"], match["b"]
        if number in GROUPS and match["g"]:
            raise ConfigError(f"{name!r}: {number} has groups of {GROUPS[number]}; leave out '_g{match['g']}'")
        weight = WeightType(
            bits=BITS.get(number) or int(number),
            symmetric=not match["asym"],
            group_size=GROUPS.get(number) or (int(match["g"]) if match["g"] else None),
            number=number if number in BITS else "int",
            block=(int(block.partition("x")[0]), int(block.partition("x")[2])) if block else None,
            per_tensor=bool(match["tensor"]),
        )
        if match["a"] == "16":
            if match["static"] or match["clip"]:
                what = f"_{match['static']}" if match["static"] else "_clip"
                raise ConfigError(f"{name!r}: '{what}' is about quantized activations, and a16 leaves them float")
            return cls(weight)
        columns = str(weight.block[1]) if weight.block and match["static"] != "static" else None
        return cls(weight, _activation(match["a"], match["static"], match["sym"], bool(match["clip"]), columns))

    def __str__(self) -> str:
        weight, activation = self.weight, self.activation
        scales = f"_g{weight.group_size}" if weight.group_size and weight.number not in GROUPS else ""
        if weight.block:
            scales = f"_b{weight.block[0]}x{weight.block[1]}"
        return (
            f"w{weight.bits if weight.number == 'int' else weight.number}a{activation._number() if activation else 16}"
            + scales
            + ("_tensor" if weight.per_tensor else "")
            + ("" if weight.symmetric else "_asym")
            + (activation._suffix() if activation else "")
        )
