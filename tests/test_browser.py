"""The report in a real browser: it fits a phone, follows light and dark, is used by keyboard, and asks for nothing."""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_reporting import budget_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

MEASURE = """
<!doctype html><pre id="facts"></pre>
<iframe style="border:0; width:{width}px; height:900px" srcdoc="{page}"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, window_ = frame.contentWindow, main = page.querySelector(".qcompile");
  const rgb = (element, name) => window_.getComputedStyle(element)[name].match(/\\d+/g).slice(0, 3).map(Number);
  page.querySelectorAll("details").forEach(details => {{ details.open = true; }});
  const sites = [...page.querySelectorAll("details")].at(-1);
  const plot = page.querySelector(".plot").getBoundingClientRect();
  const ticks = [...page.querySelectorAll(".tick")].map(tick => tick.getBoundingClientRect());
  const tab = [...page.querySelectorAll("a[href], summary, [tabindex='0']")];
  const focused = tab.map(element => {{ element.focus(); return page.activeElement === element; }});
  document.querySelector("#facts").textContent = JSON.stringify({{
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    text: rgb(main, "color"), back: rgb(main, "backgroundColor"), soft: rgb(page.querySelector(".soft"), "color"),
    focused, requests: window_.performance.getEntriesByType("resource").length,
    site_rows: sites.querySelectorAll("tbody tr").length,
    visible: sites.querySelector("table").getBoundingClientRect().height > 100,
    plot: [plot.width, plot.height],
    ticks_inside: ticks.every(tick => tick.left >= 0 && tick.right <= page.documentElement.clientWidth),
    cell: page.querySelector(".cells i").getBoundingClientRect().width,
  }});
}};
</script>
"""


def measured(tmp_path, width: int, dark: bool) -> dict:
    page = tmp_path / "measure.html"
    page.write_text(MEASURE.format(width=width, page=html.escape(budget_report(28).to_html())))
    options = [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", *options, "--virtual-time-budget=5000"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="facts">(\{.*?\})</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def luminance(rgb: list[int]) -> float:
    """Relative luminance of WCAG 2."""
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def contrast(one: list[int], other: list[int]) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1100, True)])
def test_report(tmp_path, width, dark):
    facts = measured(tmp_path, width, dark)
    assert facts["overflow"] <= 0
    assert (luminance(facts["back"]) < 0.1) == dark
    assert contrast(facts["text"], facts["back"]) > 7
    assert contrast(facts["soft"], facts["back"]) > 4.5
    assert all(facts["focused"])
    assert len(facts["focused"]) >= 5
    assert facts["requests"] == 0
    assert facts["site_rows"] == 85
    assert facts["visible"]
    assert facts["cell"] > 3
    assert min(facts["plot"]) > 150
    assert facts["ticks_inside"]
