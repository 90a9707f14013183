"""What of other tools' checkpoints is read, computed, written again and converted: one row for each folder.

    python benchmarks/formats_table.py FOLDER > table.md       # FOLDER holds the cases

A case is a checkpoint beside a ``reference.safetensors`` that its tool computed: dequantized weights by name, and where
it can run one, ``input_ids`` and ``logits``. Columns: how many weights are equal, bit for bit in the reference's dtype
(else the largest relative error); the relative error of the logits, which holds the difference in how activations are
rounded; how many tensors are the same after reading and writing in the case's own format; and the formats it converts
to, where the weights must be equal again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import qcompile
from qcompile import numerics
from qcompile.errors import QcompileError
from qcompile.modules import quantized_modules
from qcompile.types import PackedWeight

TARGETS = ("compressed-tensors", "gptq", "gptq_v2", "awq", "modelslim")


def stored_weights(model: Any) -> dict[str, PackedWeight]:
    """Packed weights by the names of their Linears on disk, gate and up of an expert together."""
    found: dict[str, PackedWeight] = {}
    for name, module in quantized_modules(model).items():
        packed = module.packed()
        owner, _, projection = name.rpartition(".")
        for expert in range(packed.shape[0] if len(packed.shape) == 3 else 0):
            found[f"{owner}.{expert}.{projection}"] = packed.expert(expert)
        if len(packed.shape) == 2:
            found[name] = packed
    return found


def dequantized(model: Any) -> dict[str, Tensor]:
    """Float32 weights by stored name, which no rounding of the scales' dtype has touched."""
    weights: dict[str, Tensor] = {}
    for name, packed in stored_weights(model).items():
        scales = packed.scales.float() if packed.scheme.weight.number in ("int", "fp8") else packed.scales
        tensors = packed.codes, scales, packed.zeros, packed.permutation
        weight = numerics.dequantize(*tensors, packed.scheme, packed.shape[-1], packed.outer)
        if name.endswith(".gate_up_proj"):
            for part, rows in zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True):
                weights[f"{name.removesuffix('gate_up_proj')}{part}.weight"] = rows
        else:
            weights[f"{name}.weight"] = weight
    return weights


def error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of ``expected``."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def compare_weights(model: Any, reference: dict[str, Tensor]) -> str:
    """How many weights are equal, and the largest error of the others."""
    found, wanted = dequantized(model), {n: t for n, t in reference.items() if n.endswith(".weight")}
    if missing := wanted.keys() - found.keys():
        return f"missing: {', '.join(sorted(missing))}"
    errors = {n: 0.0 if torch.equal(found[n].to(t.dtype), t) else error(found[n], t) for n, t in wanted.items()}
    equal = sum(not value for value in errors.values())
    return f"{equal}/{len(errors)}" + ("" if equal == len(errors) else f", error {max(errors.values()):.1e}")


@torch.no_grad()
def compare_logits(model: Any, reference: dict[str, Tensor]) -> str:
    """The relative error of the logits, "none" without a reference."""
    if "logits" not in reference:
        return "none"
    logits = model(reference["input_ids"]).logits
    return f"{error(logits.float(), reference['logits']):.1e}"


def own_format(model: Any) -> str:
    """The format that the plan of a loaded model names."""
    reason = next(iter(qcompile.report(model).plan.quantized)).reason
    return reason.removeprefix("stored as ").partition(";")[0]


def compare_files(case: Path, again: Path) -> str:
    """How many tensors two checkpoints have in common, bit for bit."""
    before, after = (
        {n: t for f in folder.glob("*.safetensors") if f.stem != "reference" for n, t in load_file(f).items()}
        for folder in (case, again)
    )
    same = {n for n in before.keys() & after.keys() if before[n].dtype == after[n].dtype}
    equal = sum(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in same if before[n].dim())
    equal += sum(torch.equal(before[n], after[n]) for n in same if not before[n].dim())
    return f"{equal}/{len(before)}" + (
        f", {len(after.keys() - before.keys())} more" if after.keys() - before.keys() else ""
    )


def converted(case: Path, model: Any, target: str, out: Path) -> str:
    """ "yes", or why not."""
    try:
        qcompile.convert(case, out, format=target, progress=False)
    except QcompileError as refused:
        return str(refused).partition(" cannot be converted to ")[2] or str(refused)
    before, after = dequantized(model), dequantized(qcompile.load(out, dtype=model.dtype, progress=False))
    equal = before.keys() == after.keys() and all(torch.equal(tensor, after[n]) for n, tensor in before.items())
    return "yes" if equal else "written, but the weights differ"


def row(case: Path) -> tuple[list[str], list[str]]:
    """The cells of a case, and what it does not do with the reasons."""
    reference = load_file(case / "reference.safetensors")
    kinds = {t.dtype for n, t in reference.items() if n.endswith(".weight")}
    try:  # in the precision in which its tool computed
        model: Any = qcompile.load(case, dtype=torch.float16 if kinds == {torch.float16} else None, progress=False)
    except QcompileError as refused:
        return [case.name, "-", "-", "-", "-", "-"], [f"{case.name}: {refused}"]
    own, works, fails = own_format(model), [], []
    files = "read only"
    with tempfile.TemporaryDirectory() as temporary:
        for target in TARGETS:
            answer = converted(case, model, target, Path(temporary) / target)
            if target == own:
                files = compare_files(case, Path(temporary) / target) if answer == "yes" else answer
            elif answer == "yes":
                works.append(target)
            else:
                fails.append(f"{case.name} to {answer}")
    cells = [
        case.name,
        own,
        compare_weights(model, reference),
        compare_logits(model, reference),
        files,
        ", ".join(works),
    ]
    return cells, fails


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of cases")
    parser.add_argument("--match", default="*", help="glob of the cases to run")
    arguments = parser.parse_args()
    print("| case | format | weights equal | logits, error | same tensors written | converts to |")
    print("|---|---|---|---|---|---|")
    reasons: list[str] = []
    for case in sorted(path.parent for path in arguments.folder.glob(f"{arguments.match}/reference.safetensors")):
        if (case / "config.json").exists() and not case.parent.name.startswith("_"):
            cells, fails = row(case)
            reasons += fails
            print(f"| {' | '.join(cells)} |", flush=True)
    print("\n" + "\n".join(f"- {reason}" for reason in reasons))


if __name__ == "__main__":
    main()
