"""Speed of one mixture-of-experts block on the CPU: quantized against transformers' bfloat16 experts.

    python benchmarks/cpu_moe.py                                  # 128 experts, 8 per token, 2048 x 768
    python benchmarks/cpu_moe.py --schemes w4a16_g128 w8a8 --tokens 1 --json
    python benchmarks/cpu_moe.py --ggml --json                    # beside ggml's, of llama-cpp-python

Every variant runs in one process, with random weights. Rounds are interleaved (A B C, A B C ...), so that whatever else
the machine does hits all of them; medians and ratios are reported. Each call gets other tokens, so that other experts
are read and none of them is in a cache. The baselines are the forms of experts that transformers has for a CPU:
``grouped_mm`` compiled by ``torch.compile``, and ``eager``, whose loop over the chosen experts no compiler can take.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
from cpu_common import cpu_name
from rich.console import Console
from rich.table import Table

import qcompile

INPUTS = 16  # different batches of tokens
GGML = "ggml Q4_0"


def build(arguments: argparse.Namespace) -> torch.nn.Module:
    """A Qwen3-MoE block with random bfloat16 weights; its router and experts are those of the model class."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=arguments.hidden,
        moe_intermediate_size=arguments.intermediate,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config).to(torch.bfloat16).eval().requires_grad_(False)
    block = block.to_empty(device="cpu")
    for parameter in block.parameters():
        parameter.normal_(0, 0.02)
    return block


def with_implementation(block: torch.nn.Module, name: str) -> torch.nn.Module:
    """The same block, on the same weights, with another form of its experts."""
    memo = {id(parameter): parameter for parameter in block.parameters()}
    copied = copy.deepcopy(block, memo)
    copied.experts.config = copy.deepcopy(block.experts.config)
    copied.experts.config._experts_implementation = name
    return copied


def variants(arguments: argparse.Namespace) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """What is measured, by name; baselines first."""
    block = build(arguments)
    made = {
        "grouped_mm": torch.compile(with_implementation(block, "grouped_mm"), dynamic=True),
        "eager": with_implementation(block, "eager"),
    }
    example = (torch.zeros(1, 8, arguments.hidden, dtype=torch.bfloat16),)
    for scheme in arguments.schemes:
        quantized = qcompile.quantize(copy.deepcopy(block), scheme, example_inputs=example)
        made[scheme] = torch.compile(quantized, backend="qcompile", dynamic=True)
    if arguments.ggml:
        from cpu_ggml import Experts

        sizes = (arguments.hidden, arguments.intermediate, arguments.experts, arguments.top_k)
        made[GGML] = Experts(*sizes, arguments.threads)
    return made


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Median seconds of a call, by number of tokens and variant."""
    functions = variants(arguments)
    medians: dict[int, dict[str, float]] = {}
    for tokens in arguments.tokens:
        inputs = [torch.randn(1, tokens, arguments.hidden, dtype=torch.bfloat16) for _ in range(INPUTS)]
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():
            function(inputs[0])  # compiles
        rounds = max(3, arguments.rounds // (1 if tokens < 64 else 4))
        for i in range(rounds):
            for name, function in functions.items():
                started = time.perf_counter()
                function(inputs[i % INPUTS])
                seconds[name].append(time.perf_counter() - started)
        medians[tokens] = {name: statistics.median(values) for name, values in seconds.items()}
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", nargs="+", default=["w4a16_g128", "w8a16", "w4a8_g128", "w8a8"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--ggml", action="store_true", help="also ggml's experts in Q4_0 (cpu_ggml.py)")
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report(arguments, measure(arguments))


def report(arguments: argparse.Namespace, medians: dict[int, dict[str, float]]) -> None:
    """Print the table, and the JSON line when asked."""
    shape = f"{arguments.experts} experts, {arguments.top_k} per token, {arguments.hidden} x {arguments.intermediate}"
    table = Table(title=f"{shape}, {arguments.threads} threads")
    columns = ("tokens", "variant", "ms", "tok/s", "× grouped_mm", "× eager", "× best bfloat16")
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right")
    ratios = {}
    for tokens, seconds in medians.items():
        grouped, eager = seconds["grouped_mm"], seconds["eager"]
        for name, value in seconds.items():
            against = (grouped / value, eager / value, min(grouped, eager) / value)
            table.add_row(
                str(tokens), name, f"{value * 1e3:.2f}", f"{tokens / value:.0f}", *(f"{ratio:.2f}" for ratio in against)
            )
            if name in arguments.schemes:
                ratios[f"{name}_{tokens}"] = against[2]
                if GGML in seconds:
                    ratios[f"{name}_{tokens}_ggml"] = seconds[GGML] / value
        table.add_section()
    Console().print(table)
    if arguments.json:
        facts = {
            "shape": shape,
            "threads": arguments.threads,
            "torch": torch.__version__,
            "machine": cpu_name(),
            "milliseconds": {t: {n: s * 1e3 for n, s in seconds.items()} for t, seconds in medians.items()},
            "ratios": ratios,
        }
        print(json.dumps(facts))


if __name__ == "__main__":
    main()
