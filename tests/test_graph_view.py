"""Pictures of graphs: laid out in layers, every node once, rewritten ones marked, and valid XML."""

import itertools
import xml.etree.ElementTree as ET

import pytest
import torch
from helpers import quantize_linears, tiny_model

from qcompile.graph_view import Box, before_and_after, to_svg, to_text

SVG = "{http://www.w3.org/2000/svg}"


def rectangles(svg: str) -> list[tuple[float, float]]:
    return [(float(r.get("x")), float(r.get("y"))) for r in ET.fromstring(svg).iter(f"{SVG}rect")]


class TestLayout:
    def test_layers_are_longest_paths_and_boxes_do_not_overlap(self):
        chain = [Box("a", "mul", "", "", ()), Box("b", "add", "", "", ("a",)), Box("c", "add", "", "", ("a", "b"))]
        wide = [Box(f"w{i}", "mm", "", "new", ("c",)) for i in range(4)]
        places = rectangles(to_svg([*chain, *wide], [], "t"))
        assert [y for _, y in places[:3]] == sorted(y for _, y in places[:3])
        assert len({y for _, y in places[3:]}) == 1
        lefts = sorted(x for x, _ in places[3:])
        assert min(b - a for a, b in itertools.pairwise(lefts)) > 168

    def test_names_are_escaped(self):
        svg = to_svg([Box("a", "<&>", '"', "old", ())], [], "a < b")
        assert len(rectangles(svg)) == 1

    def test_nothing_after(self):
        assert to_text([Box("a", "mul", "f32 [2]", "old", ())], []).splitlines()[1].split() == [
            "-",
            "mul",
            "f32",
            "[2]",
            "a",
        ]


@pytest.fixture(scope="module")
def model():
    return quantize_linears(tiny_model(num_hidden_layers=2), "w8a8")


def test_shared_quantization_is_marked(model, fresh_dynamo):
    before, after = before_and_after(model, (torch.arange(3, 11)[None],), 1)
    counts = [sum("quantize" in box.operation for box in boxes) for boxes in (before, after)]
    assert counts == [7, 4]  # q, k and v read the same, and so do gate and up
    assert {box.mark for box in before} == {"", "old"}
    assert {box.mark for box in after} == {"", "new"}
    svg = to_svg(before, after, "block 1")
    assert len(rectangles(svg)) == len(before) + len(after)


def test_one_pass(model, fresh_dynamo):
    before, after = before_and_after(model, (torch.arange(3, 11)[None],), 0, "lower")
    assert any(box.operation.startswith("qcompile.") and box.mark == "old" for box in before)
    assert not any(box.operation.startswith("qcompile.") for box in after)
