"""The command line: the Python API from a shell.

Results go to stdout, errors and progress to stderr. Exit codes: 0 done, 1 an error that qcompile explains, 2 wrong
usage, 130 interrupted. Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import cli_views
from .cli_options import (
    Checkpoint,
    Device,
    ExpertParallel,
    Json,
    Overwrite,
    Soc,
    TensorParallel,
    chip,
    progress,
    stderr,
    writable,
    write,
)  # fmt: skip
from .errors import ConfigError, QcompileError

if TYPE_CHECKING:
    from .demo import Row

app = typer.Typer(
    name="qcompile",
    help="Quantized models through the compiler, on any device.",
    epilog="Start with: [bold]qcompile demo[/]. Then: [bold]qcompile quantize FLOAT_FOLDER NEW_FOLDER --config rtn[/]",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of ``qcompile``."""
    try:
        app(prog_name="qcompile")
    except BrokenPipeError:  # the reader has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        explained = _explained(error)
        if explained is None:
            raise
        stderr().print(f"error: {' '.join(str(explained).split())}", style="bold red", markup=False)
        raise SystemExit(1) from None


def _explained(error: BaseException | None) -> QcompileError | None:
    """The error that qcompile raised on purpose, also from inside a compilation, where Dynamo wraps it."""
    while error is not None and not isinstance(error, QcompileError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    return error


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from . import __version__

        print(__version__)
        raise typer.Exit


@app.command(epilog="Example: [bold]qcompile demo --out report.html[/]")
def demo(
    out: Annotated[Path, typer.Option(help="HTML report to write (replaced if it exists).")] = Path(
        "qcompile-report.html"
    ),
    model: Annotated[
        Path | None, typer.Option(help="Folder of another small language model with heldout.safetensors.")
    ] = None,
    moe: Annotated[bool, typer.Option("--moe", help="Take the small mixture of experts instead.")] = False,
) -> None:
    """Quantize the small language model that ships with the project, compile it, and compare.

    Takes about two minutes on two cores and needs no network.
    """
    from . import demo as demo_

    if moe and model:
        raise ConfigError("--moe and --model both choose the model; give one of them")
    folder = demo_.find_model(model, moe)
    writable(out)
    total = sum(demo_.STEPS.values()) * (1 + len(demo_.SCHEMES))
    with progress() as bar:
        task = bar.add_task("starting", total=total)
        pending = 0.0

        def step(scheme: str, what: str) -> None:
            nonlocal pending
            bar.update(task, advance=pending, description=f"{scheme}: {what}")
            pending = demo_.STEPS[what]

        rows = demo_.run(folder, step)
        bar.update(task, completed=total, description="done")
    _print_demo(rows, f"{folder.name} on {demo_.machine()}", demo_.PROMPT)
    from .webpage import html_page

    cells = [{**row.cells(), "continuation": row.sample} for row in rows]
    reports = [row.report for row in rows if row.report]
    write(out, html_page("qcompile demo", reports, cells, lead=f"{folder.name} on {demo_.machine()}"))
    print(f"report: {out.resolve()}")


@app.command(epilog="Example: [bold]qcompile inspect examples/tiny_lm --device cpu --json[/]")
def inspect(
    path: Checkpoint,
    config: Annotated[
        str | None,
        typer.Option(help="Of a float checkpoint: how it would be quantized, by a preset, a scheme or a file.yaml."),
    ] = None,
    device: Device = "cpu",
    tp: TensorParallel = 1,
    ep: ExpertParallel = None,
    as_json: Json = False,
    soc: Soc = None,
) -> None:
    """Show what would happen to every site of a checkpoint, from its config and headers alone.

    Reads no weights. Exits with 1 if this checkpoint cannot be used on the device, which need not be there. With --tp
    and --ep: what one of so many ranks would hold, what they would tell each other, and what stays whole.
    """
    import qcompile

    from .reporting import plan_dict

    with chip(device, soc):
        plan = qcompile.inspect(path, device=device, config=config, tp=tp, ep=ep)
    print(json.dumps(plan_dict(plan), indent=2) if as_json else plan)


@app.command(epilog="Example: [bold]qcompile quantize examples/tiny_lm tiny_w4 --config rtn --report report.html[/]")
def quantize(
    path: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    config: Annotated[
        str, typer.Option(help="A preset (rtn), a scheme (w8a8, w4a16_g64_asym) or a file.yaml.")
    ] = "rtn",
    data: Annotated[
        Path | None,
        typer.Option(help="Calibration data: UTF-8 text, .jsonl with 'text', or .safetensors with 'input_ids'."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences, at most.")] = 128,
    sequence: Annotated[
        int | None, typer.Option(min=1, help="Tokens per sequence (default: 512, or all that the model can take).")
    ] = None,
    rare_experts: Annotated[
        str, typer.Option(help="For experts that see too few tokens of the data: error, all_tokens or rtn.")
    ] = "error",
    resume: Annotated[
        Path | None, typer.Option(help="Folder that keeps a calibration's progress; a second run goes on from it.")
    ] = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    report: Annotated[Path | None, typer.Option(help="Also write the report as an HTML page.")] = None,
    as_json: Json = False,
) -> None:
    """Quantize a float checkpoint and save the result with its tokenizer."""
    from .config import as_config

    settings = as_config(config)
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; choose another folder or pass --overwrite to replace it")
    if report:
        writable(report)

    import qcompile

    from .calibration_data import read_data
    from .reporting import report_dict, report_html

    texts = read_data(data) if data else None
    model = qcompile.load(path, device=device)
    qcompile.quantize(
        model, settings, device=device, data=texts, samples=samples, sequence=sequence, rare_experts=rare_experts,
        resume=resume,
    )  # fmt: skip
    facts = qcompile.report(model)
    qcompile.save(model, out, overwrite=overwrite)
    if report:
        write(report, report_html(facts))
    if as_json:
        print(json.dumps({"path": str(out), **report_dict(facts)}, indent=2))
        return
    print(facts)
    print(f"\nsaved: {out.resolve()}")
    if report:
        print(f"report: {report.resolve()}")


@app.command(epilog="Example: [bold]qcompile convert tiny_w4 tiny_gptq --format gptq_v2[/]")
def convert(
    path: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    format: Annotated[
        str, typer.Option(help="compressed-tensors, gptq, gptq_v2, awq, modelslim or cann-recipes.", show_default=False)
    ],
    overwrite: Overwrite = False,
) -> None:
    """Write a quantized checkpoint in another format: the same codes, scales and zero points.

    Exits with 1, and writes nothing, if the format cannot hold a weight; the message names it and says why.
    """
    import qcompile

    qcompile.convert(path, out, format=format, overwrite=overwrite)
    print(f"converted: {out.resolve()}")


@app.command(epilog='Example: [bold]qcompile generate tiny_w4 --prompt "def main(" --max-new-tokens 40[/]')
def generate(
    path: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 64,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile first: takes seconds, pays for long texts.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Repeats the same random choices.")] = 0,
    device: Device = "cpu",
    tp: TensorParallel = 1,
    ep: ExpertParallel = None,
) -> None:
    """Continue a prompt with a quantized or float model, token by token as they come.

    On several devices: torchrun --nproc-per-node N -m qcompile generate PATH --prompt TEXT --tp N
    """
    import torch
    from transformers import TextStreamer

    import qcompile

    from . import models
    from .parallel.launch import launched

    tokenizer = models.load_tokenizer(path)
    with launched(tp, ep, device) as (mesh, own_device, is_first):
        model = qcompile.load(path, device=own_device, mesh=mesh, ep=ep, progress=None if is_first else False)
        if compile:
            model = torch.compile(model, backend="qcompile")  # type: ignore[assignment]
        inputs = tokenizer(prompt, return_tensors="pt")["input_ids"].to(own_device)
        if inputs.shape[1] == 0:
            raise ConfigError("the prompt is empty; give at least one word")
        torch.manual_seed(seed)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature}
        model.generate(  # type: ignore[operator]
            inputs,
            attention_mask=torch.ones_like(inputs),
            streamer=TextStreamer(tokenizer, skip_special_tokens=True) if is_first else None,
            max_new_tokens=max_new_tokens,
            **sampling,
        )


@app.command(name="eval", epilog="Example: [bold]qcompile eval tiny_w4 --reference examples/tiny_lm --json[/]")
def evaluate(
    path: Checkpoint,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to measure on (default: heldout.safetensors beside a model).")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Float checkpoint to compare with: adds the divergence of predictions.")
    ] = None,
    sequence: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Measure only the first tokens of the text.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure the perplexity of a quantized or float model, and how far it is from a reference."""
    import qcompile

    from . import evaluation, models

    beside = [path, reference] if reference else [path]
    ids = models.text_ids(text, models.load_tokenizer(path)) if text else models.held_out_ids(*beside)
    ids = ids[:max_tokens]
    model = qcompile.load(path, device=device)
    facts: dict[str, Any] = {"tokens": len(ids) // sequence * sequence, "sequence": sequence}
    facts["perplexity"] = evaluation.perplexity(model, ids, sequence)
    if reference:
        float_model = qcompile.load(reference, device=device)
        facts["reference_perplexity"] = evaluation.perplexity(float_model, ids, sequence)
        facts["divergence"] = evaluation.divergence(model, float_model, ids, sequence)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print(f"perplexity {facts['perplexity']:.3f} on {facts['tokens']} tokens in windows of {sequence}")
    if reference:
        print(f"reference  {facts['reference_perplexity']:.3f}")
        print(f"divergence {facts['divergence']:.5f} nats per token, KL(reference ‖ model)")


for _command, _example in cli_views.COMMANDS.items():
    app.command(epilog=f"Example: [bold]{_example}[/]")(_command)


def _print_demo(rows: list[Row], title: str, prompt: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=120)
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(rows[0].cells()):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row.cells().values())
    console.print(table)
    console.print(f"continuations of {prompt!r}:", markup=False, highlight=False)
    for row in rows:
        line = f"  {row.scheme:15} {row.sample!r}"
        console.print(line, markup=False, highlight=False, overflow="ellipsis", no_wrap=True)
