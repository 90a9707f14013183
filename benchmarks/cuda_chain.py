"""The four products of a decoder layer, one after the other, as decoding has them: what launches cost shows here.

    python benchmarks/cuda_chain.py --peers peers             # Qwen3-8B, int4 weights, 1 and 16 rows
    python benchmarks/cuda_chain.py --device cpu              # a dry run without a GPU

Microseconds of a layer, otherwise as in ``cuda_linear.py``. Launches of ours overlap (programmatic dependent launch)
where a GPU can; "ours apart" is without.
"""

from __future__ import annotations

from functools import partial

import torch
from cuda_common import Clock, Table, arguments, build, ceilings, copies, launches_apart, measured
from cuda_linear import SHAPES, Ours, random_weight
from cuda_peers import INT4

from qcompile import numerics


def main() -> None:
    chosen = arguments(__doc__.splitlines()[0])
    clock, dry = Clock(chosen.device, chosen.seconds), chosen.device == "cpu"
    table = Table("cuda_chain", chosen, {"ceilings": ceilings(clock)})
    shapes, numbers = (((128, 256), (256, 128)), (1,)) if dry else (SHAPES[:4], (1, 16))
    layers = 2 if dry else copies(sum(out * inn / 2 for out, inn in shapes))
    weights = [[random_weight("w4a16_g128", *shape, chosen.device) for _ in range(layers)] for shape in shapes]
    floats = [[numerics.dequantize_packed(w) for w in own] for own in weights]
    rows = [{"scheme": "w4a16_g128", "chain": f"{len(shapes)} products of a layer", "rows": n} for n in numbers]
    inputs = [[torch.randn(n, inn, device=chosen.device).bfloat16() for _, inn in shapes] for n in numbers]

    def measure(name: str, products: list[list]) -> None:
        """A column of the table. products: of each shape, one for each layer."""
        for row, xs in zip(rows, inputs, strict=True):
            expected = [x.double() @ own[0].double().t() for x, own in zip(xs, floats, strict=True)]
            order = zip(*products, strict=True)
            calls = [partial(product, x) for layer in order for product, x in zip(layer, xs, strict=True)]
            each = measured(f"{name}, {row['rows']} rows", calls, expected if calls else [], clock)
            row[name] = None if each is None else each * len(shapes)

    ours = [Ours(own).products() for own in weights]
    measure("ours", ours)
    with launches_apart(chosen.device):
        measure("ours apart", ours)
    rows = [table.add(**row) for row in rows]
    for name, make in INT4.items():
        given = [
            [(numerics.unpack_codes(w.codes, 4, w.shape[1]), w.scales, f) for w, f in zip(own, of, strict=True)]
            for own, of in zip(weights, floats, strict=True)
        ]
        measure(name, [build(name, make, own) for own in given])
        for row in rows:
            table.extend(row)
        if clock.is_over:
            return


if __name__ == "__main__":
    main()
