"""Presets and scenarios as whole command lines: the guide's numbers, overridden by whatever the user gives."""

import shlex
from pathlib import Path

import pytest

from loadstone.cli.main import main
from loadstone.cli.measured import measured_run
from loadstone.cli.presets import PRESETS, SCENARIOS, MeasuredRun, expand
from loadstone.core.errors import UsageError
from report_runs import level, nothing_passed, vllm_like, write_run

RUN = MeasuredRun(
    200, 12.5, {"--base-url": "http://gpu:8001", "--endpoint": "completions", "--random-input-len": "256"}
)


def no_run(folder: str) -> MeasuredRun:
    raise AssertionError("no run is to be read")


def expanded(line: str, run: MeasuredRun = RUN) -> tuple[str, dict[str, str]]:
    """(verb, flags) after expansion; no flag may stand twice."""
    verb, *words = expand(shlex.split(line), lambda folder: run).tokens
    pairs: dict[str, str] = {}
    position = 0
    while position < len(words):
        flag, equals, value = words[position].partition("=")
        if not equals:
            position += 1
            value = words[position]
        assert flag not in pairs, f"{flag} stands twice"
        pairs[flag] = value
        position += 1
    return verb, pairs


CHAT = {"--endpoint": "chat", "--random-input-len": "512", "--random-output-len": "128"}
LADDER = {"--levels": "1,2,5,10,20,50,100,200,500,1000", "--requests-per-slot": "10"}


def traffic(concurrency: int | None, rate: str, prompts: int) -> dict[str, str]:
    slots = {} if concurrency is None else {"--max-concurrency": str(concurrency)}
    return {**slots, "--request-rate": rate, "--num-prompts": str(prompts)}


def lengths(tokens_in: int, tokens_out: int) -> dict[str, str]:
    return {"--endpoint": "chat", "--random-input-len": str(tokens_in), "--random-output-len": str(tokens_out)}


@pytest.mark.parametrize(
    ("line", "verb", "flags"),
    [
        ("find --preset quick", "bench", {**CHAT, **traffic(10, "inf", 50)}),
        ("bench --preset=quick", "bench", {**CHAT, **traffic(10, "inf", 50)}),
        ("find --preset limit", "find", {**CHAT, **LADDER}),
        ("bench --preset limit", "find", {**CHAT, **LADDER}),
        ("find --preset realistic --request-rate 8", "bench", {**CHAT, **traffic(None, "8", 1000)}),
        (
            "bench --preset realistic --request-rate=8 --max-concurrency 30",
            "bench",
            {**CHAT, **traffic(30, "8", 1000)},
        ),
        (
            "find --preset capacity --max-concurrency 101 --request-rate 8",
            "bench",
            {**CHAT, **traffic(152, "8", 2000)},
        ),
        ("find --scenario support", "bench", {**lengths(256, 128), **traffic(50, "20", 1000)}),
        ("bench --scenario content", "bench", {**lengths(512, 512), **traffic(200, "100", 2000)}),
        ("bench --scenario code", "bench", {**lengths(1024, 256), **traffic(20, "10", 500)}),
        ("find --scenario code --preset limit", "find", {**lengths(1024, 256), **LADDER}),
        ("find --scenario code --preset quick", "bench", {**lengths(1024, 256), **traffic(10, "inf", 50)}),
        ("find --scenario code --preset capacity", "bench", {**lengths(1024, 256), **traffic(30, "10", 2000)}),
        ("find --scenario code --preset realistic", "bench", {**lengths(1024, 256), **traffic(20, "10", 1000)}),
        # Whatever the user gives stands.
        (
            "find --preset quick --num-prompts 7 --random-input-len=9",
            "bench",
            {**lengths(9, 128), **traffic(10, "inf", 7)},
        ),
        ("find --preset limit --levels 1,2", "find", {**CHAT, **LADDER, "--levels": "1,2"}),
        ("bench --scenario code --request-rate 3", "bench", {**lengths(1024, 256), **traffic(20, "3", 500)}),
        ("find --preset quick --endpoint rerank", "bench", {**CHAT, **traffic(10, "inf", 50), "--endpoint": "rerank"}),
        (
            "find --preset stability --run runs/a",
            "bench",
            {**RUN.workload, **traffic(160, "10", 36_000)},
        ),
        (
            "find --preset stability --run=runs/a --duration-s 60",
            "bench",
            {**RUN.workload, **traffic(160, "10", 2000)},
        ),
        (
            "find --preset stability --run runs/a --num-prompts 5 --base-url http://b",
            "bench",
            {**RUN.workload, **traffic(160, "10", 5), "--base-url": "http://b"},
        ),
    ],
)
def test_what_stands_in_its_place(line: str, verb: str, flags: dict[str, str]) -> None:
    assert expanded(line) == (verb, flags)


