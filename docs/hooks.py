"""Pages that mkdocs makes of the code: the support matrix, and every message of every error."""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import qcompile
from qcompile import errors, kernels, plugins
from qcompile.types import Scheme, Site

SCHEMES = (
    "w8a16", "w4a16", "w4a16_g128", "w4a16_g32_asym", "w3a16_g64_asym", "w2a16_g64_asym", "w8a8", "w8a8_static",
    "w8a8_dynamic_asym", "w4a8_g128", "w4a8_clip", "w4a4", "wfp8a16", "wfp8afp8", "wfp8afp8_b128x128", "wnvfp4a16",
    "wnvfp4anvfp4", "wmxfp4a16", "wmxfp4amxfp4", "wmxfp8amxfp8",
)  # fmt: skip
EVIDENCE = {
    "cpu": ("run", "run by the tests, eager and compiled, on x86 with AVX512"),
    "cuda": (
        "interpreted",
        "run by Triton's interpreter against float64, and its code for sm_80, sm_89 and sm_90 read; no kernel has run "
        "on a GPU, and nothing was timed. `reference` is the CPU's, and ran there",
    ),
    "npu": (
        "host",
        "run on torch_npu's own host code and reference numerics, call by call; not on hardware. "
        "`qcompile/backends/npu/README.md` says with which schemes whole models ran there",
    ),
}
"""Of each device, how far its kernels were verified, in a word and in a sentence."""
SOURCE = Path(qcompile.__file__).parent


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """What mkdocs calls for every page."""
    made = {"support.md": support_matrix, "troubleshooting.md": messages}.get(page.file.src_uri)
    return f"{markdown}\n{made()}" if made else markdown


def support_matrix() -> str:
    """A table of scheme × device × evidence × format, and what the words of evidence mean."""
    devices, formats = plugins.names("backends"), [plugins.find("formats", name) for name in plugins.names("formats")]
    lines = _head("scheme", [*devices, "can be written as"])
    for name in SCHEMES:
        stored = [own.name for own in formats if not own.refuses(Scheme.parse(name), (4096, 4096))]
        lines.append(_row(f"`{name}`", [*(_kernels(device, name) for device in devices), ", ".join(stored)]))
    lines += [
        "",
        "Where experts have another kernel, it stands behind the comma. `reference` is exact and slow: it dequantizes "
        "at each call, with operations of PyTorch alone. More formats can be read than written: fp8 of DeepSeek and "
        "transformers, MXFP4 of gpt-oss, and other layouts of AWQ and AutoRound.",
        "",
        "## Evidence",
        "",
    ]
    return "\n".join(
        [*lines, *(f"- **{word}** ({device}): {meaning}." for device, (word, meaning) in EVIDENCE.items())]
    )


def messages() -> str:
    """For each class of errors, where it is raised and what it says; … stands for what is known only then."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path in sorted([*SOURCE.rglob("*.py"), *SOURCE.parent.glob("passes/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = _text(node.exc.args[0])
                if len(re.sub(r"[…\W]", "", text)) > 12:
                    found[getattr(node.exc.func, "id", "")].append((path.stem, text))
    lines = []
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.QcompileError) and found[name]:
            lines += ["", f"## {name}", "", inspect.getdoc(kind) or "", ""]
            lines += [f"- {_escaped(text)} (`{module}`)" for module, text in found[name]]
    return "\n".join(lines)


def _kernels(device: str, scheme: str) -> str:
    """The kernels of a device for linears and experts, and how far they were verified."""
    found = []
    for experts in (0, 8):
        kind = "experts" if experts else "linear"
        site = Site("x", kind, 4096, 4096, torch.bfloat16, kind=kind, experts=experts)
        kernel, _ = kernels.choose(plugins.find("backends", device), site, Scheme.parse(scheme))
        found.append(f"`{kernel.name}`" if kernel else "–")
    if set(found) == {"–"}:
        return "refused"
    evidence = "run on a CPU" if device == "cuda" and set(found) == {"`reference`"} else EVIDENCE[device][0]
    return f"{', '.join(dict.fromkeys(found))} · {evidence}"


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "…"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _head(first: str, others: Any) -> list[str]:
    return [_row(first, others), "|" + "---|" * (1 + len(others))]


def _row(first: str, others: Any) -> str:
    return f"| {' | '.join([first, *others])} |"
