"""The page: whole in itself, holding the figures, and nothing from the run unescaped."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

import report_runs as runs
from loadstone.cli.report import report
from loadstone.core.errors import UsageError
from loadstone.core.verdict import RunVerdict
from loadstone.report.page import write_report


class Page(HTMLParser):
    """Tags with their attributes, and the text a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.chart_data = ""
        self._hidden = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = str(dict(attrs).get("id") or tag) if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._hidden = ""

    def handle_data(self, data: str) -> None:
        if self._hidden == "chart-data":
            self.chart_data += data
        elif not self._hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page(folder: Path, verdict: RunVerdict, facts: dict[str, object] = runs.FACTS) -> Page:
    html, _ = write_report(runs.write_run(folder / "run", verdict, facts))
    return Page(html.read_text("utf-8"))


@pytest.mark.parametrize("name", runs.RUNS)
def test_it_loads_nothing_from_anywhere(name: str, tmp_path: Path) -> None:
    found = page(tmp_path, runs.RUNS[name]())
    for tag, attributes in found.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "a"), tag
        assert not {"src", "href", "srcset", "action", "data"} & attributes.keys()
    policy = next(a["content"] for t, a in found.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    styles = "".join(p.read_text() for p in Path(write_report.__code__.co_filename).parent.rglob("*.css"))
    assert "url(" not in styles
    assert "@import" not in styles


def test_what_is_not_known_of_the_generator_is_not_shown_as_zero(tmp_path: Path) -> None:
    levels = [msgspec.structs.replace(row, client=None) for row in runs.vllm_like().levels]
    text = page(tmp_path, msgspec.structs.replace(runs.vllm_like(), levels=levels)).text
    assert text.count("nothing is known") == len(levels)


def test_it_holds_the_answer_and_the_figures(tmp_path: Path) -> None:
    text = page(tmp_path, runs.vllm_like()).text
    for words in (
        "This server takes 220 concurrent requests.",
        "Run it at 165 (75 % of the line).",
        "220 held: n = 2,200, success 100 %",
        "coarse ladder",
        "Gain line: 240 (between 228 and 253)",
        "吞吐量 vs 并发度",
        "并发效率 vs 并发度",
        "2 stopped early",
        "100 % [99.5–100] of 2,000 succeeded against 95 %",
        "preemptions",
        "loadstone find --base-url http://127.0.0.1:8001",
        "random_input_len",
    ):
        assert words in text, words
    for row in runs.vllm_like().levels:
        assert row.reason in text


def test_the_charts_get_the_same_figures(tmp_path: Path) -> None:
    charts = json.loads(page(tmp_path, runs.vllm_like()).chart_data)
    assert [chart["key"] for chart in charts] == ["throughput", "efficiency", "ttft", "itl"]
    assert charts[0]["curves"][0]["x"] == [1, 2, 5, 10, 20, 50, 100, 165, 200, 220, 230]


def test_text_from_the_run_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    facts = {
        **runs.FACTS,
        "command": evil,
        "server": {"model": evil, evil: evil},
        "settings": {"rules": {"ttft_stat": evil, "max_ttft_ms": 9}},
    }
    verdict = msgspec.structs.replace(runs.troubled(), claim=evil, binding=evil, notes=[evil])
    folder = runs.write_run(tmp_path / "run", verdict, facts)
    (folder / "limits.toml").write_text(evil)
    html, _ = write_report(folder)
    found = Page(html.read_text())
    assert "alert(1)" not in re.sub(
        r"&lt;/script&gt;&lt;script&gt;alert\(1\)&lt;/script&gt;", "", html.read_text()
    ).replace("\\u003c/script>\\u003cscript>alert(1)", "")
    assert [tag for tag, _ in found.tags].count("script") == 3
    assert json.loads(found.chart_data)[2]["limit"]["label"].startswith(f"limit on the {evil}")


def test_replies_without_content_and_failures_are_counted_in_words(tmp_path: Path) -> None:
    text = page(tmp_path, runs.troubled()).text
    assert "3 replies without content" in text
    assert "Failures: http_error 40, timeout 2" in text
    assert "1 stopped early, 1 INVALID" in text


def test_metrics_that_were_not_measured_have_no_columns(tmp_path: Path) -> None:
    text = page(tmp_path, runs.single()).text
    assert "E2EL, ms" in text
    assert "TTFT, ms" not in text


def test_the_limits_that_were_written_are_shown(tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path / "run", runs.vllm_like())
    (folder / "limits.toml").write_text("schema = 1\n[limits]\nmax_concurrency = 165\n")
    assert "max_concurrency = 165" in write_report(folder)[0].read_text()


def test_a_run_toml_that_says_little_still_gives_a_page(tmp_path: Path) -> None:
    assert "How to reproduce" in page(tmp_path, runs.vllm_like(), {}).text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("verdict.json", None, "verdict.json is missing"),
        ("verdict.json", b'{"binding": 3', "verdict.json is not a verdict"),
        ("verdict.json", b"\xff\xfe", "verdict.json is not a verdict"),
        ("run.toml", None, "run.toml is missing"),
        ("run.toml", b"a = ", "run.toml is not valid TOML"),
        ("run.toml", b"a = '\xff'", "run.toml is not valid TOML"),
    ],
)
def test_a_broken_run_folder_is_one_clear_line(name: str, content: bytes | None, words: str, tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path / "run", runs.single())
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)


def test_a_run_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a folder"):
        write_report(tmp_path / "absent")


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path / "run", runs.single())
    (folder / "report.html").mkdir()
    with pytest.raises(UsageError, match=r"cannot write .*report\.html"):
        write_report(folder)
    assert sorted(os.listdir(folder)) == ["report.html", "run.toml", "verdict.json"]


def test_the_command_prints_where_the_files_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs.write_run(tmp_path / "run", runs.vllm_like())
    assert report(folder) == 0
    assert capsys.readouterr().out.split() == [str(folder / "report.html"), str(folder / "concurrency_analysis.png")]
    assert report(folder, text=True) == 0
    assert "This server takes 220 concurrent requests." in capsys.readouterr().out
