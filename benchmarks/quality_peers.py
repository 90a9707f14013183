"""Quantize with another project's tool, for benchmarks/quality.py; runs in an environment that has the tool.

    python benchmarks/quality.py --prepare /tmp/quality
    peer/bin/python benchmarks/quality_peers.py llm-compressor /tmp/quality /tmp/peers    # each tool in its own
    python benchmarks/quality.py --peers /tmp/peers

| tool | environment |
|---|---|
| llm-compressor | ``pip install llmcompressor "torch<2.14"`` |
| gptqmodel | ``pip install "torch<2.14" setuptools``, then ``pip install --no-build-isolation gptqmodel`` |
| auto-round | ``pip install auto-round "torch<2.14"`` |

What a method is called is its tool's default; with ``-best`` it is given what the tool offers for quality beyond that
(a search of ranges by squared error, both scalings of AWQ, more iterations). Finished checkpoints are kept: a second
run makes what is missing. A cell that fails is named at the end, with the file of its output.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

SCHEME = re.compile(r"w(\d)a(\d+)(?:_g(\d+))?(_asym)?")


def parsed(scheme: str) -> tuple[int, int, int | None, bool]:
    """(bits of weights, bits of activations, group size or None for channels, symmetric)."""
    match = SCHEME.fullmatch(scheme)
    if match is None:
        raise SystemExit(f"{scheme}: this script knows schemes such as w4a16_g128_asym and w8a8")
    bits, activation, group, asymmetric = match.groups()
    return int(bits), int(activation), int(group) if group else None, asymmetric is None


def tokens(path: Path):
    from safetensors.torch import load_file

    return load_file(path)["input_ids"].long()


def llm_compressor(method: str, scheme: str, model: Path, data: Path, out: Path, best: bool) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda self: self  # its AWQ asks for it without a GPU too
    bits, activation, group, symmetric = parsed(scheme)
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel"}
    weights |= {"group_size": group} if group else {}
    weights |= {"observer": "mse"} if best else {}
    inputs = {"num_bits": activation, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    part = {"targets": ["Linear"], "weights": weights} | ({} if activation == 16 else {"input_activations": inputs})
    common = {"config_groups": {"group_0": part}, "ignore": ["lm_head", "re:.*mlp.gate$"]}
    recipe = {
        "rtn": lambda: [QuantizationModifier(**common)],
        "gptq": lambda: [GPTQModifier(**common)],
        "awq": lambda: [AWQModifier(duo_scaling="both" if best else True), QuantizationModifier(**common)],
        "smoothquant": lambda: [SmoothQuantModifier(smoothing_strength=0.8 if best else 0.5), GPTQModifier(**common)],
    }[method]()
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokens(data)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    tokenizer = AutoTokenizer.from_pretrained(model)
    oneshot(
        model=network,
        tokenizer=tokenizer,
        recipe=recipe,
        dataset=rows,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        batch_size=8,
    )
    network.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def gptqmodel(method: str, scheme: str, model: Path, data: Path, out: Path, best: bool) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default on two cores is too few for it
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import FORMAT, METHOD
    from gptqmodel.quantization.config import QuantizeConfig

    bits, activation, group, symmetric = parsed(scheme)
    if activation != 16:
        raise SystemExit("gptqmodel quantizes weights alone")
    options = {"bits": bits, "group_size": group or -1, "sym": symmetric, "offload_to_disk": False, "device": "cpu"}
    if method == "awq":
        options |= {"method": METHOD.AWQ, "format": FORMAT.GEMM}
    else:
        options |= {"method": METHOD.GPTQ, "format": FORMAT.GPTQ if symmetric else FORMAT.GPTQ_V2}
        options |= {"mse": 2.4} if best else {}
    network = GPTQModel.load(str(model), QuantizeConfig(**options))
    ids = tokens(data)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    network.quantize(rows, batch_size=8, backend=BACKEND.TORCH)
    network.save(str(out))


def auto_round(method: str, scheme: str, model: Path, data: Path, out: Path, best: bool) -> None:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bits, activation, group, symmetric = parsed(scheme)
    if activation != 16:
        raise SystemExit("this script runs auto-round for weights alone")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokens(data)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    tuned = AutoRound(
        network,
        AutoTokenizer.from_pretrained(model),
        bits=bits,
        group_size=group or -1,
        sym=symmetric,
        iters=0 if method == "rtn" else 1000 if best else 200,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        dataset=torch.utils.data.DataLoader(rows, batch_size=None),
        batch_size=8,
        enable_torch_compile=False,
        device_map="cpu",
    )
    tuned.quantize_and_save(str(out), format="auto_round")


TOOLS = {"llm-compressor": llm_compressor, "gptqmodel": gptqmodel, "auto-round": auto_round}
FLOAT_INPUTS = ("w4a16_g128", "w4a16_g32", "w3a16_g128")
CELLS = {
    "llm-compressor": {
        **dict.fromkeys(FLOAT_INPUTS, ("rtn", "gptq", "gptq-best", "awq", "awq-best")),
        "w4a16_g128_asym": ("rtn", "gptq", "awq", "awq-best"),
        **dict.fromkeys(("w8a8", "w4a8", "w4a4"), ("rtn", "gptq", "smoothquant", "smoothquant-best")),
    },
    "gptqmodel": {
        **dict.fromkeys(FLOAT_INPUTS, ("gptq", "gptq-best")),
        "w4a16_g128_asym": ("gptq", "gptq-best", "awq"),
    },
    "auto-round": {**dict.fromkeys(FLOAT_INPUTS, ("autoround",)), "w4a16_g128_asym": ("autoround",)},
}
"""Tool → scheme → methods that it has for it."""


def run(tool: str, models: list[str], prepared: Path, peers: Path, schemes: list[str]) -> list[str]:
    """Make the cells of one tool that are missing, each in a process of its own; returns those that failed."""
    failed = []
    for model in models:
        for scheme, methods in CELLS[tool].items():
            for method in methods if not schemes or scheme in schemes else ():
                target = peers / model / scheme / f"{tool}-{method}"
                if target.exists():
                    continue
                log = peers / "logs" / model / f"{scheme}-{target.name}.txt"
                log.parent.mkdir(parents=True, exist_ok=True)
                partial = peers / "partial" / model / f"{scheme}-{target.name}"
                command = [
                    sys.executable,
                    __file__,
                    "--cell",
                    tool,
                    method,
                    scheme,
                    str(prepared / model),
                    str(partial),
                ]
                with log.open("w") as output:
                    code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
                found = sorted(partial.rglob("config.json")) if not code else []
                print(f"{target}: {'done' if found else f'failed, see {log}'}", flush=True)
                if found:  # auto-round makes a folder in the folder
                    target.parent.mkdir(parents=True, exist_ok=True)
                    found[0].parent.rename(target)
                else:
                    failed.append(str(target))
    return failed


def main() -> None:
    if sys.argv[1:2] == ["--cell"]:
        tool, method, scheme, model, out = sys.argv[2:]
        tokens_file = Path(model) / "calibration.safetensors"
        TOOLS[tool](method.removesuffix("-best"), scheme, Path(model), tokens_file, Path(out), method.endswith("-best"))
        return
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("prepared", type=Path, help="the folder that quality.py --prepare wrote")
    parser.add_argument("peers", type=Path, help="the folder that quality.py --peers reads")
    parser.add_argument("--models", nargs="*", help="names of folders in PREPARED; default: all")
    parser.add_argument("--schemes", nargs="*", default=[])
    given = parser.parse_args()
    models = given.models or sorted(path.name for path in given.prepared.iterdir())
    if failed := run(given.tool, models, given.prepared, given.peers, given.schemes):
        sys.exit("failed: " + ", ".join(failed))


if __name__ == "__main__":
    main()
