"""Let 4-bit activations be words of eight between their quantization and the products that read such words.

Without this pass a device that quantizes to words would unpack them, and its matrix product pack them again.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from .. import fused_ops  # noqa: F401  (registers quantize_words)
from ..ops import FLOAT, activation_of, find_kernel
from .base import Edit, Result, apply_rules, described, semantic_name
from .matching import RESHAPES, op, shape_of, value

_KERNEL = {"scaled_linear": 4, "quant_experts": 10}  # where these ops name the kernel that reads their activations


@dataclass
class PackActivations:
    """``quantize`` to 4 bits, all of whose readers take words."""

    name: str = "pack_activations"
    level: str = "aot"
    numerics: str = "exact"
    expected: int | None = None

    def __call__(self, module: GraphModule) -> Result:
        """Rewrite ``module.graph``; ``matches`` counts quantizations."""
        return apply_rules([IntoWords()], module, self.name)


class IntoWords:
    """``quantize`` becomes ``quantize_words``."""

    def pattern(self, node: Node) -> Node | None:
        """``node`` quantizes to 4 bits, and some kernel would read words."""
        if semantic_name(node) != "quantize":
            return None
        kind = activation_of(str(node.args[2]))
        if kind.number != "int" or kind.bits != 4 or kind.parts != 2:
            return None
        return node if any(_takes_words(reader) for reader in _readers(node)) else None

    def check(self, node: Node) -> str:
        """Why the codes must stay apart, "" when they can be packed."""
        columns = value(node.args[0]).shape[-1]  # type: ignore[arg-type]
        if columns % 8:
            return f"{columns} codes are no whole words of eight"
        other = next((reader for reader in _readers(node) if not _takes_words(reader)), None)
        return f"{described(other)} reads single codes" if other is not None else ""

    def rewrite(self, node: Node, edit: Edit) -> None:
        """Words in place of codes, which have another shape and dtype; scales stay."""
        parts = edit.call(node, torch.ops.qcompile.quantize_words.default, node.args)
        for user in list(node.users):
            part = edit.call(user, operator.getitem, (parts, user.args[1]))
            if user.args[1] == 0:
                _replace_codes(user, part, edit)
            else:
                edit.replace(user, part)


def _replace_codes(codes: Node, words: Node, edit: Edit) -> None:
    """Let ``words`` stand for ``codes``, and words in other rows for codes in other rows."""
    for reader in [reader for reader in codes.users if _keeps_columns(reader)]:
        sizes = [*reader.args[1][:-1], value(words).shape[-1]]  # type: ignore[index, misc]
        _replace_codes(reader, edit.call(reader, reader.target, (words, sizes)), edit)  # type: ignore[arg-type]
    codes.replace_all_uses_with(words)
    codes.graph.erase_node(codes)


def _readers(quantize: Node) -> list[Node]:
    """What reads the codes that ``quantize`` makes, as they are or in other rows."""
    readers, pending = [], [user for user in quantize.users if user.args[1] == 0]
    for codes in pending:
        pending += [reader for reader in codes.users if _keeps_columns(reader)]
        readers += [reader for reader in codes.users if not _keeps_columns(reader)]
    return readers


def _keeps_columns(node: Node) -> bool:
    """Whether ``node`` is a view of its input that has the same columns."""
    return op(node) in RESHAPES and shape_of(node)[-1:] == shape_of(node.args[0])[-1:]  # type: ignore[arg-type]


def _takes_words(reader: Node) -> bool:
    position = _KERNEL.get(semantic_name(reader))
    if position is None:
        return False
    first = str(reader.args[position]).partition("|")[0]
    return first != FLOAT and find_kernel(first).takes_words
