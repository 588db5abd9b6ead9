"""``judge`` from the command line: which kind of folder it is, and what is printed and written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from loadstone.core.errors import UsageError
from loadstone.measure.find import exit_status
from loadstone.measure.foreign import judge_benchmarks
from loadstone.measure.judged import Judged, judge_run
from loadstone.measure.runs import LIMITS_FILE, RunFolder
from loadstone.report.page import write_report
from loadstone.report.tables import print_answer


def judge_folder(path: Path, overrides: Mapping[str, Any]) -> Judged:
    """A run folder by its records, a folder of benchmark results by their figures. Raises UsageError."""
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder; give a run folder, or one with results of vllm bench serve")
    folder = RunFolder(path)
    if not (path / "levels").is_dir():
        return judge_benchmarks(folder, overrides)
    if folder.is_of_rate():
        raise UsageError(f"{path} is a run of rate, which no rules are held to; its answer: loadstone report {path}")
    return judge_run(folder, overrides)


def conclude(judged: Judged, *, write: bool, json: bool, quiet: bool) -> int:
    """Write where that is asked for, print; returns the exit status."""
    if not quiet:
        print_answer(judged.verdict, Console())
    if write:
        judged.write()
        page, picture = write_report(judged.folder.path)
        if not quiet:
            print(f"\nreport   {page}\npicture  {picture}")
            if judged.limits is not None:
                print(f"limits   {judged.folder.path / LIMITS_FILE}")
    if json:
        document = {"run": str(judged.folder.path), **msgspec.to_builtins(judged.verdict)}
        print(msgspec.json.encode(document).decode())
    return exit_status(judged.verdict)
