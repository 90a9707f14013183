"""Quality: perplexity, and divergence from the float model, of every method, beside other tools' checkpoints.

    python benchmarks/quality.py                                      # ours, on all four models; about an hour
    python benchmarks/quality.py --models tiny_lm --schemes w4a16_g128 w3a16_g128 --methods rtn gptq
    python benchmarks/quality.py --prepare /tmp/quality               # float models and calibration tokens, for peers
    python benchmarks/quality.py --peers /tmp/peers --methods         # other tools' checkpoints alone

The models are ``examples/tiny_lm`` and ``examples/tiny_moe``, and both with outlier channels: in every decoder block,
eight weights of each norm are twenty times as large, and what reads them a twentieth: the same function, on which
plain rounding fails.

**Peers.** ``--prepare`` writes every model as an ordinary checkpoint beside ``calibration.safetensors`` (input_ids
[128, 256]: what everybody calibrates on, all rows, in this order) and ``heldout.safetensors``. Each tool runs in a
virtual environment of its own and leaves its result as ``PEERS/<model>/<scheme>/<tool>-<method>``, such as
``peers/tiny_lm/w4a16_g128/gptqmodel-gptq``: a packed checkpoint in any format that qcompile reads, or a float one with
dequantized weights (which is right for float activations only). Names of schemes are those of qcompile; lm_head,
embeddings and routers stay float. ``score`` is all that is done with any folder, ours included.

Everything is computed in float32: what differs is the weights (and the activations' codes), and no rounding in between.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qcompile
from qcompile.errors import QcompileError
from qcompile.modules import quantized_modules

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MODELS = ("tiny_lm", "tiny_moe", "tiny_lm_outliers", "tiny_moe_outliers")
SCHEMES = ("w4a16_g128", "w4a16_g128_asym", "w4a16_g32", "w3a16_g128", "w8a8", "w4a8", "w4a4")
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "rtn-mse": {"method": "rtn", "options": {"observer": "mse"}},
    "awq": {"method": "awq"},
    "smoothquant": {"method": "smoothquant"},
    "smoothquant-gptq": {"method": "smoothquant", "options": {"rounding": "gptq"}},
    "gptq": {"method": "gptq"},
    "autoround": {"method": "autoround"},
    "awq-gptq": {"method": "awq", "options": {"rounding": "gptq"}},
}
"""What ``--methods`` names: a QuantConfig without its scheme."""

WINDOW, OUTLIERS, FACTOR = 256, 8, 20.0


@dataclass(frozen=True)
class Score:
    """Of one checkpoint on the held-out text: perplexity, and mean KL(float ‖ quantized) per token in nats."""

    perplexity: float
    divergence: float


@dataclass(frozen=True)
class Row:
    """One line of the table; ``increase`` is of the perplexity over that of the float model. None: it was refused."""

    model: str
    scheme: str
    method: str
    perplexity: float | None = None
    increase: float | None = None
    divergence: float | None = None
    seconds: float = 0.0  # to quantize, 0 where that is not known
    refused: str = ""  # why there is no checkpoint


# ------------------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def reference(folder: Path) -> tuple[Tensor, Tensor]:
    """Held-out windows [n, WINDOW] beside a float checkpoint, and its log-probabilities [n, WINDOW, vocabulary]."""
    ids = load_file(folder / "heldout.safetensors")["input_ids"].long()
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    model = qcompile.load(folder, dtype=torch.float32, progress=False)
    return windows, torch.cat([model(input_ids=part).logits.log_softmax(-1) for part in windows.split(8)])


@torch.no_grad()
def score(folder: Path, windows: Tensor, expected: Tensor) -> Score:
    """Score the checkpoint in ``folder``, whoever wrote it, against the ``reference`` of the float one."""
    model = qcompile.load(folder, dtype=torch.float32, progress=False)
    modules = quantized_modules(model).values()
    if modules and all(module.scheme.activation is None for module in modules):
        qcompile.dequantize(model)  # once, and not at each call
    loss = divergence = 0.0
    for part, wanted in zip(windows.split(8), expected.split(8), strict=True):
        found = model(input_ids=part).logits.log_softmax(-1)
        loss -= found[:, :-1].gather(2, part[:, 1:, None]).sum(dtype=torch.float64).item()
        divergence += nn.functional.kl_div(found, wanted, reduction="sum", log_target=True).item()
    count = windows.numel()
    return Score(math.exp(min(loss / (count - len(windows)), 700.0)), divergence / count)


# -------------------------------------------------------------------------------------------------------------- models


def prepare(name: str, folder: Path) -> Path:
    """Write the float model ``name`` with its calibration tokens and held-out text into ``folder / name``."""
    source, target = EXAMPLES / name.removesuffix("_outliers"), folder / name
    if target.exists():
        return target
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    if name.endswith("_outliers"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        inject_outliers(model)
        model.save_pretrained(partial)
    partial.rename(target)
    return target


@torch.no_grad()
def inject_outliers(model: Any) -> None:
    """Multiply OUTLIERS weights of every norm before attention and before the MLP by FACTOR, and divide its readers."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        after = [mlp.gate.weight, mlp.experts.gate_up_proj] if hasattr(mlp, "experts") else []
        after = after or [mlp.gate_proj.weight, mlp.up_proj.weight]
        before = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        for norm, weights in ((layer.input_layernorm, before), (layer.post_attention_layernorm, after)):
            channels = torch.randperm(len(norm.weight), generator=generator)[:OUTLIERS]
            norm.weight[channels] *= FACTOR
            for weight in weights:
                weight[..., channels] /= FACTOR


