"""A large mixture of experts without weights: traced, planned and rewritten; prints seconds, nodes, bytes. Run it.

``total`` are seconds on the clock, ``cpu`` those that this process computed, which a busy machine does not lengthen.
"""

import dataclasses
import json
import resource
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qcompile.config import QuantConfig
from qcompile.float_experts import fuse
from qcompile.modules import module_of, replace_module
from qcompile.planning import make_plan
from qcompile.rewriting import rewrite_graph
from qcompile.trace import trace
from qcompile.types import PackedWeight, PlannedSite

QWEN = {
    "vocab_size": 151936, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "qwen3-30b-a3b": ("qwen3_moe", QWEN | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
        "moe_intermediate_size": 768,
    }),
    "qwen3-235b-a22b": ("qwen3_moe", QWEN | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94, "num_attention_heads": 64,
        "moe_intermediate_size": 1536,
    }),
    "deepseek-v3": ("deepseek_v3", {}),  # what transformers has as its default: 61 layers, 256 experts
}  # fmt: skip


def empty(planned: PlannedSite) -> PackedWeight:
    """A w4a16_g32 weight of the shape of a site, on the meta device."""
    *lead, out, inn = planned.site.shape
    codes = torch.empty(*lead, out, inn // 2, dtype=torch.uint8, device="meta")
    scales = torch.empty(*lead, out, -(-inn // 32), dtype=torch.bfloat16, device="meta")
    return PackedWeight(planned.scheme, planned.site.shape, codes, scales)


def measure(shape: str) -> dict:
    """Seconds of each step, nodes before and after, sites, and the peak memory of this process."""
    family, sizes = SHAPES[shape]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    started, computed = time.perf_counter(), time.process_time()
    traced = trace(model)
    nodes = len(traced.graph.graph.nodes)
    at = [time.perf_counter()]
    plan = make_plan(QuantConfig(scheme="w4a16_g32"), traced.sites, "cpu")
    plan = dataclasses.replace(plan, sites=tuple(dataclasses.replace(p, kernel="cpu.reference") for p in plan))
    at.append(time.perf_counter())
    fuse(model, traced.experts)
    for planned in plan.quantized:
        module = model.get_submodule(planned.site.name)
        replace_module(model, module, module_of(planned, empty(planned), module.bias))
    records = rewrite_graph(traced.graph, plan, model)
    at.append(time.perf_counter())
    return {
        "parameters": parameters,
        "seconds": {"trace": at[0] - started, "plan": at[1] - at[0], "rewrite": at[2] - at[1]},
        "total": at[-1] - started,
        "cpu": time.process_time() - computed,
        "nodes": [nodes, len(traced.graph.graph.nodes)],
        "matches": [record.matches for record in records],
        "sites": len(plan.quantized),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
