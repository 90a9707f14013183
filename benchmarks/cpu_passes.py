"""What the passes before ``lower`` are worth on the CPU: compiled w8a8 prefill with and without them.

    python benchmarks/cpu_passes.py                         # Qwen3-0.6B's layers and a mixture of experts, 256 tokens
    python benchmarks/cpu_passes.py --models qwen3 --each --json

"with" runs all passes; "without" leaves out those that share and fuse the quantization of activations and that merge
Linears (``canonicalize`` and ``lower`` stay); ``--each`` leaves out one at a time as well. Both are compiled from one
model in one process, and runs are interleaved (A B, A B ...), so that whatever else the machine does hits both; medians
and the ratio without / with are reported, and how many nodes each pass found and left.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

import qcompile

PASSES = ("share_activation_quant", "merge_linears", "fuse_norm_quant", "fuse_gated_act_quant")
COMMON = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
SHAPES = {
    "qwen3": {"hidden_size": 1024, "intermediate_size": 3072},
    "qwen3_moe": {
        "hidden_size": 1024, "intermediate_size": 3072, "moe_intermediate_size": 512, "num_experts": 32,
        "num_experts_per_tok": 4, "decoder_sparse_step": 1, "norm_topk_prob": True,
    },
    "tiny": {"hidden_size": 256, "intermediate_size": 512},
}  # fmt: skip


def build(shape: str, layers: int, vocabulary: int) -> torch.nn.Module:
    """A bfloat16 model with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = "qwen3" if shape == "tiny" else shape
    sizes = {"num_hidden_layers": layers, "vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON, **SHAPES[shape], **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


@torch.no_grad()
def measure(shape: str, arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, list[dict]]]:
    """Median seconds of a prefill, and what each pass did, by variant."""
    model = qcompile.quantize(build(shape, arguments.layers, arguments.vocabulary), arguments.scheme)
    left_out = {"with": (), "without": PASSES, **({f"without {p}": (p,) for p in PASSES} if arguments.each else {})}
    ids = torch.randint(3, arguments.vocabulary, (1, arguments.tokens))
    functions, passes = {}, {}
    for name, missing in left_out.items():
        options = {"passes": [f"-{pass_}" for pass_ in missing]}
        functions[name] = torch.compile(model, backend="qcompile", options=options, dynamic=True)
        functions[name](input_ids=ids, use_cache=False, logits_to_keep=1)  # compiles
        records = qcompile.report(model).graphs[-1].passes
        passes[name] = [
            {"name": r.name, "matches": r.matches, "nodes_before": r.nodes_before, "nodes_after": r.nodes_after}
            for r in records
        ]
        assert not set(missing) & {record.name for record in records}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(arguments.rounds):
        for name, function in list(functions.items())[:: 1 if i % 2 else -1]:
            started = time.perf_counter()
            function(input_ids=ids, use_cache=False, logits_to_keep=1)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}, passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["qwen3", "qwen3_moe"])
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--each", action="store_true", help="leave out each pass alone as well")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    facts = {
        "scheme": arguments.scheme, "tokens": arguments.tokens, "layers": arguments.layers,
        "threads": arguments.threads, "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(), "models": {},
    }  # fmt: skip
    for shape in arguments.models:
        medians, passes = measure(shape, arguments)
        facts["models"][shape] = {
            "milliseconds": {name: value * 1e3 for name, value in medians.items()},
            "ratios": {name: value / medians["with"] for name, value in medians.items() if name != "with"},
            "passes": passes["with"],
        }
        report(shape, arguments, facts["models"][shape])
    if arguments.json:
        print(json.dumps(facts))


def report(shape: str, arguments: argparse.Namespace, facts: dict) -> None:
    """Print the two tables."""
    title = f"{shape}, {arguments.layers} layers, {arguments.scheme}, {arguments.tokens} tokens"
    speed = Table("passes", "prefill ms", "× all passes", title=f"{title}, {arguments.threads} threads")
    for name, value in facts["milliseconds"].items():
        speed.add_row(name, f"{value:.1f}", f"{facts['ratios'].get(name, 1.0):.3f}")
    counts = Table("pass", "matches", "nodes before", "after", title=f"{shape}: the graph of a prefill")
    for record in facts["passes"]:
        counts.add_row(*(str(record[key]) for key in ("name", "matches", "nodes_before", "nodes_after")))
    Console().print(speed, counts)


if __name__ == "__main__":
    main()
