"""Loading speed: ``qcompile.load`` against plain reading of the same files and the same conversion of each weight.

    python benchmarks/cpu_loading.py                 # a checkpoint of about 1 GB with random codes
    python benchmarks/cpu_loading.py --layers 4 --json

The baseline reads every file whole with safetensors, and brings every weight into its kernel's layout: what a loader
must do at least. Both are run alternately in one process, from a warm page cache; medians and their ratio are shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import qcompile
from qcompile import plugins
from qcompile.modules import quantized_modules


def write(folder: Path, layers: int, scheme: str, format: str) -> int:
    """Write a Qwen3 of 2048 x 6144 per layer with random weights, quantized; returns the bytes of its files."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=32000, tie_word_embeddings=True,
    )  # fmt: skip
    torch.set_default_dtype(torch.float16)
    try:
        model = Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    qcompile.save(qcompile.quantize(model, scheme, progress=False), folder, format=format, shard_bytes=400 * 1000**2)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def plainly(folder: Path, stored: list, kernels: dict) -> None:
    """Read every file, convert every weight, one after the other."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    format, prepared = stored[0], []
    for site in stored[1]:
        prepared.append(kernels[site.name].prepare(format.read(site, tensors.__getitem__)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=38, help="of about 25 MB each in 4 bits")
    parser.add_argument("--scheme", default="w4a16_g128")
    parser.add_argument("--format", default="compressed-tensors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        size = write(folder, arguments.layers, arguments.scheme, arguments.format)
        model = qcompile.load(folder, progress=False)
        from qcompile.ops import find_kernel
        from qcompile.storage import Folder

        modules = quantized_modules(model)
        kernels = {name: find_kernel(module.kernel) for name, module in modules.items()}
        format = plugins.find("formats", arguments.format.replace("-", "_"))
        with Folder(folder) as opened:
            shapes = {name: module.shape for name, module in modules.items()}
            stored = (format, format.sites(opened.config, opened.headers, shapes))
        del model
        times: dict[str, list[float]] = {"plain": [], "qcompile": []}
        for _ in range(arguments.rounds):
            for name, run in (
                ("plain", lambda: plainly(folder, stored, kernels)),
                ("qcompile", lambda: qcompile.load(folder, progress=False)),
            ):
                started = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:10} {seconds:6.2f} s  {size / 1e6 / seconds:6.0f} MB/s")
    ratio = medians["plain"] / medians["qcompile"]
    print(f"{size / 1e9:.2f} GB of {arguments.scheme} as {arguments.format}: {ratio:.2f} of the plain speed")
    if arguments.json:
        print(json.dumps({"bytes": size, "seconds": medians, "ratios": {"loading_speed": ratio}}))


if __name__ == "__main__":
    main()
