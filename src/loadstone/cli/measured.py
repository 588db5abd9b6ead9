"""What a finished run tells another command line: its line, the throughput there, and the requests it sent."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadstone.cli.presets import MeasuredRun
from loadstone.core.errors import UsageError
from loadstone.core.verdict import RunVerdict
from loadstone.report.folder import read_run

_SERVER_FLAGS = ("base_url", "endpoint", "model")


def measured_run(folder: str) -> MeasuredRun:
    """Raises UsageError where ``folder`` holds no finished run, or one without a line."""
    run = read_run(Path(folder))
    line = run.verdict.measured_max_concurrency
    throughput_rps = None if line is None else _throughput_at(run.verdict, line)
    if line is None or throughput_rps is None:
        raise UsageError(f"{folder} has found no line to stay below; give a run in which a level passed")
    return MeasuredRun(line, throughput_rps, _workload(run.facts))


def _throughput_at(verdict: RunVerdict, line: int) -> float | None:
    """Of the last run at the line itself, else of the nearest level below it."""
    known = [row for row in verdict.levels if row.throughput_rps is not None and row.concurrency <= line]
    return max(known, key=lambda row: (row.concurrency, row.ordinal)).throughput_rps if known else None


def _workload(facts: Mapping[str, Any]) -> dict[str, str]:
    """Flags of ``bench`` for the same requests; what is not set is left to its default."""
    found, asked = facts.get("server", {}), facts.get("settings", {})
    server = {key: found.get(key) or asked.get("server", {}).get(key) for key in _SERVER_FLAGS}
    values = server | asked.get("data", {}) | {"extra_body": asked.get("server", {}).get("extra_body")}
    return {f"--{key.replace('_', '-')}": str(value) for key, value in values.items() if value}