# ---------------------------------------------------------------------------------------------------------------- runs


def quantize(folder: Path, config: dict[str, Any], target: Path, seed: int) -> float:
    """Quantize the float checkpoint in ``folder`` and save it in ``target``; returns the seconds of quantizing."""
    model = qcompile.load(folder, progress=False)
    data = load_file(folder / "calibration.safetensors")
    if seed:
        order = torch.randperm(len(data["input_ids"]), generator=torch.Generator().manual_seed(seed))
        data = {"input_ids": data["input_ids"][order[: len(order) * 3 // 4]]}
    started = time.perf_counter()
    qcompile.quantize(model, config, data=data, sequence=WINDOW, rare_experts="rtn", progress=False)
    seconds = time.perf_counter() - started
    qcompile.save(model, target)
    return seconds


def runs(
    model: str, folder: Path, peers: Path | None, arguments: argparse.Namespace, temporary: Path
) -> Iterator[tuple[str, str, Callable[[], tuple[Path, float]]]]:
    """Scheme, label, and what makes the folder of each checkpoint to be scored and says how long that took."""
    for scheme in arguments.schemes:
        for method in arguments.methods:
            for seed in range(arguments.seeds):

                def ours(scheme: str = scheme, method: str = method, seed: int = seed) -> tuple[Path, float]:
                    target = temporary / "ours"
                    shutil.rmtree(target, ignore_errors=True)
                    return target, quantize(folder, METHODS[method] | {"scheme": scheme}, target, seed)

                yield scheme, f"qcompile-{method}{f' (seed {seed})' if arguments.seeds > 1 else ''}", ours
        if peers is not None:
            for path in sorted((peers / model / scheme).glob("*")):
                yield scheme, path.name, lambda path=path: (path, 0.0)


def table(rows: list[Row]) -> str:
    """The rows as a table in markdown."""
    lines = ["| model | scheme | method | perplexity | increase | KL | seconds |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        seconds = f"{row.seconds:.0f}" if row.seconds else ""
        numbers = f"refused: {row.refused} | | "
        if row.perplexity is not None:
            numbers = f"{row.perplexity:.3f} | {row.increase:+.3f} | {row.divergence:.5f}"
        lines.append(f"| {row.model} | {row.scheme} | {row.method} | {numbers} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), help="ours; none: peers")
    parser.add_argument("--seeds", type=int, default=1, help="repeat on as many random choices of three quarters")
    parser.add_argument("--prepare", type=Path, help="write the float models into this folder, and do nothing else")
    parser.add_argument("--peers", type=Path, help="folder of other tools' checkpoints")
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end")
    arguments = parser.parse_args()
    if arguments.prepare:
        for model in arguments.models:
            print(prepare(model, arguments.prepare))
        return

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        for model in arguments.models:
            folder = prepare(model, temporary)
            windows, expected = reference(folder)
            plain = score(folder, windows, expected)
            rows.append(Row(model, "float", "", plain.perplexity, 0.0, plain.divergence, 0.0))
            for scheme, label, make in runs(model, folder, arguments.peers, arguments, temporary):
                try:
                    path, seconds = make()
                except QcompileError as error:
                    rows.append(Row(model, scheme, label, refused=" ".join(str(error).split())))
                else:
                    found = score(path, windows, expected)
                    increase = found.perplexity - plain.perplexity
                    rows.append(Row(model, scheme, label, found.perplexity, increase, found.divergence, seconds))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))
    if arguments.json:
        print(json.dumps({"torch": torch.__version__, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
