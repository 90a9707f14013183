"""The commands that look: report, graph, bench and schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Checkpoint, Device, Json, stderr, writable, write


def report(
    path: Checkpoint,
    html: Annotated[Path | None, typer.Option(help="Write the report as an HTML page, too.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds: coverage, bytes, kernels and why better ones were refused.

    The errors of the weights are known when they are quantized only: see the option --report of quantize.
    """
    import qcompile

    if html:
        writable(html)
    facts = qcompile.report(qcompile.load(path, device=device))
    if html:
        write(html, facts.to_html())
    print(json.dumps(facts.to_dict(), indent=2) if as_json else facts)


def graph(
    path: Checkpoint,
    block: Annotated[int, typer.Option(min=0, help="Which decoder block.")] = 0,
    out: Annotated[Path | None, typer.Option(help="SVG to write (default: graph-BLOCK.svg).")] = None,
    only: Annotated[str, typer.Option("--pass", help="Before and after this pass alone, such as lower.")] = "",
    config: Annotated[str | None, typer.Option(help="Quantize a float checkpoint first, as this says.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Length of the prompt that is traced.")] = 16,
    device: Device = "cpu",
) -> None:
    """Draw a decoder block of the compiled graph before and after the passes, with the rewritten nodes marked."""
    import torch

    import qcompile

    from .graph_view import before_and_after, to_svg, to_text

    file = out or Path(f"graph-{block}.svg")
    writable(file)
    with stderr().status("tracing"):
        model = qcompile.load(path, device=device, config=config)
        ids = torch.arange(2, 2 + tokens, device=device)[None]
        before, after = before_and_after(model, (ids,), block, only)
    write(file, to_svg(before, after, f"block {block} of {path.name}, {f'pass {only}' if only else 'passes'}"))
    print(to_text(before, after))
    print(f"\ngraph: {file.resolve()}")


def bench(
    path: Checkpoint,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure the compiled model, too.")] = True,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure how fast a model generates, eager and compiled, and how much memory its tensors take."""
    import time

    import torch

    import qcompile

    from . import evaluation, models
    from .tables import size

    model = qcompile.load(path, device=device)
    prompt = torch.arange(2, 2 + prompt_tokens, device=device)[None] % model.config.vocab_size  # type: ignore
    facts: dict[str, Any] = {"threads": torch.get_num_threads(), "bytes": models.nbytes(model)}
    facts["eager_tokens_per_second"] = evaluation.tokens_per_second(model, prompt, new_tokens)
    if compile:
        with stderr().status("compiling"):
            started = time.perf_counter()
            compiled: Any = torch.compile(model, backend="qcompile", options={"allow_float": True})
            models.greedy(compiled, prompt, 2)
            facts["compile_seconds"] = time.perf_counter() - started
        facts["compiled_tokens_per_second"] = evaluation.tokens_per_second(compiled, prompt, new_tokens)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print(f"{size(facts['bytes'])} of tensors, {facts['threads']} threads, prompt of {prompt_tokens} tokens")
    print(f"eager    {facts['eager_tokens_per_second']:8.1f} tokens per second")
    if compile:
        print(f"compiled {facts['compiled_tokens_per_second']:8.1f} tokens per second, first ones after "
              f"{facts['compile_seconds']:.0f} s of compiling")  # fmt: skip


def schema() -> None:
    """Print the JSON schema of a configuration file, for editors and for checks."""
    from .config import QuantConfig

    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **QuantConfig.model_json_schema()}
    print(json.dumps(described, indent=2))


COMMANDS: dict[Callable[..., None], str] = {
    report: "qcompile report tiny_w4 --html report.html",
    graph: "qcompile graph tiny_w4 --block 0",
    bench: "qcompile bench tiny_w4 --new-tokens 16",
    schema: "qcompile schema",
}
"""Each command with an example."""
