"""Mixtures of experts: where the experts of a model are, how their weights lie, and what they compute.

Nothing is decided by the name of a class or of a model. Weights are recognised by their shapes, and what is done with
them (gate first or interleaved, which activation with which settings, where the routing weights enter) by running a
small copy of the module on random weights and comparing. Experts that compute something else are an error.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations, product

import torch
from torch import Tensor, nn

from . import gates, probing
from .errors import UnsupportedError
from .moe import gate_first
from .routing import BlockForm, find_form

_TOLERANCE = 1e-5  # of a comparison in float32; erf and tanh, the nearest two activations, differ by ten times that
_ALPHAS = (1.0, 1.702)  # and whatever the module has as a number


@dataclass(frozen=True)
class Arithmetic:
    """What one expert computes with its weights: ``down(activation(up(x)))``.

    weights      names of its weights: (up, down), where up makes gate and up together, or (gate, up, down)
    biases       names of their biases, or ()
    activation   a name of ``gates``
    transposed   weights are [in, out]; interleaved: up makes gate 0, up 0, gate 1 ...
    """

    weights: tuple[str, ...]
    biases: tuple[str, ...]
    hidden: int
    intermediate: int
    activation: str = ""
    transposed: bool = False
    interleaved: bool = False

    @property
    def rows(self) -> int:
        """Output features of the first product."""
        return gates.up_rows(self.activation, self.intermediate)


@dataclass(frozen=True)
class ExpertsLayout:
    """The experts of one layer.

    name      the module that holds their weights, in whose place quantized experts come
    experts   how many there are; listed: they are modules of their own, with Linears, in a ModuleList
    block     how the module around them routes, when they do not take (hidden states, chosen experts, weights)
    """

    name: str
    experts: int
    arithmetic: Arithmetic
    dtype: torch.dtype
    listed: bool = False
    block: BlockForm | None = None

    @property
    def projections(self) -> tuple[str, str]:
        """Names of the two parameters of fused experts, which name the sites."""
        if not self.listed:
            return self.arithmetic.weights[0], self.arithmetic.weights[1]
        return ("gate_up_proj" if gates.parse(self.arithmetic.activation).is_gated else "up_proj"), "down_proj"

    @property
    def fused(self) -> Arithmetic:
        """The arithmetic over two fused weights: its own, or canonical where a list takes that form."""
        if not self.listed:
            return self.arithmetic
        biases = tuple(f"{name}_bias" for name in self.projections) if self.arithmetic.biases else ()
        return dataclasses.replace(self.arithmetic, weights=self.projections, biases=biases, interleaved=False)

    @property
    def parent(self) -> str:
        """The module around the experts."""
        return self.name.rpartition(".")[0]


def find_experts(model: nn.Module) -> tuple[ExpertsLayout, ...]:
    """The experts of every layer of ``model``, in the order of its modules.

    UnsupportedError for a mixture of experts whose computation is not known, naming the module and the reason.
    """
    known: dict[tuple, ExpertsLayout | str] = {}
    found = []
    for name, module in model.named_modules():
        if not _may_be_experts(module):
            continue
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        is_routed = _is_routed(parent, module)
        if isinstance(module, nn.ModuleList) and not is_routed:
            continue
        key = (leaf, probing.signature(parent))
        if key not in known:
            known[key] = _recognise(parent, module, leaf)
        result = known[key]
        if isinstance(result, ExpertsLayout):
            found.append(dataclasses.replace(result, name=name))
        elif is_routed:
            raise UnsupportedError(
                f"{name or 'the model'} ({type(module).__name__}) is a mixture of experts that cannot be quantized: "
                f"{result}. To quantize this model, let its experts compute down(activation(gate(x)) * up(x)): in "
                "parameters gate_up_proj [experts, 2 * intermediate, hidden] and down_proj with forward(hidden_states, "
                "top_k_index, top_k_weights), as in transformers, or in a ModuleList"
            )
    return tuple(found)


def _may_be_experts(module: nn.Module) -> bool:
    """Two or more weights with a common first dimension, or a list of modules that are made of a few Linears."""
    if isinstance(module, nn.ModuleList):
        return len(module) > 0 and all(child is not None and _linears(child) for child in module)
    return len(_weights(module, 3)) > 1


def _is_routed(parent: nn.Module, module: nn.Module) -> bool:
    """Whether anything beside ``module`` has one row per expert: a router."""
    count = len(module) if isinstance(module, nn.ModuleList) else next(iter(_weights(module, 3).values())).shape[0]
    inside = {id(parameter) for parameter in module.parameters()}
    return any(p.dim() == 2 and p.shape[0] == count for p in parent.parameters() if id(p) not in inside)


def _recognise(parent: nn.Module, module: nn.Module, leaf: str) -> ExpertsLayout | str:
    """The layout of the experts ``module``, called ``leaf`` in ``parent``; or why they cannot be used."""
    if isinstance(module, nn.ModuleList):
        arithmetic = _of_list(module)
        count, dtype = len(module), next(module.parameters()).dtype
    else:
        weights = _weights(module, 3)
        first = next(iter(weights.values()))
        count, dtype = first.shape[0], first.dtype
        arithmetic = _of_fused(module)
    if isinstance(arithmetic, str):
        return arithmetic
    block, listed = None, isinstance(module, nn.ModuleList)
    if listed or len(_required(module)) == 1:
        form = find_form(parent, leaf, count, arithmetic.hidden, dtype, bool(arithmetic.biases))
        if isinstance(form, str):
            return form
        block = form
    return ExpertsLayout(leaf, count, arithmetic, dtype, listed, block)


def _weights(module: nn.Module, dim: int) -> dict[str, Tensor]:
    """Float parameters of ``module`` itself with ``dim`` dimensions; a convolution's are none of ours."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return {}
    named = module._parameters.items()
    return {name: p for name, p in named if p is not None and p.dim() == dim and p.is_floating_point()}


