"""Reports stay readable for 94 layers, keep every fact for scripts, and render as one offline page."""

import dataclasses
import html.parser
import json
import math
import re
import sys
from types import SimpleNamespace

import torch

from qcompile import pictures, reporting, tables
from qcompile.modules import set_state
from qcompile.types import (
    FrontierPoint,
    GraphRecord,
    Moment,
    PassRecord,
    Plan,
    PlannedSite,
    Report,
    Scheme,
    Sensitivity,
    Site,
    SiteResult,
    State,
)
from qcompile.webpage import html_page

SITES = {"self_attn.q_proj": (64, 32), "self_attn.k_proj": (32, 32), "mlp.down_proj": (32, 96)}


def planned(name: str, scheme: str | None = "w4a16_g128", shape: tuple[int, int] = (64, 32), **more) -> PlannedSite:
    site = Site(name, "linear", *shape, torch.bfloat16)
    if scheme is None:
        return PlannedSite(site, None, **{"reason": "a rule says float", "bytes_after": site.float_bytes, **more})
    return PlannedSite(site, Scheme.parse(scheme), "", "rtn", kernel="int4pack", bytes_after=site.float_bytes // 4)


def model_report(layers: int) -> Report:
    sites = [planned(f"model.layers.{i}.{s}", shape=shape) for i in range(layers) for s, shape in SITES.items()]
    sites.append(planned("lm_head", None, (512, 32)))
    plan = Plan("cpu", tuple(sites), other_bytes=1000, notes=("a note",))
    results = tuple(
        SiteResult(p, p.bytes_after, None if p.scheme is None else 20.0 + (i // 3 % 3) / 10)
        for i, p in enumerate(sites)
    )
    near_misses = (("linear_3", "the bias is not a constant"), ("linear_4", "the bias is not a constant"))
    passes = (PassRecord("lower", "exact", 3, 10, 40, near_misses),)
    graph = GraphRecord("input_ids [1, s0]", 42, passes, regions=layers, compiled_regions=1, seconds=8.25)
    return Report("TestForCausalLM", plan, results, 1.5, (PassRecord("quantize_linear", "lossy", 3, 5, 5),), (graph,))


def budget_report(layers: int) -> Report:
    """As after a budget of 4 bits: the frontier, and what each site costs at 2, 4 and 8 bits."""
    report = model_report(layers)
    frontier = tuple(FrontierPoint(1000 * (i + 2), 2 + i / 4, 10 ** (-i / 8), chosen=i == 8) for i in range(25))
    sensitivity = tuple(
        Sensitivity(r.planned.site.name, tuple((f"w{b}a16_g128", 2.0 ** -(i % 5) / b**2) for b in (2, 4, 8)))
        for i, r in enumerate(report.sites[:-1])
    )
    return dataclasses.replace(report, frontier=frontier, sensitivity=sensitivity)


def test_experts_show_how_many_they_are():
    site = Site("layers.0.experts.down_proj", "experts", 64, 32, torch.bfloat16, kind="experts", experts=8)
    planned = PlannedSite(site, Scheme.parse("w4a8_clip"), "", "rtn", kernel="cpu.native")
    assert " [8, 64, 32] " in reporting.plan_text(Plan("cpu", (planned,)))
    assert reporting.plan_dict(Plan("cpu", (planned,)))["sites"][0]["shape"] == [8, 64, 32]


class TestText:
    def test_94_layers_fit_on_a_screen(self):
        text = reporting.report_text(model_report(94))
        assert len(text.splitlines()) < 30
        assert re.search(
            r"model\.layers\.\{0\.\.93\}\.self_attn\.q_proj +94  \[64, 32\]  w4a16_g128  rtn +int4pack +"
            r"385\.0 kB  → +96\.3 kB +20\.0\.\.20\.2 dB",
            text,
        )
        assert "282 of 283 sites quantized" in text
        assert "a rule says float" in text

    def test_passes_and_graphs(self):
        text = reporting.report_text(model_report(2))
        assert "quantize_linear: 3 matches, 5 → 5 nodes, lossy" in text
        assert "input_ids [1, s0]: 42 nodes, 2 regions (1 compiled, 1 reused), 8.2 s" in text
        assert "not matched 2×: the bias is not a constant (at linear_3)" in text
        assert "a note" in text

    def test_columns_align(self):
        lines = reporting.report_text(model_report(3)).splitlines()
        start = lines.index(next(line for line in lines if line.startswith("quantized ")))
        assert len({line.index("[") for line in lines[start + 1 : start + 4]}) == 1
        assert lines[start].index("shape") == lines[start + 1].index("[")

    def test_plan_has_no_error_column(self):
        text = reporting.plan_text(model_report(2).plan)
        assert "plan for cpu" in text
        assert "dB" not in text
        assert "error" not in text

    def test_plain_module_and_nothing_quantized(self):
        plan = Plan("cpu", (planned("0", None), planned("2", None)))
        assert "{0,2}" in reporting.plan_text(plan)
        assert "0 of 2 sites quantized" in reporting.plan_text(plan)
        assert reporting.plan_text(Plan("cpu", ())).endswith("0 of 0 sites quantized, 0 B → 0 B")

    def test_kernel_reasons_are_told_once(self):
        sites = [dataclasses.replace(planned(f"l.{i}.a"), reason="default; int4pack: too small") for i in range(3)]
        text = reporting.plan_text(Plan("cpu", tuple(sites)))
        assert text.count("too small") == 1
        assert "why: default; int4pack: too small" in text
        sites.append(dataclasses.replace(planned("l.0.b"), reason="rule 'b'"))
        text = reporting.plan_text(Plan("cpu", tuple(sites)))
        assert "[1] default; int4pack: too small" in text
        assert "[2] rule 'b'" in text
        report = Report("M", Plan("cpu", tuple(sites)), tuple(SiteResult(p, p.bytes_after) for p in sites))
        assert "[2] rule &#39;b&#39;" in reporting.report_html(report)

    def test_obstacle_is_the_reason(self):
        site = dataclasses.replace(planned("fc").site, obstacle="its weight is computed")
        plan = Plan("cpu", (PlannedSite(site, None, ""),))
        assert "its weight is computed" in reporting.plan_text(plan)


class TestBudget:
    def test_text(self):
        text = reporting.report_text(budget_report(4))
        start = text.index("\nbudget\n")
        lines = text[start : text.index("\npasses", start)].splitlines()
        assert "4.00 bits  10.0 kB         0.1  ← chosen" in [line.strip() for line in lines]
        assert len(lines) == 3 + 10 + 1 + 6  # title, points, sites; an empty line before the first and the last
        assert lines[-4].split() == ["model.layers.1.mlp.down_proj", "w2a16_g128", "0.25"]
        assert not [line for line in lines if line != line.rstrip()]
        assert "budget" not in reporting.report_text(model_report(4))

    def test_points_that_are_shown(self):
        frontier = budget_report(1).frontier
        shown = reporting.shown_points(frontier)
        assert (shown[0], shown[-1]) == (frontier[0], frontier[-1])
        assert [point.bits for point in shown if point.chosen] == [4.0]
        assert len(shown) <= 9
        assert reporting.shown_points(frontier[:2]) == list(frontier[:2])
        assert reporting.shown_points(()) == []

    def test_dict(self):
        facts = json.loads(json.dumps(budget_report(2).to_dict(), allow_nan=False))
        assert facts["sensitivity"]["model.layers.0.self_attn.q_proj"] == {
            "w2a16_g128": 0.25, "w4a16_g128": 0.0625, "w8a16_g128": 1 / 64,
        }  # fmt: skip
        assert facts["frontier"][8] == {"nbytes": 10000, "bits": 4.0, "divergence": 0.1, "chosen": True}

    def test_sensitivity_is_shaded_by_its_logarithm(self):
        strips, legend = pictures.sensitivity_map(budget_report(2))
        assert [cell["kind"] for strip in strips for cell in strip["cells"]] == [
            "heat-0", "heat-3", "heat-1", "heat-4", "heat-2", "heat-0",
        ]  # fmt: skip
        assert strips[0]["summary"].startswith("layers 0: 0.25 at w2a16_g128, became w4a16_g128; layers 1:")
        assert legend[0]["text"] == "0.25 to 0.14"

    def test_frontier_is_drawn_by_its_logarithm(self):
        drawn = pictures.frontier_plot(budget_report(1).frontier)
        assert drawn["line"].split()[0] == "0.0,0.0"
        assert (drawn["chosen"]["x"], drawn["chosen"]["y"]) == (33.33, 33.33)
        assert [tick["text"] for tick in drawn["y_ticks"]] == ["0.001", "0.01", "0.1", "1"]
        assert [tick["text"] for tick in drawn["x_ticks"]] == [f"{bits} bits" for bits in range(2, 9)]
        assert pictures.frontier_plot(()) is None
        exact = tuple(dataclasses.replace(point, divergence=0.0) for point in budget_report(1).frontier)
        assert pictures.frontier_plot(exact) is None

    def test_html(self):
        text = budget_report(28).to_html()
        assert (
            "From 2.00 bits per weight, 2.0 kB: divergence 1, to 8.00 bits per weight, 26.0 kB: divergence 0.001; "
            "chosen: 4.00 bits per weight, 10.0 kB: divergence 0.1"
        ) in picture_labels(text)
        assert "What each size would have cost" not in model_report(2).to_html()


class TestDict:
    def test_every_site_and_strict_json(self):
        report = model_report(94)
        exact = dataclasses.replace(report.sites[0], sqnr=math.inf)
        facts = reporting.report_dict(dataclasses.replace(report, sites=(exact, *report.sites[1:])))
        facts = json.loads(json.dumps(facts, allow_nan=False))
        assert len(facts["sites"]) == 283
        assert (facts["sites"][0]["sqnr_db"], facts["sites"][0]["exact"]) == (None, True)
        assert (facts["sites"][-1]["sqnr_db"], facts["sites"][-1]["exact"]) == (None, False)
        assert facts["sites"][1]["shape"] == [32, 32]
        assert facts["bytes_after"] == 1000 + sum(site["bytes_after"] for site in facts["sites"])
        assert facts["graphs"][0]["passes"][0]["rejected"][0]["node"] == "linear_3"

    def test_plan(self):
        facts = reporting.plan_dict(model_report(2).plan)
        assert (facts["sites_quantized"], facts["sites_total"], facts["notes"]) == (6, 7, ["a note"])


class _Checker(html.parser.HTMLParser):
    """Collects tags and checks that they are closed in order."""

    void = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(text: str) -> list[tuple[str, dict]]:
    checker = _Checker()
    checker.feed(text)
    assert checker.open == []
    return checker.tags


def picture_labels(text: str) -> list[str]:
    return [attributes["aria-label"] for _, attributes in checked(text) if attributes.get("role") == "img"]


class TestHtml:
    def test_offline_and_well_formed(self):
        text = reporting.report_html(model_report(94))
        tags = checked(text)
        assert text.startswith("<!doctype html>")
        assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe"}
        assert not re.search(r"https?://|@import|url\(", text)
        assert "prefers-color-scheme: dark" in text
        assert len(text) < 200_000

    def test_coverage_map_has_text_alternatives(self):
        labels = picture_labels(reporting.report_html(model_report(28)))
        assert labels[:6] == [
            "model.layers.#.self_attn.q_proj: layers 0..27: w4a16_g128",
            "model.layers.#.self_attn.k_proj: layers 0..27: w4a16_g128",
            "model.layers.#.mlp.down_proj: layers 0..27: w4a16_g128",
            "lm_head: float",
            "before: w4a16_g128: 344.1 kB, sites that stay float: 32.8 kB, embeddings, norms, the rest: 1.0 kB",
            "after: w4a16_g128: 86.0 kB, sites that stay float: 32.8 kB, embeddings, norms, the rest: 1.0 kB",
        ]

    def test_errors_are_shaded_from_the_largest_on(self):
        report = model_report(3)
        worse = dataclasses.replace(report.sites[4], sqnr=10.0)  # k_proj of layer 1
        strips, legend = pictures.error_map((*report.sites[:4], worse, *report.sites[5:]))
        (k_proj,) = [strip for strip in strips if "k_proj" in strip["label"]]
        assert [cell["kind"] for cell in k_proj["cells"]] == ["heat-4", "heat-0", "heat-4"]
        assert k_proj["summary"] == "layers 0: 20.0 dB; layers 1: 10.0 dB; layers 2: 20.2 dB"
        assert [step["text"] for step in legend][::4] == ["10.0 to 12.0 dB", "18.2 to 20.2 dB"]

    def test_experts_that_saw_nothing_are_empty(self):
        report = dataclasses.replace(model_report(1), expert_tokens=(("layers.0.experts.up", (0, 4, 400)),))
        (strip,) = pictures.expert_map(report.expert_tokens)
        assert [cell["kind"] for cell in strip["cells"]] == ["tokens-0", "tokens-1", "tokens-4"]
        assert "layers.0.experts.up: 0 to 400 tokens, 1 saw none" in picture_labels(report.to_html())

    def test_memory(self):
        moments = (Moment(0.0, 100, "start"), Moment(1.0, 400, "layers.0"), Moment(4.0, 200, "rewritten"))
        report = dataclasses.replace(model_report(1), memory=moments)
        drawn = pictures.memory_line(moments, width=8, height=4)
        assert drawn["line"] == "0.0,3.0 2.0,0.0 8.0,2.0"
        assert picture_labels(report.to_html())[-1] == "100 B at the start, at most 400 B (layers.0), 200 B at the end"
        assert "100 B at the start, at most 400 B (layers.0), 200 B at the end" in str(report)
        assert report.to_dict()["memory"][1] == {"seconds": 1.0, "resident_bytes": 400, "what": "layers.0"}
        assert pictures.memory_line(()) is None

    def test_kernels_chosen_and_refused(self):
        sites = [planned("a"), dataclasses.replace(planned("b"), kernel="reference", refusals="int4pack: too <small>")]
        report = Report("M", Plan("cpu", tuple(sites)), tuple(SiteResult(p, p.bytes_after) for p in sites))
        assert [(row.kernel, row.count, row.refusals) for row in tables.kernel_rows(report.sites)] == [
            ("int4pack", 1, ""), ("reference", 1, "int4pack: too <small>")
        ]  # fmt: skip
        assert "int4pack: too &lt;small&gt;" in report.to_html()
        assert report.to_dict()["sites"][1]["kernels_refused"] == "int4pack: too <small>"

    def test_a_notebook_shows_a_quantized_model_as_its_report(self, monkeypatch):
        shown = {}
        formatter = SimpleNamespace(for_type=shown.__setitem__)
        shell = SimpleNamespace(display_formatter=SimpleNamespace(formatters={"text/html": formatter}))
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
        model = torch.nn.Linear(2, 2)
        set_state(model, State(model_report(1).plan, model_report(1)))
        ((kind, to_html),) = shown.items()
        assert isinstance(model, kind)
        assert "TestForCausalLM" in to_html(model)
        assert to_html(torch.nn.Linear(2, 2)) is None

    def test_a_plan_has_no_errors(self):
        text = model_report(2).plan._repr_html_()
        assert len(picture_labels(text)) == 6
        assert "dB" not in re.sub("<p class.*", "", text)

    def test_experts_share_a_cell(self):
        sites = [planned(f"l.{i}.e.{j}.up", "w8a16" if j else None) for i in range(2) for j in range(3)]
        report = Report("M", Plan("cpu", tuple(sites)), tuple(SiteResult(p, p.bytes_after) for p in sites))
        text = reporting.report_html(report)
        assert 'aria-label="l.#.e.*.up: layers 0,1: float and w8a16"' in text
        assert text.count('class="mixed"') == 3  # two cells and the legend

    def test_names_are_escaped(self):
        report = dataclasses.replace(model_report(1), model="<script>alert(1)</script>")
        assert "<script>" not in reporting.report_html(report)

    def test_headers_have_scope(self):
        assert all(
            a.get("scope") in ("col", "row")
            for tag, a in checked(reporting.report_html(model_report(2)))
            if tag == "th"
        )

    def test_fragment_for_notebooks(self):
        text = reporting.report_html(model_report(2), page=False)
        assert not {tag for tag, _ in checked(text)} & {"html", "body", "head", "meta"}

    def test_comparison_and_several_reports(self):
        rows = [{"scheme": "float", "MB": "10.4"}, {"scheme": "w8a8", "MB": "6.0"}]
        text = html_page("demo", [model_report(2), model_report(2)], rows, lead="two lines")
        assert [a["href"] for tag, a in checked(text) if tag == "a"] == ["#report-1", "#report-2"]
        assert "10.4" in text
        assert "two lines" in text
