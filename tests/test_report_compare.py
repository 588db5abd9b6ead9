"""Two runs side by side: what counts as worse, and what does not."""

import io
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

import report_runs as runs
from loadstone.cli.compare import compare as command
from loadstone.core.errors import InvalidLevelError
from loadstone.core.verdict import RunVerdict, Verdict
from loadstone.report.compare import Comparison, compare, print_comparison
from loadstone.report.folder import Run


def hold(a: RunVerdict, b: RunVerdict, tolerance: float = 0.05) -> Comparison:
    return compare(Run(Path("a"), a, runs.FACTS), Run(Path("b"), b, runs.FACTS), tolerance=tolerance)


def with_line(line: int | None, binding: str = "ttft") -> RunVerdict:
    return msgspec.structs.replace(runs.vllm_like(), measured_max_concurrency=line, binding=binding)


def slower(at: int, share: float) -> RunVerdict:
    run = runs.vllm_like()
    levels = [
        msgspec.structs.replace(
            row,
            throughput_rps=row.throughput_rps * share,
            throughput_low_rps=row.throughput_low_rps * share,
            throughput_high_rps=row.throughput_high_rps * share,
        )
        if row.concurrency == at and row.throughput_rps and row.throughput_low_rps and row.throughput_high_rps
        else row
        for row in run.levels
    ]
    return msgspec.structs.replace(run, levels=levels)


@pytest.mark.parametrize(
    ("line_a", "line_b", "binding_b", "worse"),
    [
        (200, 200, "ttft", False),
        (200, 190, "ttft", False),
        (200, 189, "ttft", True),
        (200, 300, "ttft", False),
        (200, None, "success", True),
        (None, 5, "ttft", False),
        (None, None, "success", False),
        (200, 100, "ladder", False),
        (200, 100, "client", False),
    ],
)
def test_the_line(line_a: int | None, line_b: int | None, binding_b: str, worse: bool) -> None:
    assert bool(hold(with_line(line_a), with_line(line_b, binding_b)).worse) is worse


@pytest.mark.parametrize(
    ("share", "tolerance", "worse"),
    [
        (1.0, 0.05, False),
        (1.3, 0.05, False),
        # The intervals are ± 3 % wide: 4 % less overlaps, 7 % less does not.
        (0.96, 0.0, False),
        (0.93, 0.05, True),
        (0.93, 0.1, False),
    ],
)
def test_throughput_at_a_level_in_common(share: float, tolerance: float, worse: bool) -> None:
    found = hold(runs.vllm_like(), slower(100, share), tolerance).worse
    assert bool(found) is worse
    if worse:
        assert found == ["at 100 throughput fell from 21.3 to 19.8 req/s, beyond both intervals."]


def test_only_levels_that_both_ran_in_full_are_compared() -> None:
    found = hold(runs.vllm_like(), runs.troubled())
    assert [pair.concurrency for pair in found.pairs] == [1, 2, 10, 20]


def test_a_throughput_without_an_interval_proves_nothing() -> None:
    b = slower(100, 0.5)
    bare = [msgspec.structs.replace(row, throughput_low_rps=None, throughput_high_rps=None) for row in b.levels]
    assert hold(runs.vllm_like(), msgspec.structs.replace(b, levels=bare)).worse == []


def test_a_run_that_judged_nothing_cannot_be_compared() -> None:
    void = msgspec.structs.replace(runs.single(), levels=[runs.level(0, 1, Verdict.INVALID)])
    with pytest.raises(InvalidLevelError, match="b holds no level"):
        hold(runs.single(), void)


@pytest.mark.parametrize("binding", ["", "client"])
def test_a_run_without_a_line_by_nobodys_fault_is_not_worse(binding: str) -> None:
    levels = [runs.level(0, 1, Verdict.UNRESOLVED), runs.level(1, 2, Verdict.INVALID)]
    unknown = msgspec.structs.replace(runs.nothing_passed(), levels=levels, binding=binding)
    found = hold(runs.single(), unknown)
    assert found.worse == []
    assert found.caveats[-1] == "B's line is not known: no level could be judged."
    print_comparison(found, Console(file=io.StringIO()))


def test_unlike_conditions_and_lower_bounds_are_said() -> None:
    settings = {**runs.FACTS["settings"], "data": {**runs.FACTS["settings"]["data"], "random_input_len": 1024}}
    server = {**runs.FACTS["server"], "first_e2el_s": 9.9}
    facts = {**runs.FACTS, "settings": settings, "server": server, "python": "3.12"}
    a, b = Run(Path("a"), runs.vllm_like(), runs.FACTS), Run(Path("b"), runs.single(), facts)
    assert compare(a, b, tolerance=0.05).caveats == [
        "B's line is a lower bound: the search ended at 36 unbroken.",
        "settings.data.random_input_len differs: 512 in A, 1024 in B.",
    ]


def test_the_table_shows_both_runs() -> None:
    out = io.StringIO()
    print_comparison(hold(runs.vllm_like(), slower(100, 0.9)), Console(file=out, width=80))
    text = out.getvalue()
    assert text.startswith("A: a\nB: b\n")
    assert "measured line" in text
    assert "132 [129–135]" in text
    assert "Worse: at 100 throughput fell" in text


def test_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = runs.write_run(tmp_path / "a", runs.vllm_like())
    b = runs.write_run(tmp_path / "b", slower(50, 0.8))
    assert command(a, a) == 0
    assert "B is not worse than A." in capsys.readouterr().out
    assert command(a, b) == 1
    assert command(b, a) == 0
    assert command(a, b, tolerance=0.3) == 0
