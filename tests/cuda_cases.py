"""Sites, weights and activations that the tests of the CUDA backend share."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from qcompile import numerics
from qcompile.backends.cuda import BACKEND, targets, tiles
from qcompile.kernels import Kernel, choose
from qcompile.types import PackedWeight, Scheme, Site

ARCHS = ("sm_90", "sm_80")
DTYPES = (torch.bfloat16, torch.float16)
PARAMS = {  # what calibration would find for values around one
    "input_scale": torch.tensor([0.025]),
    "input_zero": torch.tensor([-9], dtype=torch.int32),
    "alpha": torch.tensor([0.8]),
}


def site(out: int, inn: int, dtype: torch.dtype, experts: int = 0) -> Site:
    return Site("layer", "experts" if experts else "linear", out, inn, dtype, kind="experts" if experts else "linear",
                experts=experts)  # fmt: skip


def kernel_for(scheme: Scheme, arch: str, dtype: torch.dtype = torch.bfloat16, experts: int = 0) -> Kernel:
    """What a GPU of that architecture would run such a site with; the reference does not count."""
    with BACKEND.target(arch):
        kernel, why = choose(BACKEND, site(64, 256, dtype, experts), scheme)
    assert kernel is not None, why
    assert kernel.name != "reference", why
    return kernel


@functools.cache
def packed_weight(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype, permuted: bool = False) -> PackedWeight:
    """A weight of random numbers, rounded to nearest."""
    generator = torch.Generator().manual_seed(sum(shape))
    if len(shape) == 3:
        return PackedWeight.of_experts([_one(scheme, shape[1:], dtype, permuted, generator) for _ in range(shape[0])])
    return _one(scheme, shape, dtype, permuted, generator)


def _one(scheme, shape, dtype, permuted, generator):
    weight = torch.randn(shape, generator=generator).to(dtype)
    packed = numerics.quantize_weight(weight, Scheme(scheme.weight))
    params = {name: PARAMS[name] for name in scheme.activation.params} if scheme.activation else {}
    order = torch.randperm(shape[1], generator=generator).to(torch.int32) if permuted else None
    return dataclasses.replace(packed, scheme=scheme, permutation=order, **params)


def quantized(x: torch.Tensor, packed: PackedWeight) -> list[torch.Tensor]:
    """What a product reads instead of x."""
    if packed.scheme.activation is None:
        return [x]
    params = list(packed.activation_tensors().values())
    parts = numerics.quantize_activation(x, packed.scheme.activation, params)
    return parts if packed.scheme.activation.dynamic else [*parts, *params]


def run(kernel: Kernel, packed: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    tensors, out = kernel.prepare(packed), packed.shape[-2]
    if packed.scheme.activation is None:
        return kernel.linear(x, tensors, bias, packed.scheme, out)
    return kernel.scaled_linear(quantized(x, packed), tensors, bias, packed.scheme, out, x.dtype)


def run_experts(kernel: Kernel, packed: PackedWeight, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The product of rows that are sorted by expert."""
    activation, params = packed.scheme.activation, list(packed.activation_tensors().values())
    rows = [x]
    if activation is not None:
        own = [param[owner(x, ends)][:, None] for param in params]
        rows = numerics.quantize_activation(x, activation, own) + ([] if activation.dynamic else own)
    return kernel.grouped_linear(rows, ends, kernel.prepare(packed), packed.scheme, packed.shape[-2], x.dtype)