def _linears(expert: nn.Module) -> dict[str, nn.Linear]:
    """The Linears of a module that has two or three of them and no other parameters; else none."""
    found = {name: inner for name, inner in expert.named_modules() if isinstance(inner, nn.Linear) and name}
    owned = sum(len(linear._parameters) - (linear.bias is None) for linear in found.values())
    return found if len(found) in (2, 3) and owned == len(list(expert.parameters())) else {}


def _required(module: nn.Module) -> list[str]:
    """Names of the positional parameters of ``module.forward``, without self."""
    parameters = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in positional]


# -------------------------------------------------------------------------------------------------- fused parameters


def _of_fused(module: nn.Module) -> Arithmetic | str:
    """What experts with 3-D parameters compute; they are told apart by running a small copy."""
    if reason := probing.altered(module):
        return reason
    weights, biases = _weights(module, 3), _weights(module, 2)
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    if len(weights) != 2 or len({weight.shape[0] for weight in weights.values()}) != 1:
        return f"its weights {shapes} are not an up and a down projection of equally many experts"
    count = next(iter(weights.values())).shape[0]
    of_one = ({name: tensor.shape[1:] for name, tensor in named.items()} for named in (weights, biases))
    candidates = list(_arrangements(*of_one))
    if not candidates:
        return f"the shapes of its weights {shapes} do not fit each other as up and down projection"
    reasons = [_try(module, count, candidate) for candidate in candidates]
    return next((result for result in reasons if isinstance(result, Arithmetic)), reasons[0])


def _arrangements(weights: Mapping[str, torch.Size], biases: Mapping[str, torch.Size]) -> Iterator[Arithmetic]:
    """Ways in which weights of these shapes can be (up, down) or (gate, up, down); activations are not known yet."""
    for names, transposed in product(permutations(weights), (False, True)):
        (*ups, (hidden, intermediate)) = [weights[n][::-1] if transposed else weights[n] for n in names]
        gated = len(ups) == 2 or ups[0][0] == 2 * intermediate
        rows = intermediate if len(ups) == 2 or not gated else 2 * intermediate
        if any(up != (rows, hidden) for up in map(tuple, ups)):
            continue
        wanted = [rows] * len(ups) + [hidden]
        for order in permutations(biases) if len(biases) == len(names) else [()] * (not biases):
            if [biases[b][0] for b in order] == wanted[: len(order)]:
                yield Arithmetic(names, order, hidden, intermediate, "silu" if gated else "silu:ungated", transposed)


