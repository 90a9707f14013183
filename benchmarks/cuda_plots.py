"""Plots of what the benchmarks of CUDA kernels wrote: how much faster than others, and how near to the memory's speed.

    python benchmarks/cuda_plots.py                         # the newest tables in results/, plots beside them
    python benchmarks/cuda_plots.py --folder FOLDER

A ratio is a peer's time over ours: above 1 we are faster. Bandwidth is that of weights and activations together, as a
share of what reading memory reached in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

FACTS = {"scheme", "rows", "tokens", "chain", "out", "in", "experts", "chosen", "ours", "ours_tb_s"}
"""Of a row; all others are peers."""
COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
MARKERS = "os^Dv<>PX*"
RATIOS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64)


def newest(folder: Path) -> Iterator[tuple[Path, dict]]:
    """The last table of each benchmark."""
    found = {path.stem.rpartition("_")[0]: path for path in sorted(folder.glob("cuda_*.json"))}
    for name, path in found.items():
        content = json.loads(path.read_text())
        if name != "cuda_check" and content.get("rows"):
            yield path, content


def panels(rows: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Rows by figure and panel: of Linears one for each scheme and shape, of experts all schemes in one figure."""
    found: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if "rows" in row:
            found[row["scheme"]][row.get("chain") or f"{row['out']} x {row['in']}"].append(row)
        else:
            found[f"{row['experts']} experts, {row['chosen']} of them for a token"][row["scheme"]].append(row)
    return found


def peers_of(rows: list[dict]) -> list[str]:
    """Whom a table compares with, in the order in which it does."""
    return list(dict.fromkeys(name for row in rows for name in row if name not in FACTS))


def grid(count: int, title: str, facts: dict) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, up to three in a row."""
    across = min(3, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(max(6.4, 4.6 * across), 3.7 * down + 0.9), layout="constrained")
    figure.suptitle(f"{title}\n{facts['gpu']}, torch {facts['torch']}", fontsize=12)
    axes = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def rows_axis(axes: Axes, rows: list[dict], key: str) -> None:
    """Numbers of rows or tokens, each a tick, at the distance of their logarithms."""
    numbers = sorted({row[key] for row in rows})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(numbers))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.tick_params(axis="x", labelsize=8, rotation=45)
    axes.set_xlabel(key)
    axes.grid(alpha=0.25)


def ratios(path: Path, content: dict) -> Iterator[Path]:
    """Figures with a line for each peer."""
    names = peers_of(content["rows"])
    styles = {name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    for title, parts in panels(content["rows"]).items():
        figure, axes = grid(len(parts), f"{title}: time of others / ours (above 1: ours is faster)", content)
        shown: dict[str, object] = {}
        for one, (part, rows) in zip(axes, parts.items(), strict=True):
            key = "rows" if "rows" in rows[0] else "tokens"
            for name in names:
                points = [(row[key], row[name] / row["ours"]) for row in rows if row.get(name) and row.get("ours")]
                if points:
                    color, marker = styles[name]
                    (shown[name],) = one.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=color)
            one.axhline(1, color="black", linewidth=1)
            one.set_yscale("log", base=2)
            one.yaxis.set_major_locator(FixedLocator(RATIOS))
            one.yaxis.set_minor_locator(NullLocator())
            one.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            one.tick_params(axis="y", labelleft=True)
            one.set_title(part, fontsize=10)
            rows_axis(one, rows, key)
        axes[0].set_ylabel("ratio")
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(6, max(1, len(shown))))
        yield save(figure, path, title.partition(",")[0].replace(" ", "_"))


def bandwidth(path: Path, content: dict) -> Iterator[Path]:
    """Share of the memory's speed by number of rows, a line for each shape."""
    ceiling = content.get("ceilings", {}).get("read_tb_s")
    rows = [row for row in content["rows"] if row.get("ours_tb_s")]
    if not ceiling or not rows:
        return
    figure, (axes,) = grid(1, f"bandwidth, of {ceiling:.2f} TB/s that reading reaches", content)
    for i, (shape, own) in enumerate(panels(rows)[rows[0]["scheme"]].items()):
        points = [(row["rows"], 100 * row["ours_tb_s"] / ceiling) for row in own]
        axes.plot(*zip(*points, strict=True), marker=MARKERS[i], markersize=4, color=COLORS[i], label=shape)
    axes.set_ylim(0, 105)
    axes.set_ylabel("% of read bandwidth")
    rows_axis(axes, rows, "rows")
    axes.legend(fontsize=8)
    yield save(figure, path, "bandwidth")


def tokens(path: Path, content: dict) -> Iterator[Path]:
    """Tokens per second of whole models."""
    figure, (axes,) = grid(1, f"decoding, {content['shape']}, batch 1", content)
    rows = content["rows"][::-1]
    bars = axes.barh([row["name"] for row in rows], [row["tokens_per_second"] for row in rows], color=COLORS[0])
    axes.bar_label(
        bars, [f"{row['tokens_per_second']:.0f} ({row['against_bfloat16']:.2f}x)" for row in rows], padding=3
    )
    axes.set_xlabel("tokens per second (times bfloat16)")
    axes.margins(x=0.35)
    yield save(figure, path, "tokens")


def save(figure: Figure, path: Path, what: str) -> Path:
    """Beside the table."""
    image = path.with_name(f"{path.stem}_{what}.png")
    figure.savefig(image, dpi=110)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results")
    chosen, made = parser.parse_args(), 0
    for path, content in newest(chosen.folder):
        decoding = "tokens_per_second" in content["rows"][0]
        for plot in (tokens,) if decoding else (ratios, bandwidth):
            for image in plot(path, content):
                print(image)
                made += 1
    if not made:
        parser.error(f"{chosen.folder} holds no tables of cuda_linear.py, cuda_experts.py or cuda_decode.py")


if __name__ == "__main__":
    main()