def exact_experts(packed: PackedWeight, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The same in float64, row by row."""
    own = owner(x, ends).tolist()
    return torch.stack([exact(packed.expert(e), row[None])[0] for e, row in zip(own, x, strict=True)])


def owner(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The expert of each row."""
    return torch.searchsorted(ends, torch.arange(x.shape[0], dtype=ends.dtype), right=True)


def exact(packed: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product in float64."""
    inputs, activation = x.double(), packed.scheme.activation
    if activation is not None:
        inputs = numerics.dequantize_activation(quantized(x, packed), activation).double()
    weight = numerics.dequantize_packed(dataclasses.replace(packed, scales=_double(packed.scales))).double()
    return inputs @ weight.mT + (0 if bias is None else bias.double())


def _double(scales: torch.Tensor) -> torch.Tensor:
    return scales.double()


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """``|result - expected| / |expected|``."""
    return ((result.double() - expected).norm() / expected.norm()).item()


@dataclass(frozen=True)
class Layer:
    """The experts of a layer: both weights, as they are stored and as a kernel has them."""

    scheme: Scheme
    kernel: str
    sizes: tuple[int, int, int]
    up: PackedWeight
    down: PackedWeight
    tensors: tuple[list[torch.Tensor], list[torch.Tensor]]

    def arguments(self, x: torch.Tensor, ids: torch.Tensor, routing: torch.Tensor, activation: str = "silu") -> tuple:
        """Of ``qcompile::quant_experts``."""
        up, down = self.tensors
        schemes, kernels = f"{self.scheme}|{self.scheme}", f"{self.kernel}|{self.kernel}"
        return ([x], ids, routing, up, None, [], down, None, [], schemes, kernels, activation, self.sizes, x.dtype)


@functools.cache
def expert_layer(scheme: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, arch: str) -> Layer:
    """sizes: experts, how many are chosen, hidden and intermediate size."""
    parsed, (experts, _, hidden, intermediate) = Scheme.parse(scheme), sizes
    up = packed_weight(parsed, (experts, 2 * intermediate, hidden), dtype)
    down = packed_weight(parsed, (experts, hidden, intermediate), dtype)
    kernel = kernel_for(parsed, arch, dtype, experts)
    tensors = kernel.prepare(up), kernel.prepare(down)
    return Layer(parsed, f"cuda.{kernel.name}", (experts, hidden, intermediate), up, down, tensors)


@dataclass(frozen=True)
class Case:
    """One compiled kernel: for a GPU, a scheme, a number of rows and a stored weight."""

    label: str
    arch: str
    scheme: Scheme
    dtype: str
    rows: int
    experts: int
    out: int
    columns: int
    part: str = ""  # of a layer of experts, whose 8 experts of a token make as many rows: "gate_up" or "down"
    forced: tiles.Tiles | None = None

    @property
    def capability(self) -> int:
        return int(self.arch.removeprefix("sm_"))

    @property
    def bits(self) -> int:
        return 4 if self.scheme.weight.bits <= 4 else 8

    @property
    def kind(self) -> str:
        """What ``scaled_product`` calls the numbers; "" for float activations."""
        weight = self.scheme.weight
        return "" if self.scheme.activation is None else "fp8" if weight.number == "fp8" else f"int{self.bits}"

    @property
    def group(self) -> int:
        weight = self.scheme.weight
        return weight.block[1] if weight.block else weight.group_size or 0

    @property
    def weight(self) -> tiles.Weight:
        kind = self.kind or f"w{self.bits}a16"
        return tiles.Weight(kind, self.out, self.columns, self.experts, self.group, self.part)

    @property
    def tiles(self) -> tiles.Tiles:
        return self.forced or tiles.choose(self.weight, self.rows, targets.parse(self.arch))

    @property
    def path(self) -> dict[str, bool]:
        """What differs between GPUs: as ``launch`` says, where there is one."""
        gpu = targets.parse(self.arch)
        return {"PTX": not gpu.arch, "WIDE": False, "PDL": gpu.has_pdl}

    def kernel(self):
        from qcompile.backends.cuda.device import expert_products, float_product, scaled_product

        if self.part:
            return getattr(expert_products, self.part)
        return scaled_product.scaled_product if self.kind else float_product.float_product

    @property
    def types(self) -> dict[str, str]:
        if self.part:
            return self.expert_types
        result = "*fp32" if self.tiles.splits > 1 else f"*{self.dtype}"
        if not self.kind:
            return {"x": f"*{self.dtype}", "codes": "*u8", "words": "*i32", "ends": "*i32", "y": result}
        x, codes = {"int8": ("*i8", "*i8"), "int4": ("*i8", "*u8"), "fp8": ("*fp8e4nv", "*fp8e4nv")}[self.kind]
        scales = "*fp32" if self.kind == "fp8" else "*i32"
        return {"x": x, "x_scale": "*fp32", "codes": codes, "scales": scales, "ends": "*i32", "y": result}

    @property
    def expert_types(self) -> dict[str, str]:
        one = Case(
            self.label, self.arch, self.scheme, self.dtype, self.rows, self.experts, self.out, self.columns
        ).types
        own = {"ids": "*i64", "order": "*i64", "routing": "*fp32", "scales": "*i32", "x_scale": "*fp32"}
        return {**own, **one, "y": "*fp32" if self.expert_splits > 1 else f"*{self.dtype}"}

    @property
    def expert_splits(self) -> int:
        if self.part == "gate_up" or not tiles.each_row(self.rows, self.experts):
            return 1
        return tiles.expert_splits(self.rows // 8, 8, self.out, targets.parse(self.arch))

    def expert_constants(self) -> dict:
        from qcompile.backends.cuda.device import launch_experts

        kernel = kernel_for(self.scheme, self.arch, experts=self.experts)
        words, grouped = "bf16" if self.kind.startswith("int") else "", self.scheme.weight.block is not None
        own = launch_experts.weight_constants(self.tiles, self.experts, self.scheme, kernel, words, grouped, self.out)
        own |= {"K": 8, "EVEN": True, **self.path} | ({} if self.kind else {"x_scale": None})
        if self.part == "gate_up":
            return own | launch_experts.gate_constants("silu")
        return own | {"SLOTS": 8 // self.expert_splits, "PARTIAL": self.expert_splits > 1}

    def constants(self) -> dict:
        from qcompile.backends.cuda.device import launch

        if self.part:
            return self.expert_constants()
        weight, chosen = self.scheme.weight, self.tiles
        partial = chosen.splits > 1
        common = launch.common_constants(chosen, self.experts, partial, None)
        common |= {"bias": None, "EVEN": True, **self.path} | ({} if self.experts else {"ends": None})
        common |= {"rows": 1} if self.rows == 1 else {}  # Triton compiles for a size of 1 by itself
        if not self.kind:
            centered = weight.symmetric and weight.bits == self.bits
            own = launch.float_constants(chosen, self.bits, self.arch == "sm_90", self.group, centered)
            return {**common, **own}
        rows = weight.block[0] if weight.block else 1
        words = "" if self.kind == "fp8" else "bf16"
        grouped = weight.block is not None
        own = {"KIND": self.kind, "GROUP": self.group, "WORDS": words, "SCALE_ROWS": rows, "X_GROUPED": grouped}
        return {**common, **own} | ({"x_scale": None} if partial and not grouped else {})


def cases() -> list[Case]:
    """What the gate on compiled code compiles: every scheme for one token, and the tiles of other numbers of rows."""
    found = []

    def add(scheme: str, rows: int = 1, arch: str = "sm_90", experts: int = 0, dtype: str = "bf16", big: bool = False):
        out, columns = (24576, 4096) if big else (1536, 2048) if experts else (4096, 4096)
        label = f"{arch} {scheme} {dtype} {f'{experts} experts ' if experts else ''}{rows}x{out}x{columns}"
        found.append(Case(label, arch, Scheme.parse(scheme), dtype, rows, experts, out, columns))

    for arch in ARCHS:
        for scheme in ("w4a16_g128_asym", "w4a16_g64", "w4a16_g32_asym", "w4a16", "w8a16"):
            add(scheme, arch=arch)
        add("w4a16_g128", arch=arch, dtype="fp16")
        add("w8a16_g128", arch=arch, dtype="fp16")
        for rows in (1, 64, 128):
            add("w4a16_g128", rows, arch, big=True)
        add("w4a16_g128", 8, arch, experts=128)
        for scheme in ("w8a8", "w4a8", "w4a8_g128", *(["wfp8afp8"] if arch == "sm_90" else [])):
            for rows in (1, 128):
                add(scheme, rows, arch, big=True)
    for scheme in ("w8a8", "w4a8_g128", "wfp8afp8_b128x128"):
        add(scheme, 8, experts=128)
    for arch in ARCHS:
        for scheme, rows in (("w4a8_g32", 1), ("w4a8_g32", 128), ("w8a8_g32", 1)):
            add(scheme, rows, arch, big=True)
    add("wfp8afp8", 1, "sm_89", big=True)
    add("wfp8afp8_b128x128", 128, big=True)
    add("w8a8", 1024)
    add("w4a16_g128", 1)
    add("w4a16_g128", 32)
    add("w4a16_g128", 512)
    add("w4a16_g128", 512, experts=128)
    for arch, scheme, part, pairs in (
        ("sm_90", "w4a16_g128", "gate_up", 8), ("sm_90", "w4a16_g128", "down", 64),
        ("sm_90", "w4a8_g128", "gate_up", 512), ("sm_90", "w8a8", "down", 8),
        ("sm_90", "wfp8afp8_b128x128", "gate_up", 32768), ("sm_80", "w4a16_g128", "gate_up", 64),
        ("sm_80", "w4a16_g128", "down", 8),
    ):  # fmt: skip
        out, columns = (1536, 2048) if part == "gate_up" else (2048, 768)
        label = f"{arch} {scheme} bf16 {part} of {pairs} pairs"
        found.append(Case(label, arch, Scheme.parse(scheme), "bf16", pairs, 128, out, columns, part))
    return found
