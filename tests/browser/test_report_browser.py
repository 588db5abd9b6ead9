"""The page in a real browser: no error, every chart painted, the legend answers the pointer. Needs ``chromium``.

Run by itself: ``pytest tests/browser``; the ordinary suite leaves this folder out.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import report_runs as runs
from chromium import FLAGS
from loadstone.report.page import write_report

_FLAGS = (*FLAGS, "--virtual-time-budget=5000")

_LISTEN = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(event.message));
console.error = console.warn = (...words) => problems.push(words.join(" "));
</script>"""

_INSPECT = """<script>
setTimeout(() => {
  const charts = [...document.querySelectorAll(".chart")].map((chart) => {
    const canvas = chart.querySelector("canvas");
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    const colours = new Set();
    for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] === 255) colours.add(pixels.slice(i, i + 3).join());
    const over = chart.querySelector(".u-over");
    const box = over.getBoundingClientRect();
    const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, bubbles: true };
    over.dispatchEvent(new MouseEvent("mouseenter", at));
    over.dispatchEvent(new MouseEvent("mousemove", at));
    return { id: chart.id, colours: colours.size, width: chart.querySelector(".u-wrap").offsetWidth, chart };
  });
  setTimeout(() => {
    for (const found of charts) {
      found.legend = [...found.chart.querySelectorAll(".u-value")].map((cell) => cell.textContent);
      delete found.chart;
    }
    const root = document.documentElement;
    root.dataset.found = JSON.stringify({ problems, charts, overflow: root.scrollWidth - innerWidth });
  }, 500);
}, 500);
</script>"""


def look(html: Path, width: int, profile: Path) -> dict[str, object]:
    """What the page says of itself once drawn in a window of ``width`` pixels."""
    browser = shutil.which("chromium")
    assert browser, "chromium is not installed: apt-get install chromium"
    page = html.read_text().replace("<head>", f"<head>{_LISTEN}", 1).replace("</body>", f"{_INSPECT}</body>")
    copy = html.with_name("instrumented.html")
    copy.write_text(page)
    command = [browser, *_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},2000", copy.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    match = re.search(r'data-found="([^"]*)"', dom)
    assert match, "the page never finished"
    return json.loads(match[1].replace("&quot;", '"'))


@pytest.mark.parametrize("width", [1400, 500])
@pytest.mark.parametrize("name", ["vllm_like", "troubled", "single"])
def test_every_chart_is_painted_without_an_error(name: str, width: int, tmp_path: Path) -> None:
    html, _ = write_report(runs.write_run(tmp_path / "run", runs.RUNS[name]()))
    found = look(html, width, tmp_path / "profile")
    assert found["problems"] == []
    assert found["overflow"] <= 0
    assert len(found["charts"]) == (3 if name == "single" else 4)
    for chart in found["charts"]:
        assert chart["colours"] > 5, chart
        assert 300 < chart["width"] < width
        assert all(chart["legend"]), chart
