"""A decoder block as a function of its weights, with gradients: for methods that quantize its sites together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activations import dequantize_activation, quantize_activation
from .modules import FloatWeight, QuantExperts
from .moe import run_experts
from .segments import Segment, Segments
from .types import PlannedSite, Scheme


class TunedBlock:
    """The ``parts`` of a block (``methods.Block``) with all that its sites are trained on.

    states: what the first part begins with, one per batch, of the quantized model; floats: of the float model. All
    weights must be float still; ``weights`` are those of the sites that are to be quantized together.
    """

    def __init__(
        self,
        runner: Segments,
        parts: Sequence[Segment],
        states: Sequence[Any],
        floats: Sequence[Any],
        sites: Sequence[PlannedSite],
        weights: Mapping[str, Tensor],
    ) -> None:
        self.runner, self.states, self.batches = runner, states, len(states)
        reads = {site: read for part in parts for site, read in part.reads.items()}
        calls = {node: call for part in parts for node, call in part.calls.items()}
        self.whole = Segment(parts[0].name, reads, tuple(node for part in parts for node in part.nodes), calls)
        self.weights = weights
        self.schemes: dict[str, Scheme] = {}
        self.dtypes = {planned.site.name: planned.site.dtype for planned in sites}
        self._activations = {}
        for planned in sites:
            assert planned.scheme is not None
            self.schemes[planned.site.name] = Scheme(planned.scheme.weight)
            self._activations[planned.site.name] = planned.scheme.activation
        self._targets = []
        for values in floats:
            self._targets.append(_made(values, runner.run(self.whole, values, to_the_end=True)))

    def loss(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Squared error of what the block makes, over the squares of what it should, by ``weights`` of its sites."""

        def compute(module: nn.Module, sites: Sequence[str], inputs: Sequence[Tensor]) -> Tensor:
            if isinstance(module, QuantExperts):
                return self._experts(module, sites, inputs, weights)
            own = weights.get(sites[0])
            if own is None:
                return module(*inputs)
            x = self._seen(sites[0], inputs[0])
            return F.linear(x, own.to(x.dtype), getattr(module, "bias", None))

        before, wanted = self.states[batch], self._targets[batch]
        made = _made(before, self.runner.run(self.whole, before, compute=compute, to_the_end=True))
        errors = [(made[key].float() - target.float()).square().sum() for key, target in wanted.items()]
        total = sum(target.float().square().sum().item() for target in wanted.values())
        return torch.stack(errors).sum() / max(total, 1e-12)

    def _seen(self, site: str, x: Tensor) -> Tensor:
        """What a site reads, after its activations are quantized; gradients pass through the rounding."""
        activation = self._activations.get(site)
        if activation is None:
            return x
        exact = dequantize_activation(quantize_activation(x.detach(), activation, []), activation).to(x.dtype)
        return x + (exact - x.detach())

    def _experts(
        self, module: QuantExperts, sites: Sequence[str], inputs: Sequence[Tensor], weights: Mapping[str, Tensor]
    ) -> Tensor:
        x, ids, routing = (tensor.reshape(-1, tensor.shape[-1]) for tensor in inputs)

        def product(index: int) -> Any:
            part = (module.up, module.down)[index]
            assert isinstance(part, FloatWeight)
            weight = weights.get(sites[index], part.weight)

            def multiply(rows: Sequence[Tensor], ends: Tensor) -> Tensor:
                read = self._seen(sites[index], rows[0])
                own = read.tensor_split(ends[:-1].long().cpu())
                return torch.cat([each @ weight[e].T.to(each.dtype) for e, each in enumerate(own)])

            return multiply

        result = run_experts(
            [x], ids, routing, product(0), module.up.bias, (), product(1), module.down.bias, (), (None, None),
            module.activation, module.up.shape[0], x.dtype,
        )  # fmt: skip
        return result.view(inputs[0].shape)


def _made(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> dict[Any, Tensor]:
    """The float tensors that a block hands on and was not given."""
    return {
        key: value
        for key, value in after.items()
        if key not in before and isinstance(value, Tensor) and value.is_floating_point()
    }
