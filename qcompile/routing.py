"""How a mixture-of-experts block routes, where its own forward cannot be traced: a loop over a list of experts, or all
tokens through all experts.

The block's forward is replaced by one canonical form, which is found by comparing: a copy of the block runs on a few
tokens with random routers and cheap stand-ins for its experts, and so does every form until one agrees, in float32 and
in the dtype of the model. A block that agrees with none stays what it is and is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import probing

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
_SHAPES = ((2, 5), (1, 1), (3, 8))  # batch and sequence of the probes
_MANY = (4, 50)  # in a small dtype scores are often equal, and only then their precision decides what is chosen
_FORM = "_qcompile_block"  # attribute of a block whose forward is ours


@dataclass(frozen=True)
class BlockForm:
    """The forward of a block, in terms of its children.

    experts     the child that becomes ``experts(x [tokens, hidden], ids [tokens, k], weights [tokens, k])``
    router      the child that scores; flat: it is given [tokens, hidden], else what the block is given
    logits      place of the scores [tokens, experts] in the router's result, or None: it has chosen itself, and
    chosen      is where it puts (ids, weights)
    scores      "none", "softmax" or "sigmoid" of the logits; precise: in float32, else in their dtype
    bias        the tensor [experts] that is added to the scores for choosing only, or ""
    top_k       how many experts are chosen
    weights     "none", "sum", "softmax" or "sigmoid" of the chosen scores; scale: a factor on them
    at_input    they scale what the experts read, not what they give
    shared      children that every token goes through, each with the child whose sigmoid weighs it, or ""
    flattens    its output is [tokens, hidden], whatever the shape of what it is given
    returns     beside the output: places in the router's result, or "weights", "ids"
    """

    experts: str
    router: str
    flat: bool = True
    logits: int | None = None
    chosen: tuple[int, int] = (0, 0)
    scores: str = "none"
    precise: bool = True
    bias: str = ""
    top_k: int = 0
    weights: str = "none"
    scale: float = 1.0
    at_input: bool = False
    shared: tuple[tuple[str, str], ...] = ()
    flattens: bool = False
    returns: tuple[int | str, ...] = ()


def set_form(block: nn.Module, form: BlockForm) -> None:
    """Let ``block`` compute ``form``; its experts must take (hidden states, chosen experts, weights) from now on."""
    vars(block)[_FORM] = form
    vars(block)["forward"] = partial(_forward, block)  # unlike a method it can be pickled


def clear_form(block: nn.Module) -> None:
    """Give ``block`` its own forward back."""
    vars(block).pop(_FORM, None)
    vars(block).pop("forward", None)


def _forward(block: nn.Module, hidden_states: Tensor) -> Any:
    """The forward of a block that has a form: [..., hidden] -> the same, with what else the block returned."""
    return routed(block, vars(block)[_FORM], hidden_states)


def routed(block: nn.Module, form: BlockForm, hidden_states: Tensor) -> Any:
    """What ``block`` computes according to ``form``."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    items = _items(block.get_submodule(form.router)(x if form.flat else hidden_states))
    ids, weights = _choose(block, form, items, x.dtype)
    result = _weighted(block.get_submodule(form.experts), form, x, ids, weights)
    for name, gate in form.shared:
        shared = block.get_submodule(name)(x)
        result = result + (torch.sigmoid(block.get_submodule(gate)(x)) * shared if gate else shared)
    result = result if form.flattens else result.view(hidden_states.shape)
    named: dict[int | str, Any] = {"weights": weights, "ids": ids, **dict(enumerate(items))}
    return (result, *(named[place] for place in form.returns)) if form.returns else result


