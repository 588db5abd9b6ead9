"""The answer in words, on a terminal and in a file."""

import io

import msgspec
import pytest
from rich.console import Console

import report_runs as runs
from loadstone.core.verdict import NOT_ENDED, LevelKind, LevelRow, RunVerdict, Verdict
from loadstone.report.answer import answer, judged, number, percent
from loadstone.report.tables import print_answer


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.00042, "4.2e-04"),
        (0.31, "0.310"),
        (1.2345, "1.23"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
    ],
)
def test_numbers_keep_three_figures(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("share", "text"), [(1, "100 %"), (0.953, "95.3 %"), (0.74, "74 %"), (-0.1, "-10 %")])
def test_percentages_drop_an_empty_decimal(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("success", "Above it too few requests succeed."),
        ("ttft", "Above it the time to first token passes its limit."),
        ("e2el", "Above it the end-to-end time passes its limit."),
        ("gain", "Above it nothing breaks"),
        ("resource:kv_use", "Above it the server runs out of kv use."),
        ("slo:tpot_p99", "Above it tpot p99 passes its limit."),
        ("ladder", "No level failed"),
        ("client", "the load generator was the bottleneck"),
    ],
)
def test_the_binding_rule_is_said_in_words(binding: str, words: str) -> None:
    assert words in answer(msgspec.structs.replace(runs.vllm_like(), binding=binding)).binding


def test_the_breach_named_is_the_lowest_failure_above_the_line() -> None:
    assert "At 230: mean TTFT 1196" in answer(runs.vllm_like()).binding


def test_a_lower_bound_is_called_one() -> None:
    words = answer(runs.troubled())
    assert words.headline == "This server takes at least 20 concurrent requests."
    assert "measured ground" in words.why_half


def test_both_numbers_stand_with_the_reason() -> None:
    words = answer(runs.vllm_like())
    assert "250" in words.half
    assert "coarse ladder" in words.why_half
    assert "165 (75 % of the line)" in words.recommendation
    assert "28.1 req/s, 89.2 %" in words.recommendation


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, "Sure:"), ({"sure": False}, "Not sure:"), ({"sure": False, "non_monotone": True}, "Not monotone:")],
)
def test_how_sure(changes: dict[str, bool], words: str) -> None:
    assert answer(msgspec.structs.replace(runs.vllm_like(), **changes)).certainty.startswith(words)


def test_no_level_passed() -> None:
    words = answer(runs.nothing_passed())
    assert words.headline.startswith("No level passed")
    assert words.binding == "Too few requests succeed. At 1: 31 % [21–44] of 61 succeeded, fewer than 95 %"
    assert words.recommendation == words.certainty == words.why_half == ""


@pytest.mark.parametrize(
    ("levels", "binding", "words"),
    [
        (
            [runs.level(0, 1, Verdict.INVALID)],
            "client",
            "At the lowest level the load generator was the bottleneck, which says nothing about the server. "
            "Run the generator on a faster or quieter machine to go on.",
        ),
        (
            [runs.level(0, 1, Verdict.UNRESOLVED)],
            "",
            "Every level that was run stayed too close to a limit to tell; more --requests-per-slot may settle it.",
        ),
        ([], "", ""),
    ],
)
def test_no_level_judged(levels: list[LevelRow], binding: str, words: str) -> None:
    said = answer(msgspec.structs.replace(runs.nothing_passed(), levels=levels, binding=binding))
    assert said.headline.startswith("No level could be judged")
    assert said.binding == words


def test_a_search_that_has_not_ended_is_not_sure_for_that_reason() -> None:
    note = f"{NOT_ENDED}: 500 would be run next"
    words = answer(msgspec.structs.replace(runs.single(), sure=False, notes=[note]))
    assert words.certainty == "Not sure: the search has not ended."
    assert words.binding == "No level that was run has failed: the line may be higher."


def test_the_interval_of_a_gain_line_is_told_once() -> None:
    assert any("Gain line: 240 (between 228 and 253)" in aside for aside in answer(runs.vllm_like()).asides)
    binds = answer(msgspec.structs.replace(runs.vllm_like(), binding="gain"))
    assert not any("Gain line" in aside for aside in binds.asides)


def test_one_row_for_each_concurrency_the_fullest() -> None:
    rows = [
        runs.level(0, 20),
        runs.level(1, 20, kind=LevelKind.CONFIRM, requests=400),
        runs.failed(
            2,
            10,
            **runs.EARLY,
        ),
        runs.failed(3, 10, requests=5),
        runs.level(4, 20, Verdict.INVALID, requests=9000),
    ]
    assert [(row.concurrency, row.ordinal) for row in judged(rows)] == [(10, 3), (20, 1)]


@pytest.mark.parametrize("name", runs.RUNS)
def test_in_a_file_it_is_plain_text_within_80_columns(name: str) -> None:
    verdict: RunVerdict = runs.RUNS[name]()
    out = io.StringIO()
    print_answer(verdict, Console(file=out, width=80))
    text = out.getvalue()
    assert "\x1b" not in text
    assert answer(verdict).headline in text
    table = text.splitlines()[: 1 + len(verdict.levels)]
    assert all(len(line) <= 80 and "…" not in line for line in table)
    for row in verdict.levels:
        assert row.verdict is Verdict.PASS or row.reason in text


def test_on_a_terminal_it_is_coloured_and_wrapped() -> None:
    out = io.StringIO()
    print_answer(runs.troubled(), Console(file=out, width=80, force_terminal=True, color_system="standard"))
    assert "\x1b[32mPASS" in out.getvalue()
    assert '<script>alert("x")</script>' in out.getvalue()
