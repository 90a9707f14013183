"""Train the small language models that ship with the project (about 25 minutes each on 2 CPU cores).

    python examples/train_tiny_lm.py --out examples/tiny_lm
    python examples/train_tiny_lm.py --moe --out examples/tiny_moe

The text is what every Python installation has: the language reference in ``pydoc_data.topics``, and the sources and
docstrings of the standard library. Documents are split into training and held-out by a hash of their *file*, so
nothing that is measured was seen. The result is an ordinary Qwen3 or Qwen3-MoE checkpoint (bfloat16 safetensors and a
byte-level BPE tokenizer) beside ``heldout.safetensors`` (token ids), ``calibration.safetensors`` (ids of windows of the
training text, on which methods are compared) and ``training.json`` (what was measured).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import math
import sys
import sysconfig
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

END = "<|endoftext|>"
VOCABULARY, SEQUENCE = 4096, 256
CALIBRATION = 128  # windows of SEQUENCE tokens
SKIPPED_FOLDERS = {
    "test", "tests", "idlelib", "idle_test", "lib2to3", "encodings", "site-packages", "pydoc_data", "turtledemo",
    "ensurepip", "__pycache__",
}  # fmt: skip


def is_held_out(name: str) -> bool:
    """One file in twenty, chosen by the hash of its name: the same files on every machine."""
    return hashlib.sha256(name.encode()).digest()[0] % 20 == 0


def docstrings(source: str, module: str) -> str:
    """Render the docstrings of one source file the way ``help()`` would."""
    parts = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) or not (text := ast.get_docstring(node)):
            continue
        if isinstance(node, ast.Module):
            title = f"Help on module {module}:"
        elif isinstance(node, ast.ClassDef):
            title = f"class {node.name} in module {module}"
        else:
            title = f"{module}.{node.name}({ast.unparse(node.args)})"
        parts.append(f"{title}\n\n" + "\n".join("    " + line for line in inspect.cleandoc(text).splitlines()))
    return "\n\n".join(parts)


def documents() -> list[tuple[str, str]]:
    """Return (file name, text) of every document, in a fixed order."""
    from pydoc_data.topics import topics

    found = [(f"topics/{name}", text) for name, text in sorted(topics.items())]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        if 200 < len(source) < 300_000:
            found.append((str(relative), source))
            if help_text := docstrings(source, relative.with_suffix("").as_posix().replace("/", ".")):
                found.append((str(relative), help_text))
    return found


def train_tokenizer(texts: list[str]):
    """Train a byte-level BPE tokenizer on the training texts alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


def build_model(moe: bool):
    """A Qwen3 of 5 million parameters, or a Qwen3-MoE of 8 (16 experts, 4 per token); all sizes fit group size 128.

    The load of the experts is balanced by the usual auxiliary loss, so that none of them is idle.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if not moe:
        return Qwen3ForCausalLM(Qwen3Config(intermediate_size=640, num_hidden_layers=6, **common))
    config = Qwen3MoeConfig(
        num_hidden_layers=4,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        **common,
    )
    return Qwen3MoeForCausalLM(config)


@torch.no_grad()
def perplexity(model, ids: torch.Tensor) -> float:
    """Perplexity over non-overlapping windows of SEQUENCE tokens."""
    windows = ids[: len(ids) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    losses = [model(input_ids=w, labels=w).loss.float().item() for w in windows.split(16)]
    weights = [len(w) for w in windows.split(16)]
    return math.exp(sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights))


def unigram_perplexity(train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Perplexity of the held-out ids under add-one smoothed token frequencies of the training ids."""
    counts = torch.bincount(train, minlength=VOCABULARY).double() + 1
    return math.exp(-(counts / counts.sum()).log()[held_out].mean().item())


def calibration_windows(ids: torch.Tensor) -> torch.Tensor:
    """Token ids [CALIBRATION, SEQUENCE] from random places of the training text, the same for every model."""
    starts = torch.randint(0, len(ids) - SEQUENCE, (CALIBRATION, 1), generator=torch.Generator().manual_seed(1))
    return ids[starts + torch.arange(SEQUENCE)]


def train(model, moe: bool, ids: torch.Tensor, steps: int, batch_size: int, generator: torch.Generator) -> None:
    """AdamW with a cosine schedule on random windows; bfloat16 matrix products."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    warm_up = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm_up, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * i / steps))),
    )
    offsets, options = torch.arange(SEQUENCE), {"output_router_logits": True} if moe else {}
    started = time.perf_counter()
    for step in range(steps):
        starts = torch.randint(0, len(ids) - SEQUENCE, (batch_size, 1), generator=generator)
        batch = ids[starts + offsets]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, **options).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps - 1:
            spent = time.perf_counter() - started
            left = spent / (step + 1) * (steps - step - 1)
            print(f"step {step:5d}/{steps}  loss {loss.item():.3f}  {spent:6.0f} s, {left:6.0f} s left", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("examples/tiny_lm"))
    parser.add_argument("--moe", action="store_true", help="train the mixture of experts")
    parser.add_argument("--steps", type=int, help="default: 1500, or 800 of the mixture of experts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    texts = documents()
    kept = [text for name, text in texts if not is_held_out(name)]
    held = [text for name, text in texts if is_held_out(name)]
    tokenizer = train_tokenizer(kept)
    encode = lambda group: torch.tensor(  # noqa: E731
        [i for ids in tokenizer([t + END for t in group], verbose=False)["input_ids"] for i in ids]
    )
    train_ids, held_ids = encode(kept), encode(held)
    print(f"{len(kept)} training documents, {len(train_ids)} tokens; {len(held)} held out, {len(held_ids)} tokens")

    model = build_model(arguments.moe)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters")
    started = time.perf_counter()
    steps, batch_size = (800, 16) if arguments.moe else (1500, 24)
    steps = arguments.steps or steps
    train(model, arguments.moe, train_ids, steps, batch_size, torch.Generator().manual_seed(arguments.seed))
    model = model.to(torch.bfloat16).eval()
    held_ids = held_ids[: 160 * SEQUENCE]
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": len(train_ids),
        "steps": steps,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "python": sys.version.split()[0],
        "held_out_tokens": len(held_ids),
        "held_out_perplexity": round(perplexity(model, held_ids), 3),
        "unigram_perplexity": round(unigram_perplexity(train_ids, held_ids), 1),
    }
    print(json.dumps(facts, indent=2))
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    save_file({"input_ids": held_ids.to(torch.int16)}, arguments.out / "heldout.safetensors")
    save_file({"input_ids": calibration_windows(train_ids).to(torch.int16)}, arguments.out / "calibration.safetensors")
    (arguments.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
