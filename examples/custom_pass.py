"""A pass of one's own: exact GELU becomes its tanh approximation, as some devices have it in hardware.

    python examples/custom_pass.py

Passes see what ``qcompile`` found in the model, not its source: here, gated activations. The pass says that it is
lossy; ``qcompile`` holds it to shapes and dtypes, and to numbers when asked, and reports what it matched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from qcompile.passes.base import Edit, Result, apply_rules, semantic_name
from torch.fx import GraphModule, Node
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile


@dataclass
class ApproximateGelu:
    """``gelu(gate) * up`` by tanh. An installed package would offer it under the entry points "qcompile.passes"."""

    name: str = "approximate_gelu"
    level: str = "aot"
    numerics: str = "lossy"
    expected: int | None = None
    before: str = "fuse_gated_act_quant"

    def __call__(self, module: GraphModule) -> Result:
        return apply_rules([GeluByTanh()], module, self.name)


class GeluByTanh:
    """One rule, three questions: what looks right, what speaks against it, what takes its place."""

    def pattern(self, node: Node) -> Node | None:
        return node if semantic_name(node) == "gated_act" and node.args[2] == "gelu" else None

    def check(self, node: Node) -> str:
        dtype = node.meta["val"].dtype
        return "" if dtype.itemsize <= 2 else f"{dtype} shows the difference"

    def rewrite(self, node: Node, edit: Edit) -> None:
        gate, up, _ = node.args
        edit.replace(node, edit.call(node, node.target, (gate, up, "gelu_tanh")))


def build(dtype: torch.dtype) -> torch.nn.Module:
    """A small Llama with exact GELU, quantized."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, hidden_act="gelu", initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    return qcompile.quantize(LlamaForCausalLM(config).eval().to(dtype), "w8a8", progress=False)


@torch.no_grad()
def run(dtype: torch.dtype, pass_: ApproximateGelu) -> None:
    """Compile with the pass, compare with the model as it was, and print what happened."""
    model = build(dtype)
    tokens = torch.arange(24).view(2, 12)
    compiled = torch.compile(model, backend="qcompile", options={"passes": [pass_], "verify": "numbers"})
    expected = model(tokens).logits
    difference = ((compiled(tokens).logits - expected).norm() / expected.norm()).item()
    (graph,) = qcompile.report(compiled).graphs
    print(f"{dtype}: the logits differ by {difference:.2%}")
    for record in graph.passes:
        print(f"  {record.name:24} {record.matches:3} matches, {record.nodes_before} -> {record.nodes_after} nodes")
        for node, reason in record.rejected:
            print(f"    not {node}: {reason}")


def main() -> None:
    run(torch.bfloat16, ApproximateGelu())
    run(torch.float32, ApproximateGelu())
    try:
        run(torch.bfloat16, ApproximateGelu(numerics="exact"))
    except Exception as error:  # Dynamo wraps the PassError
        print(f"declared exact: {str(error).splitlines()[1]}")


if __name__ == "__main__":
    main()
