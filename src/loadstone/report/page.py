"""``report.html`` and ``concurrency_analysis.png`` from a run folder: one page that works offline, one picture."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup

from loadstone.core.verdict import LevelRow, RunVerdict, Verdict
from loadstone.report.answer import CLIENT_MEANING, answer, number, percent
from loadstone.report.charts import Chart, charts
from loadstone.report.folder import Run, flat, read_run, write_whole

_HEAD_KEYS = ("model", "endpoint", "base_url", "created_at")


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``concurrency_analysis.png`` into ``run_dir``; their paths.

    Raises :class:`UsageError` where ``verdict.json`` or ``run.toml`` is missing or corrupt, or the folder is read-only.
    """
    from loadstone.report.plots import picture

    run = read_run(run_dir)
    panels = charts(run.verdict, run.fact)
    html_path, png_path = run_dir / "report.html", run_dir / "concurrency_analysis.png"
    write_whole(html_path, render(run, panels).encode())
    write_whole(png_path, picture(panels, _picture_title(run)))
    return html_path, png_path


def render(run: Run, panels: list[Chart]) -> str:
    """The page. Everything that comes from the run is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("loadstone.report", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["percent"] = percent
    environment.filters["toml"] = _toml_value
    limits = run.path / "limits.toml"
    return environment.get_template("page.html.j2").render(
        verdict=run.verdict,
        answer=answer(run.verdict),
        client_meaning=CLIENT_MEANING,
        head={key: run.fact(key) for key in _HEAD_KEYS if run.fact(key) is not None},
        charts=panels,
        # msgspec's JSON may hold "</script>" in a text; "<" as an escape means the same to a JSON reader.
        chart_data=Markup(msgspec.json.encode(panels).decode().replace("<", "\\u003c")),
        not_drawn=_not_drawn(run.verdict),
        latencies=[m for m in ("ttft", "itl", "e2el") if _measured(run.verdict.levels, m)],
        signals=_signals(run.verdict.levels),
        command=run.facts.get("command", ""),
        facts=_sections(run.facts),
        limits=limits.read_text("utf-8", "replace") if limits.is_file() else "",
        asset=_asset,
    )


def _asset(name: str) -> Markup:
    """One of our own files, to stand in the page as it is."""
    return Markup(resources.files("loadstone.report").joinpath(name).read_text("utf-8"))


def _picture_title(run: Run) -> str:
    parts = [str(run.fact("model") or "Loadstone run"), str(run.fact("endpoint") or "")]
    line, recommended = run.verdict.measured_max_concurrency, run.verdict.recommended_concurrency
    parts.append(f"measured line {line:,}" if line is not None else "no measured line")
    parts.append(f"recommended {recommended:,}" if recommended is not None else "")
    return " · ".join(part for part in parts if part)


def _not_drawn(verdict: RunVerdict) -> str:
    early = sum(row.stopped_early and row.verdict is not Verdict.INVALID for row in verdict.levels)
    void = sum(row.verdict is Verdict.INVALID for row in verdict.levels)
    parts = [f"{early} stopped early"] if early else []
    parts += [f"{void} INVALID"] if void else []
    return f"Not drawn, but in the table: levels that have no steady figures ({', '.join(parts)})." if parts else ""


def _measured(levels: list[LevelRow], metric: str) -> bool:
    return any(getattr(row, f"mean_{metric}_ms") is not None for row in levels)


def _signals(levels: list[LevelRow]) -> list[str]:
    """Names of what the server said on any level, in the order first met."""
    return list(dict.fromkeys(name for row in levels for name in row.server))


def _sections(facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``run.toml`` for display: its values by table, those of the top level under "run"; nothing that is empty."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in flat(facts).items():
        table, _, key = name.rpartition(".")
        if name != "command" and value not in ("", []):
            sections.setdefault(table or "run", {})[key] = value
    return sections


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(_toml_value(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
