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
    "cpu": "run by the tests, eager and compiled, on x86 with AVX512",
    "cuda": "see `qcompile/backends/cuda`: what was interpreted on the CPU, and what was run on a GPU",
    "npu": "checked against torch_npu's schemas and reference numerics on a CPU; not run on hardware",
}
SOURCE = Path(qcompile.__file__).parent


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """What mkdocs calls for every page."""
    made = {"support.md": support_matrix, "troubleshooting.md": messages}.get(page.file.src_uri)
    return f"{markdown}\n{made()}" if made else markdown


def support_matrix() -> str:
    """Tables of scheme × device and scheme × format, and the evidence for each device."""
    devices, formats = plugins.names("backends"), plugins.names("formats")
    lines = ["## Kernels", "", *_head("scheme", [f"{d}, {k}" for d in devices for k in ("linear", "experts")])]
    for name in SCHEMES:
        lines.append(_row(f"`{name}`", [_kernel(d, name, n) for d in devices for n in (0, 8)]))
    lines += [
        "",
        "`reference` and `dequantize` are exact and slow: they dequantize at each call.",
        "",
        "## Evidence",
        "",
    ]
    lines += [f"- **{device}**: {EVIDENCE[device]}" for device in devices]
    lines += [
        "",
        "## Formats",
        "",
        "What can be written; the same and more can be read.",
        "",
        *_head("scheme", formats),
    ]
    for name in SCHEMES:
        refusals = [plugins.find("formats", f).refuses(Scheme.parse(name), (4096, 4096)) for f in formats]
        lines.append(_row(f"`{name}`", ["–" if refusal else "yes" for refusal in refusals]))
    return "\n".join(lines)


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


def _kernel(device: str, scheme: str, experts: int) -> str:
    site = Site("x", "experts" if experts else "linear", 4096, 4096, torch.bfloat16,
                kind="experts" if experts else "linear", experts=experts)  # fmt: skip
    kernel, _ = kernels.choose(plugins.find("backends", device), site, Scheme.parse(scheme))
    return f"`{kernel.name}`" if kernel else "–"


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