def test_a_backend_of_the_users_own_keeps_its_endpoint() -> None:
    _, flags = expanded("bench --preset quick --backend vllm")
    assert "--endpoint" not in flags


def test_what_is_given_elsewhere_beats_a_preset() -> None:
    asked: list[str] = []

    def elsewhere(verb: str) -> dict[str, object]:
        asked.append(verb)
        return {"num-prompts": 7, "max-concurrency": "30", "request-rate": 2.5}

    def tokens(line: str) -> str:
        return shlex.join(expand(shlex.split(line), lambda folder: RUN, elsewhere).tokens)

    lengths = "--endpoint chat --random-input-len 512 --random-output-len 128"
    assert tokens("find --preset quick") == f"bench {lengths}"
    assert tokens("find --preset realistic") == f"bench {lengths}"
    assert tokens("bench --preset capacity") == f"bench {lengths} --max-concurrency 45"
    assert tokens("bench --preset capacity --max-concurrency 10") == f"bench {lengths} --max-concurrency 15"
    assert tokens("bench --preset limit --levels 1,2").startswith("find --endpoint chat --requests-per-slot 10")
    assert asked == ["bench", "bench", "bench", "bench", "find"]


def test_a_long_run_is_cut_to_what_fits_into_memory() -> None:
    day = expand(shlex.split("bench --preset stability --run r --duration-s 86400"), lambda folder: RUN)
    assert "--num-prompts 100000" in shlex.join(day.tokens)
    assert day.notes == (
        "--preset stability sends no more by itself: 100,000 requests last 10000 s of the 86400 s asked for; "
        "--num-prompts 864000 sends all",
    )
    asked = expand(
        shlex.split("bench --preset stability --run r --duration-s 86400 --num-prompts 864000"), lambda f: RUN
    )
    assert asked.notes == ()


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("find --preset fast", ("--preset fast", *PRESETS)),
        ("bench --scenario games", ("--scenario games", *SCENARIOS)),
        ("find --preset", ("--preset needs a value",)),
        ("find --preset --show", ("--preset needs a value",)),
        ("find --preset realistic", ("--preset realistic needs --request-rate",)),
        ("find --preset capacity --request-rate 5", ("needs --max-concurrency",)),
        ("find --preset capacity --max-concurrency 5", ("needs --request-rate",)),
        ("find --preset capacity --max-concurrency many --request-rate 5", ("--max-concurrency many",)),
        ("find --preset stability", ("needs --run",)),
        ("find --preset stability --run runs/a --duration-s 0", ("--duration-s 0",)),
        ("find --preset stability --run runs/a --scenario code", ("--scenario",)),
    ],
)
def test_what_cannot_be_expanded(line: str, names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        expand(shlex.split(line), lambda folder: RUN)
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize("line", ["", "--help", "find --base-url http://a", "report runs/a --preset quick", "bench"])
def test_everything_else_stays_as_it_is(line: str) -> None:
    expansion = expand(shlex.split(line), no_run)
    assert expansion.tokens == shlex.split(line)
    assert not expansion.show


def test_show_prints_the_command_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["find", "--preset", "quick", "--show", "--api-key", "secret"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("loadstone bench --endpoint chat ")
    assert "--num-prompts 50" in shown
    assert "secret" not in shown
    assert main(["find", "--levels", "1,2", "--show"]) == 0
    assert capsys.readouterr().out == "loadstone find --levels 1,2\n"


def test_an_unknown_preset_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["find", "--preset", "fast"]) == 2
    assert capsys.readouterr().err.startswith("loadstone: --preset fast is unknown")


@pytest.mark.parametrize("verb", ["find", "bench"])
def test_help_knows_them_all(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    flags = ["--scenario", "--show", "--run DIR", "--duration-s", *(f"--preset {name}" for name in PRESETS)]
    assert all(flag in text for flag in flags)
    assert " | ".join(SCENARIOS) in text


def test_the_run_below_whose_line_stability_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", vllm_like())
    run = measured_run(str(folder))
    assert (run.line, run.throughput_rps) == (220, level(11, 220).throughput_rps)
    assert run.workload["--base-url"] == "http://127.0.0.1:8001"
    assert run.workload["--random-input-len"] == "512"
    assert main(["find", "--preset", "stability", "--run", str(folder), "--show"]) == 0
    assert "--max-concurrency 176 " in capsys.readouterr().out


def test_a_run_without_a_line_cannot_be_stayed_below(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a folder"):
        measured_run(str(tmp_path / "none"))
    folder = write_run(tmp_path / "run", nothing_passed())
    with pytest.raises(UsageError, match="no line"):
        measured_run(str(folder))
