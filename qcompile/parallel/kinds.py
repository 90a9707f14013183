"""One decoder block of each kind: what a large model is traced by, since tracing takes most of a second per block."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..sites import block_name
from ..types import Plan
from .shares import Share


class Kinds:
    """A copy of a model, without copies of its tensors, that has one block of each kind.

    Blocks are of one kind if their modules, tensors, schemes and orders of columns are. ``model`` is the copy, and
    ``plan`` what is planned for it; ``whole`` gives shares of the copy to all blocks.
    """

    def __init__(self, model: nn.Module, plan: Plan, permuted: Iterable[str]) -> None:
        permuted = set(permuted)
        self.model = copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})
        planned: dict[str, list[tuple]] = {}
        for own in plan:
            suffix = own.site.name.removeprefix(block_name(own.site.name))
            described = (suffix, own.site.shape, str(own.scheme), own.site.name in permuted)
            planned.setdefault(block_name(own.site.name), []).append(described)
        self.first: dict[str, str] = {}  # of every block, the one of the copy that stands for it
        new: dict[str, str] = {}  # of the blocks that the copy keeps, their names in it
        for name, blocks in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]:
            if not len(blocks) or block_name(f"{name}.0") != f"{name}.0":
                continue
            kinds: dict[tuple, int] = {}
            kept: list[int] = []
            for index, block in enumerate(blocks):
                tensors = tuple((n, t.shape, t.dtype) for n, t in [*block.named_parameters(), *block.named_buffers()])
                kind = (type(block), tensors, tuple(planned.get(f"{name}.{index}", ())))
                if kind not in kinds:
                    new[f"{name}.{index}"] = f"{name}.{len(kept)}"
                    kinds[kind] = len(kept)
                    kept.append(index)
                self.first[f"{name}.{index}"] = f"{name}.{kinds[kind]}"
            owner, _, leaf = name.rpartition(".")
            held: Any = self.model.get_submodule(name)
            self.model.get_submodule(owner).add_module(leaf, nn.ModuleList(held[index] for index in kept))
        sites = [
            dataclasses.replace(own, site=dataclasses.replace(own.site, name=_moved(own.site.name, new)))
            for own in plan
            if not block_name(own.site.name) or block_name(own.site.name) in new
        ]
        self.plan = dataclasses.replace(plan, sites=tuple(sites))
        self.permuted = {_moved(name, new) for name in permuted if block_name(name) in new}

    def whole(self, names: Iterable[str], shares: Mapping[str, Share]) -> dict[str, Share]:
        """The shares of tensors or sites called ``names`` of the whole model, from those of the copy."""
        found = ((name, shares.get(_moved(name, self.first))) for name in names)
        return {name: share for name, share in found if share is not None}


def _moved(name: str, blocks: Mapping[str, str]) -> str:
    """A name in another block."""
    block = block_name(name)
    return blocks[block] + name.removeprefix(block) if block in blocks else name
