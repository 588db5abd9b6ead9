"""A published results table of an embedding service as a fixture for rules, gain line and report.

| concurrency | req/s | mean ms | p95 ms | p99 ms | errors |
| 10 | 45 | 220 | 350 | 450 | 0 % |
| 50 | 180 | 280 | 500 | 800 | 0 % |
| 100 | 320 | 310 | 600 | 1200 | 0.1 % |
| 200 | 450 | 440 | 900 | 2000 | 0.5 % |
| 500 | 520 | 960 | 2500 | 5000 | 2 % |

Its authors advise 100 to 200 at once in production. Nothing streams, so the latency rule holds for the end-to-end time.
"""

import json
import shutil
from pathlib import Path

import pytest

from loadstone.cli.main import main

TABLE = Path(__file__).parent / "data" / "embedding_table"
ROWS = {
    10: (45.0, 220.0, 350.0, 450.0, 0.0),
    50: (180.0, 280.0, 500.0, 800.0, 0.0),
    100: (320.0, 310.0, 600.0, 1200.0, 0.001),
    200: (450.0, 440.0, 900.0, 2000.0, 0.005),
    500: (520.0, 960.0, 2500.0, 5000.0, 0.02),
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TABLE, tmp_path / "embedding_table"))


def test_the_table_is_read_as_it_was_published(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", str(table), "--json", "--quiet"]) == 0
    levels = json.loads(capsys.readouterr().out)["levels"]
    read = {
        row["concurrency"]: (
            row["throughput_rps"],
            row["mean_e2el_ms"],
            row["p95_e2el_ms"],
            row["p99_e2el_ms"],
            pytest.approx(row["error_rate"]),
        )
        for row in levels
    }
    assert read == ROWS
    assert all(row["mean_ttft_ms"] is None for row in levels)


def test_its_line_and_what_is_recommended(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", str(table), "--json"]) == 0
    shown, _, line = capsys.readouterr().out.rstrip().rpartition("\n")
    verdict = json.loads(line)
    assert verdict["gain_line"]["concurrency"] == 227
    assert verdict["gain_line"]["low"] <= 200 <= 227 <= verdict["gain_line"]["high"]
    assert (verdict["measured_max_concurrency"], verdict["recommended_concurrency"]) == (227, 170)
    assert 100 <= verdict["recommended_concurrency"] <= 200
    assert (verdict["binding"], verdict["sure"]) == ("gain", False)
    assert {row["verdict"] for row in verdict["levels"]} == {"PASS"}
    assert "the highest level that was run and lies within 227 is 200" in verdict["notes"]
    assert "nothing breaks" in verdict["claim"]
    assert "This server takes 227 concurrent requests." in shown
    assert "Run it at 170 (74.9 % of the line)." in shown


@pytest.mark.parametrize(
    ("flags", "line", "binding"),
    [
        (["--min-gain", "0"], 500, "ladder"),
        (["--max-e2el-ms", "400"], 100, "e2el"),
        (["--max-ttft-ms", "300"], 50, "e2el"),
        (["--slo", "e2el:p99:1000"], 50, "slo:e2el"),
        (["--min-success", "0.999"], 100, "success"),
        (["--min-success", "0.997", "--slo", "e2el:p95:550"], 50, "slo:e2el"),
    ],
)
def test_under_other_rules(
    flags: list[str], line: int, binding: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["judge", str(table), "--json", "--quiet", *flags]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["measured_max_concurrency"], verdict["binding"]) == (line, binding)


def test_its_report(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", str(table), "--write"]) == 0
    shown = capsys.readouterr().out
    page = (table / "report.html").read_text()
    assert (table / "concurrency_analysis.png").read_bytes().startswith(b"\x89PNG")
    assert all(text in page for text in ("This server takes 227", "Run it at 170", "End-to-end latency", "siglip2"))
    assert "First token" not in page
    limits = (table / "limits.toml").read_text()
    assert "max_concurrency = 170" in limits
    assert str(table / "report.html") in shown
    # The files that were written are no results themselves.
    assert main(["report", str(table), "--text"]) == 0
    assert "This server takes 227" in capsys.readouterr().out