def _try(module: nn.Module, count: int, form: Arithmetic) -> Arithmetic | str:
    """Run a small copy of fused experts and find the arithmetic, of the arrangement ``form``, that gives its result."""
    small, sizes = _small(form, count)
    generator = torch.Generator().manual_seed(0)
    copied = probing.clone(module, probing.filler(generator, torch.float32, sizes), sizes=sizes)
    experts = copied._parameters[form.weights[0]].shape[0]  # type: ignore[union-attr]
    batched = len(_required(module)) == 1
    x, ids, routing = _probe(generator, experts, small.hidden, batched)
    given = (x,) if batched else (x, ids, routing)
    try:
        with torch.no_grad():
            result = inspect.unwrap(type(module).forward)(copied, *given)
    except Exception as error:  # foreign code: whatever it raises is the reason
        return f"its forward({', '.join(_required(module))}) does not run on {_shapes(given)}: {_first_line(error)}"
    tensors = copied._parameters
    weights = [tensors[name] for name in form.weights]
    biases = [tensors[name] for name in form.biases] or [None, None]
    hidden = _product(x, weights[0], biases[0], ids, form.transposed)  # type: ignore[arg-type]

    def computed(activation: str, interleaved: bool) -> Tensor:
        inner = gates.gated(gate_first(hidden) if interleaved else hidden, activation)
        rows = _product(inner, weights[1], biases[1], ids, form.transposed)  # type: ignore[arg-type]
        return (rows * routing[..., None]).sum(1)

    return _named(form, probing.numbers(module), result, computed)


def _small(form: Arithmetic, count: int) -> tuple[Arithmetic, dict[int, int]]:
    """The same arrangement with a few features and experts; sizes that were equal stay equal."""
    rows = form.rows
    sizes = {form.intermediate: 8}  # multiples of 8, as some products want aligned rows
    sizes.setdefault(rows, 16)
    sizes.setdefault(form.hidden, 24)
    sizes.setdefault(count, 5)
    return dataclasses.replace(form, hidden=sizes[form.hidden], intermediate=8), sizes


