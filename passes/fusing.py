"""The rule of the fusing passes: join what makes an activation with the quantization of it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..ops import activation_of
from .base import Edit, described, semantic_name


@dataclass
class _Match:
    producer: Node
    value: Node  # what is quantized: the producer, or the first of its results
    quantize: Node


class FuseQuantize:
    """``quantize`` of what one of the ops in ``fused`` makes; the fused form takes the producer's place.

    fused: the overload of the fused form by the producer's name. Its results are those of the quantization, then what
    else the producer makes, then, where somebody reads it, the float value itself.
    """

    def __init__(self, fused: Mapping[str, torch._ops.OpOverload]) -> None:
        self.fused = fused

    def pattern(self, node: Node) -> _Match | None:
        """``node`` quantizes the first result of a producer, or a float result of one that is fused already."""
        value = node.args[0] if semantic_name(node) == "quantize" else None
        if not isinstance(value, Node):
            return None
        is_part = value.target is operator.getitem
        producer: Node = value.args[0] if is_part else value  # type: ignore[assignment]
        first = semantic_name(producer) in self.fused and (not is_part or value.args[1] == 0)
        return _Match(producer, value, node) if first or producer.target in self.fused.values() else None

    def check(self, match: _Match) -> str:
        """Why they stay apart, "" when they can be joined."""
        if match.producer.target in self.fused.values():
            return f"{described(match.producer)} is joined with another quantization"
        params: list[Node] = match.quantize.args[1]  # type: ignore[assignment]
        late = next((param for param in params if param.op == "call_function" and param > match.producer), None)
        return f"{late.name}, which it needs, is made after {match.producer.name}" if late is not None else ""

    def rewrite(self, match: _Match, edit: Edit) -> None:
        """One call where the producer is, and a getitem for each result that somebody reads."""
        producer, value, quantize = match.producer, match.value, match.quantize
        _, params, activation = quantize.args
        for param in params:  # type: ignore[union-attr]
            if param.op == "get_attr" and param > producer:  # type: ignore[union-attr, operator]
                producer.prepend(param)  # type: ignore[arg-type]
        keep = len(value.users) > 1
        fused = edit.call(producer, self.fused[semantic_name(producer)], (*producer.args, params, activation, keep))
        parts = activation_of(str(activation)).parts
        index = {user: user.args[1] for user in quantize.users}
        if value is not producer:
            index |= {user: parts + user.args[1] - 1 for user in producer.users if user is not value}  # type: ignore
        if keep:
            index[value] = len(fused.meta["val"]) - 1
        results = {old: edit.call(producer, operator.getitem, (fused, i), like=old) for old, i in index.items()}
        for old, new in results.items():
            edit.replace(old, new)