def _choose(block: nn.Module, form: BlockForm, items: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The chosen experts [tokens, k] and their weights."""
    if form.logits is None:
        ids, weights = (items[place].reshape(-1, items[place].shape[-1]) for place in form.chosen)
        return ids, weights * form.scale if form.scale != 1.0 else weights
    logits = items[form.logits].reshape(-1, items[form.logits].shape[-1])
    scores = _FUNCTIONS[form.scores](logits.float() if form.precise else logits)
    if form.bias:
        ids = torch.topk(scores + _tensor(block, form.bias).reshape(-1), form.top_k, dim=-1).indices
        chosen = scores.gather(-1, ids)
    else:
        chosen, ids = torch.topk(scores, form.top_k, dim=-1)
    weights = _FUNCTIONS[form.weights](chosen)
    return ids, (weights * form.scale if form.scale != 1.0 else weights).to(dtype)


def _weighted(experts: nn.Module, form: BlockForm, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    if not form.at_input:
        return experts(x, ids, weights)
    scaled = (x[:, None] * weights[..., None].to(x.dtype)).flatten(0, 1)  # every chosen expert reads its own
    rows = experts(scaled, ids.reshape(-1, 1), torch.ones_like(scaled[:, :1]))
    return rows.view(*ids.shape, -1).sum(1)


_FUNCTIONS = {
    "none": lambda x: x,
    "softmax": lambda x: F.softmax(x, dim=-1),
    "sigmoid": torch.sigmoid,
    "sum": lambda x: x / x.sum(-1, keepdim=True),
}


def _items(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _tensor(block: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(block.get_submodule(owner), leaf)


# ------------------------------------------------------------------------------------------------------------ finding


class _StandIn(nn.Module):
    """A cheap function of a token that no other stand-in is: ``tanh(x) * own + constant``; counts the rows it sees."""

    def __init__(self, own: Tensor, constant: Tensor) -> None:
        super().__init__()
        self.own, self.constant, self.rows = own, constant, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += x.numel() // x.shape[-1] if x.numel() else 0
        return torch.tanh(x) * self.own.to(x.dtype) + self.constant.to(x.dtype)


class _Routed(nn.Module):
    """Stand-ins as experts that take (hidden states, chosen experts, weights)."""

    def __init__(self, each: list[_StandIn]) -> None:
        super().__init__()
        self.own, self.constant = (torch.stack([getattr(e, name) for e in each]) for name in ("own", "constant"))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = torch.tanh(x)[:, None] * self.own[ids].to(x.dtype) + self.constant[ids].to(x.dtype)
        return (rows.float() * weights.float()[..., None]).sum(1).to(x.dtype)


class _Batched(nn.Module):
    """Stand-ins as experts that take their tokens one expert after another."""

    def __init__(self, each: list[_StandIn]) -> None:
        super().__init__()
        self.each = each

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([e(part) for e, part in zip(self.each, x.chunk(len(self.each)), strict=True)]).view(x.shape)


@dataclass(frozen=True)
class _Probe:
    """One run of a copy of the block: what it was given, what it returned, and how its router was called."""

    block: nn.Module
    dtype: torch.dtype
    x: Tensor
    output: Tensor
    others: tuple[Any, ...]
    flat: bool
    items: tuple[Any, ...]
    chosen: float  # rows of experts per token


def find_form(
    block: nn.Module, experts: str, count: int, hidden: int, dtype: torch.dtype, constant: bool
) -> BlockForm | str:
    """The form that computes what ``block`` does, or why there is none.

    experts: the child that holds ``count`` experts of ``hidden`` features. constant: they give something for zeros.
    """
    scoring = {name: {p.shape for p in child.parameters() if p.dim() > 1} for name, child in block.named_children()}
    children = {name: block.get_submodule(name) for name, shapes in scoring.items() if shapes and name != experts}
    routers = [name for name in children if scoring[name] == {(count, hidden)}]
    if reason := probing.altered(block):
        return f"the block around it cannot be changed: {reason}"
    if len(routers) != 1:
        return f"the block around it has {len(routers)} routers ({', '.join(routers)}) with one row per expert, not one"
    gates = [name for name in children if scoring[name] == {(1, hidden)}]
    shared = [name for name in children if name not in (*routers, *gates)]
    try:
        probes = [
            _run(block, experts, routers[0], shared, count, hidden, kind, shape, constant)
            for kind in dict.fromkeys((torch.float32, dtype))
            for shape in (_SHAPES if kind == torch.float32 else (_MANY,))
        ]
    except Exception as error:  # foreign code: whatever it raises is the reason
        return f"the block around it does not run on a probe: {type(error).__name__}: {str(error).splitlines()[0]}"
    first = probes[0]
    if not isinstance(first.output, Tensor) or first.output.numel() != first.x.numel():
        return "the block around it does not return hidden states of the size that it is given"
    begin = BlockForm(experts, routers[0], first.flat, flattens=first.output.shape != first.x.shape)
    for together in _shared(shared, gates):
        for form in _forms(replace(begin, shared=together), block, first, count):
            scaled = _with_scale(form, probes[0], probing.numbers(block, configs=True))
            if all(_agrees(scaled, probe) for probe in probes):
                returns = _returns(scaled, first)
                return returns if isinstance(returns, str) else replace(scaled, returns=returns)
    return (
        "the forward of the block around it agrees with no known form of routing (softmax or sigmoid before or after "
        "topk, with or without a bias, normalised or not, scaled; a router that chooses itself; shared experts)"
    )


def _run(
    block: nn.Module, experts: str, router: str, shared: list[str], count: int, hidden: int, dtype: torch.dtype,
    shape: tuple[int, int], constant: bool,
) -> _Probe:  # fmt: skip
    generator = torch.Generator().manual_seed(sum(shape))

    def stand_in(offset: bool) -> _StandIn:
        own = probing.random(generator, hidden)
        return _StandIn(own, probing.random(generator, hidden) if offset else torch.zeros(hidden))

    each = [stand_in(constant) for _ in range(count)]
    held = block.get_submodule(experts)
    replaced: dict[nn.Module, nn.Module] = {block.get_submodule(name): stand_in(False) for name in shared}
    replaced[held] = nn.ModuleList(each) if isinstance(held, nn.ModuleList) else _Batched(each)
    fill = probing.filler(generator, torch.float32 if dtype == torch.float32 else None)
    copied = probing.clone(block, fill, replaced)
    calls: list[tuple[int, Any]] = []
    copied.get_submodule(router).register_forward_hook(lambda m, given, result: calls.append((given[0].dim(), result)))
    x = probing.random(generator, *shape, hidden, dtype=dtype) * hidden**0.5
    with torch.no_grad():
        output, *others = _items(copied(x.clone()))
    if len(calls) != 1:
        raise ValueError(f"it calls its router {router} {len(calls)} times")
    rows = sum(e.rows for e in each) / (shape[0] * shape[1])
    copied.add_module(experts, _Routed(each))
    return _Probe(copied, dtype, x, output, tuple(others), calls[0][0] == 2, _items(calls[0][1]), rows)


def _shared(shared: list[str], gates: list[str]) -> Iterator[tuple[tuple[str, str], ...]]:
    """Ways in which the children that are neither experts nor router take part."""
    yield tuple((name, gates[i] if i < len(gates) else "") for i, name in enumerate(shared))
    if gates:
        yield tuple((name, "") for name in shared)


def _forms(form: BlockForm, block: nn.Module, probe: _Probe, count: int) -> Iterator[BlockForm]:
    """Every form that the results of the router allow."""
    tokens = probe.x.shape[0] * probe.x.shape[1]
    tensors = [(i, item) for i, item in enumerate(probe.items) if isinstance(item, Tensor) and item.numel()]
    for (i, ids), (j, weights), early in product(tensors, tensors, (False, True)):
        if not ids.is_floating_point() and weights.is_floating_point() and ids.numel() == weights.numel():
            yield replace(form, chosen=(i, j), at_input=early)
    seen = int(probe.chosen)
    settings = [n for n in probing.numbers(block, configs=True) if type(n) is int and n < count]
    counts = [seen] if seen == probe.chosen and seen < count else [*settings, count]
    biases = ["", *(n for n, t in [*block.named_parameters(), *block.named_buffers()] if t.numel() == count)]
    for i, logits in tensors:
        if not logits.is_floating_point() or logits.numel() != tokens * count:
            continue
        for top_k, early, bias, scores, finish, precise in product(
            counts, (False, True), biases, ("softmax", "sigmoid", "none"), ("sum", "none", "softmax", "sigmoid"),
            (True, False),
        ):  # fmt: skip
            tried = replace(form, logits=i, top_k=top_k, at_input=early, bias=bias)
            yield replace(tried, scores=scores, weights=finish, precise=precise)


def _with_scale(form: BlockForm, probe: _Probe, numbers: tuple[float, ...]) -> BlockForm:
    """``form`` with the factor on its weights, a number that the block or its config has, which fits best."""
    if form.at_input:
        return form
    plain = _items(routed(probe.block, replace(form, shared=()), probe.x))[0]
    others = _items(routed(probe.block, form, probe.x))[0] - plain
    factor = ((probe.output - others) * plain).sum() / plain.square().sum()
    nearest = min((1.0, *numbers), key=lambda number: abs(number - factor.item()))
    return replace(form, scale=nearest)


def _agrees(form: BlockForm, probe: _Probe) -> bool:
    computed = _items(routed(probe.block, form, probe.x))[0]
    hidden = probe.x.shape[-1]
    if computed.shape != probe.output.shape:
        return False
    return probing.deviation(computed.reshape(-1, hidden), probe.output.reshape(-1, hidden)) < _TOLERANCE[probe.dtype]


def _returns(form: BlockForm, probe: _Probe) -> tuple[int | str, ...] | str:
    """Where what the block returns beside its output comes from."""
    items = _items(probe.block.get_submodule(form.router)(probe.x.flatten(0, 1) if form.flat else probe.x))
    ids, weights = _choose(probe.block, form, items, probe.dtype)
    known: dict[int | str, Any] = {**dict(enumerate(items)), "weights": weights, "ids": ids}
    found = []
    for other in probe.others:
        place = next((place for place, value in known.items() if _is_same(value, other)), None)
        if place is None:
            return "the block around it returns something beside hidden states that its router does not"
        found.append(place)
    return tuple(found)


def _is_same(known: Any, other: Any) -> bool:
    if isinstance(known, Tensor) and isinstance(other, Tensor):
        return known.shape == other.shape and known.dtype == other.dtype and torch.allclose(known, other)
    return known is None and other is None