def _probe(generator: torch.Generator, experts: int, hidden: int, batched: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of very different sizes, so that every clamp is met; batched: three for each expert, in their order."""
    tokens = 3 * experts if batched else 12
    x = probing.random(generator, tokens, hidden) * torch.logspace(0, 3.5, tokens)[:, None]
    if batched:
        return x, torch.arange(experts).repeat_interleave(3)[:, None], torch.ones(tokens, 1)
    k = min(3, experts)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])
    return x, ids, torch.rand((tokens, k), generator=generator) + 0.1


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, transposed: bool) -> Tensor:
    """x [tokens, in] or [tokens, k, in] times the weights that ``ids`` [tokens, k] chose: [tokens, k, out]."""
    chosen = weight[ids].transpose(-1, -2) if transposed else weight[ids]
    rows = (chosen @ (x[:, None, :, None] if x.dim() == 2 else x[..., None])).squeeze(-1)
    return rows if bias is None else rows + bias[ids]


def _named(form: Arithmetic, values: tuple[float, ...], result: Tensor, computed) -> Arithmetic | str:
    """``form`` with the activation and the order of gate and up that give ``result``, or why there are none."""
    if not isinstance(result, Tensor):
        return f"its forward returns a {type(result).__name__}, not a tensor"
    nearest, best = "", float("inf")
    orders = (False, True) if len(form.weights) == 2 and gates.parse(form.activation).is_gated else (False,)
    for activation, interleaved in product(_activations(form, values), orders):
        difference = probing.deviation(result, computed(activation, interleaved))
        if difference < _TOLERANCE:
            return dataclasses.replace(form, activation=activation, interleaved=interleaved)
        nearest, best = (activation, difference) if difference < best else (nearest, best)
    return (
        f"what it computes is not down(activation(up(x))), weighted by the routing, with an activation of "
        f"{', '.join(gates.FUNCTIONS)} (nearest: {nearest}, which deviates by {best:.1e})"
    )


def _activations(form: Arithmetic, values: tuple[float, ...]) -> Iterator[str]:
    """Names of all activations that could be meant, the simplest first; settings are numbers that the module has."""
    if not gates.parse(form.activation).is_gated:
        yield from (f"{function}:ungated" for function in gates.FUNCTIONS)
        return
    yield from gates.FUNCTIONS
    plain = [(function, 1.0) for function in gates.FUNCTIONS]
    scaled = [("silu", float(alpha)) for alpha in dict.fromkeys([*_ALPHAS[1:], *values])]
    limits = [None, *(float(value) for value in values)]
    for (function, alpha), limit, shift in product(plain + scaled, limits, (0.0, 1.0)):
        yield str(gates.Gate(function, True, alpha, limit, shift))


def _shapes(given: tuple[Tensor, ...]) -> str:
    return ", ".join(str(list(tensor.shape)) for tensor in given)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# ---------------------------------------------------------------------------------------------------- lists of experts


def _of_list(experts: nn.ModuleList) -> Arithmetic | str:
    """What every expert of a list computes; one is tried, the others must be like it."""
    first = experts[0]
    like = probing.signature(first)
    for index, expert in enumerate(experts):
        if probing.signature(expert) != like:
            mine, other = ([list(linear.weight.shape) for linear in _linears(e).values()] for e in (first, expert))
            what = f"have weights {mine} and {other}" if mine != other else "differ in their settings"
            return f"its experts 0 and {index} {what}; the experts of a layer must be alike"
    linears = _linears(first)
    for expert in experts:
        for inner in [expert, *_linears(expert).values()]:
            if reason := probing.altered(inner):
                return f"an expert cannot be replaced: {reason}"
    if odd := next((type(linear).__name__ for linear in linears.values() if type(linear) is not nn.Linear), ""):
        return f"its experts have a {odd}, whose forward may do more than x @ W.T + b"
    biased = {name: linear.bias.shape for name, linear in linears.items() if linear.bias is not None}
    shapes = {name: linear.weight.shape for name, linear in linears.items()}
    candidates = [c for c in _arrangements(shapes, biased) if not c.transposed and c.biases in ((), c.weights)]
    if not candidates:
        described = {name: list(shape) for name, shape in shapes.items()}
        return f"the Linears of an expert, {described} with biases {list(biased)}, are no gate, up and down projection"
    reasons = [_try_one(first, candidate) for candidate in candidates]
    return next((result for result in reasons if isinstance(result, Arithmetic)), reasons[0])


def _try_one(expert: nn.Module, form: Arithmetic) -> Arithmetic | str:
    """Run a small copy of one expert of a list and find its arithmetic."""
    small, sizes = _small(form, 0)
    generator = torch.Generator().manual_seed(0)
    copied = probing.clone(expert, probing.filler(generator, torch.float32, sizes), sizes=sizes)
    x, _, _ = _probe(generator, 4, small.hidden, True)
    try:
        with torch.no_grad():
            result = copied(x)
    except Exception as error:  # foreign code: whatever it raises is the reason
        return f"an expert does not run on {list(x.shape)}: {_first_line(error)}"
    *ups, down = [copied.get_submodule(name) for name in form.weights]
    with torch.no_grad():
        hidden = torch.cat([up(x) for up in ups], -1)

    def computed(activation: str, interleaved: bool) -> Tensor:
        with torch.no_grad():
            return down(gates.gated(gate_first(hidden) if interleaved else hidden, activation))

    return _named(form, probing.numbers(expert), result, computed)
