"""Small mixtures of experts: families of transformers, and blocks that loop over a ModuleList as remote code does."""

from __future__ import annotations

import torch
from helpers import tiny_config
from torch import Tensor, nn
from torch.nn import functional as F

ROUTED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    "head_dim": 16, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 32, "num_key_value_heads": 4,
}  # fmt: skip
GROUPED = {
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
FAMILIES: dict[str, dict] = {
    "qwen3_moe": ROUTED | {"decoder_sparse_step": 1, "norm_topk_prob": True},
    "qwen2_moe": ROUTED | {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 96},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64},
    "deepseek_v2": LATENT | GROUPED | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT | GROUPED,
    "glm4_moe": GROUPED | {"n_group": 1},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 64},
    "llama4_text": {
        "num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size": 64, "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 1, "attention_chunk_size": 64,
    },
}  # fmt: skip
"""Changes of ``tiny_config``: two layers of width 128, experts of 64 features."""


def tiny_moe(family: str, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A model of that family with random weights that differ from expert to expert, in eval mode."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **(FAMILIES[family] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() > 1:
                tensor.normal_(std=tensor.shape[-1] ** -0.5)
            elif "bias" in name:
                tensor.normal_(std=0.1)
    return model


class MLP(nn.Module):
    """A gated MLP, as experts in a list are."""

    def __init__(self, hidden: int, intermediate: int, activation=F.silu, bias: bool = False) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(hidden, intermediate, bias=bias) for _ in range(2))
        self.w2 = nn.Linear(intermediate, hidden, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


class Looping(nn.Module):
    """Mixtral's and Qwen-MoE's block of transformers 4: scores, topk, and a loop over the experts that were chosen."""

    def __init__(
        self, hidden: int = 64, experts: int = 6, top_k: int = 2, *, order: str = "softmax-topk",
        normalized: bool = True, scale: float = 1.0, shared: str = "", activation=F.silu, bias: bool = False,
        early: bool = False, logits: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.top_k, self.order, self.normalized, self.factor = top_k, order, normalized, scale
        self.early, self.logits = early, logits
        self.router = nn.Linear(hidden, experts, bias=False)
        self.feed = nn.ModuleList([MLP(hidden, 96, activation, bias) for _ in range(experts)])
        self.always = MLP(hidden, 32) if shared else None
        self.always_gate = nn.Linear(hidden, 1, bias=False) if shared == "gated" else None

    def forward(self, hidden_states: Tensor):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.router(x)
        if self.order == "softmax-topk":
            weights, ids = torch.topk(logits.softmax(-1, dtype=torch.float), self.top_k, dim=-1)
        elif self.order == "sigmoid-topk":
            weights, ids = torch.topk(logits.float().sigmoid(), self.top_k, dim=-1)
        else:
            weights, ids = torch.topk(logits.float(), self.top_k, dim=-1)
            weights = weights.softmax(-1)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = (weights * self.factor).to(x.dtype)
        result = torch.zeros_like(x)
        for expert in range(len(self.feed)):
            token, slot = torch.where(ids == expert)
            if token.numel():
                own = weights[token, slot, None]
                rows = self.feed[expert](x[token] * own) if self.early else self.feed[expert](x[token]) * own
                result.index_add_(0, token, rows.to(x.dtype))
        if self.always is not None:
            always = self.always(x)
            result = result + (always if self.always_gate is None else self.always_gate(x).sigmoid() * always)
        result = result.view(hidden_states.shape)
        return (result, logits) if self.logits else result


class GroupGate(nn.Module):
    """The router of DeepSeek's own code: sigmoid, a bias for choosing, groups, normalised and scaled weights."""

    def __init__(self, hidden: int, experts: int, top_k: int, groups: int) -> None:
        super().__init__()
        self.top_k, self.groups, self.routed_scaling_factor = top_k, groups, 2.5
        self.weight = nn.Parameter(torch.randn(experts, hidden) / hidden**0.5)
        self.e_score_correction_bias = nn.Parameter(torch.randn(experts) / 10)

    def forward(self, hidden_states: Tensor):
        batch, length, hidden = hidden_states.shape
        scores = F.linear(hidden_states.view(-1, hidden).float(), self.weight.float()).sigmoid()
        choice = scores + self.e_score_correction_bias
        grouped = choice.view(batch * length, self.groups, -1)
        best = grouped.topk(2, dim=-1)[0].sum(-1).topk(1, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(grouped).scatter_(1, best[..., None].expand(-1, -1, grouped.shape[-1]), 1.0)
        masked = choice.masked_fill(mask.flatten(1) == 0, float("-inf"))
        ids = torch.topk(masked, self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.routed_scaling_factor


class Sorting(nn.Module):
    """DeepSeek's block in remote code: tokens sorted by expert, counts read on the host."""

    def __init__(self, hidden: int = 64, experts: int = 8, top_k: int = 3) -> None:
        super().__init__()
        self.gate = GroupGate(hidden, experts, top_k, groups=2)
        self.experts = nn.ModuleList([MLP(hidden, 96) for _ in range(experts)])
        self.shared_experts = MLP(hidden, 48)

    def forward(self, hidden_states: Tensor) -> Tensor:
        ids, weights = self.gate(hidden_states)
        x = hidden_states.view(-1, hidden_states.shape[-1])
        counts = F.one_hot(ids, len(self.experts)).sum((0, 1)).cpu().numpy()
        order = ids.view(-1).argsort()
        rows, results, start = x[order // ids.shape[1]], [], 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                results.append(expert(rows[start : start + count]))
            start += count
        gathered = torch.cat(results)
        placed = torch.empty_like(gathered)
        placed[order] = gathered
        routed = (placed.view(*ids.shape, -1).to(weights.dtype) * weights[..., None]).sum(1).to(x.dtype)
        return routed.view(hidden_states.shape) + self.shared_experts(hidden_states)


class Decoder(nn.Module):
    """Token ids [batch, sequence] -> logits: embedding, blocks behind a norm, head."""

    def __init__(self, *blocks: nn.Module, hidden: int = 64, vocabulary: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(hidden), "mix": nn.Linear(hidden, hidden), "mlp": block})
            for block in blocks
        )
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["mix"](x)
            result = layer["mlp"](layer["norm"](x))
            x = x + (result[0] if isinstance(result, tuple) else result)
        return self.head(x)


IDS = (torch.zeros((2, 6), dtype=torch.long),)
"""Example inputs of a ``Decoder``."""
