"""``--preset`` and ``--scenario``: the concurrency-testing guide's goals and businesses as whole command lines.

Pure: tokens in, tokens out, before the command line is parsed. What the user gives (as a flag, in the environment or in
a configuration file) beats what a preset says, which beats what a scenario says; so no flag reaches the parser twice.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadstone.core.errors import UsageError
from loadstone.core.settings import DEFAULT_LEVELS

Flags = dict[str, str]
"""Flag (with its dashes) and value, in the order they are to be shown."""

HELP = """\
Ready-made command lines for find and bench; any flag beside them overrides theirs.

--preset quick: does it work at all? bench, 50 requests, 10 at once.

--preset limit: find, up the ladder 1, 2, 5 … 1000.

--preset realistic: bench, 1000 requests at your --request-rate.

--preset capacity: bench, 2000 requests at your --request-rate and 1.5 × your --max-concurrency.

--preset stability --run DIR: bench for --duration-s 3600 the requests of the run in DIR, at 0.8 × the line that it \
found and 0.8 × its throughput there; at most 100,000 requests, unless --num-prompts says more.

--scenario support | content | code: bench at that business's concurrency, rate and lengths; with --preset its lengths \
and what the preset asks for.

--show: print the command that would run, and stop.
"""

_LENGTHS: Flags = {"--random-input-len": "512", "--random-output-len": "128"}
"""Of the guide's own scripts."""
_CHAT: Flags = {"--endpoint": "chat"}

PRESETS: dict[str, Flags] = {
    "quick": {"--max-concurrency": "10", "--request-rate": "inf", "--num-prompts": "50"},
    "limit": {"--levels": DEFAULT_LEVELS, "--requests-per-slot": "10"},
    "realistic": {"--num-prompts": "1000"},
    "capacity": {"--num-prompts": "2000"},
    "stability": {},
}


def _scenario(concurrency: int, rate: int, prompts: int, input_len: int, output_len: int) -> Flags:
    return {
        "--max-concurrency": str(concurrency),
        "--request-rate": str(rate),
        "--num-prompts": str(prompts),
        "--random-input-len": str(input_len),
        "--random-output-len": str(output_len),
    }


SCENARIOS: dict[str, Flags] = {
    "support": _scenario(50, 20, 1000, 256, 128),
    "content": _scenario(200, 100, 2000, 512, 512),
    "code": _scenario(20, 10, 500, 1024, 256),
}

_ASKED_FOR: dict[str, tuple[str, ...]] = {
    "realistic": ("--request-rate",),
    "capacity": ("--max-concurrency", "--request-rate"),
}
_GROWTH = 1.5
_CAUTION = 0.8
_DURATION_S = 3600.0
_FEWEST_LONG_RUN_PROMPTS = 2000
_MOST_LONG_RUN_PROMPTS = 100_000
"""All requests are built before the first is sent and all replies kept: more than this takes gigabytes."""


@dataclass(frozen=True)
class MeasuredRun:
    """What a finished run tells the stability preset."""

    line: int
    throughput_rps: float
    """At the line."""
    workload: Mapping[str, str]
    """Flags that send the same requests to the same server."""


ReadRun = Callable[[str], MeasuredRun]
"""Raises UsageError where the folder holds no finished run with a line."""

Elsewhere = Callable[[str], Mapping[str, Any]]
"""What is given for a verb outside the command line, by the names of flags without their dashes."""


@dataclass(frozen=True)
class Expansion:
    tokens: list[str]
    """The command line to parse."""
    show: bool = False
    """Print it instead."""
    notes: tuple[str, ...] = ()
    """Sentences that a person should read first."""


def _nothing(verb: str) -> dict[str, Any]:
    return {}


def expand(tokens: Sequence[str], read_run: ReadRun, elsewhere: Elsewhere = _nothing) -> Expansion:
    """Replace ``--preset``, ``--scenario`` and ``--show`` of ``find`` and ``bench`` by the flags they stand for.

    Raises UsageError for a name that is none, and for what a preset asks for and does not get.
    """
    if not tokens or tokens[0] not in ("find", "bench"):
        return Expansion(list(tokens))
    rest = list(tokens[1:])
    show = _take_switch(rest, "--show")
    preset, scenario = _take_name(rest, "--preset", PRESETS), _take_name(rest, "--scenario", SCENARIOS)
    if not preset and not scenario:
        return Expansion([tokens[0], *rest], show)
    verb = "find" if preset == "limit" else "bench"
    outside = {f"--{name}": str(value) for name, value in elsewhere(verb).items()}
    notes: tuple[str, ...] = ()
    if preset == "stability":
        flags, notes = _stability(rest, scenario, read_run)
    else:
        flags = _layers(rest, preset, scenario, outside)
    given = _given(rest) | outside.keys()
    if given & {"--endpoint", "--backend"}:
        flags.pop("--endpoint", None)
    if "--num-prompts" in given:
        notes = ()
    added = [word for flag, value in flags.items() if flag not in given for word in (flag, value)]
    return Expansion([verb, *added, *rest], show, notes)


def _layers(rest: list[str], preset: str, scenario: str, outside: Flags) -> Flags:
    """What preset and scenario say together, before the user's own flags."""
    business = SCENARIOS.get(scenario, {})
    if preset == "limit":
        return _CHAT | PRESETS[preset] | _LENGTHS | {f: v for f, v in business.items() if f in _LENGTHS}
    flags = _CHAT | _LENGTHS | business | PRESETS.get(preset, {})
    given = _given(rest) | outside.keys()
    for flag in _ASKED_FOR.get(preset, ()):
        if flag not in given and flag not in flags:
            raise UsageError(f"--preset {preset} needs {flag}: {_WHY[flag]}")
    if preset == "capacity":
        planned = _take_value(rest, "--max-concurrency") or (flags | outside)["--max-concurrency"]
        grown = math.ceil(_GROWTH * _number("--max-concurrency", planned))
        rest[:0] = ["--max-concurrency", str(grown)]
    return flags


_WHY = {
    "--request-rate": "the requests per second that you expect",
    "--max-concurrency": "the concurrency that you plan for; it runs at 1.5 × that",
}


def _stability(rest: list[str], scenario: str, read_run: ReadRun) -> tuple[Flags, tuple[str, ...]]:
    """(what it says before the user's own flags, what is to be said of it)"""
    if scenario:
        raise UsageError("--scenario does not go with --preset stability, which repeats the requests of its run")
    folder = _take_value(rest, "--run")
    if not folder:
        raise UsageError("--preset stability needs --run: the folder of the run whose line it stays below")
    duration_s = _number("--duration-s", _take_value(rest, "--duration-s") or str(_DURATION_S))
    run = read_run(folder)
    rate_rps = float(f"{_CAUTION * run.throughput_rps:.4g}")
    wanted = max(_FEWEST_LONG_RUN_PROMPTS, math.ceil(rate_rps * duration_s))
    prompts = min(wanted, _MOST_LONG_RUN_PROMPTS)
    flags = {
        **_CHAT,
        **run.workload,
        "--max-concurrency": str(max(1, math.floor(_CAUTION * run.line))),
        "--request-rate": f"{rate_rps:g}",
        "--num-prompts": str(prompts),
    }
    if prompts == wanted:
        return flags, ()
    lasts = f"{prompts:,} requests last {prompts / rate_rps:.0f} s of the {duration_s:g} s asked for"
    return flags, (f"--preset stability sends no more by itself: {lasts}; --num-prompts {wanted} sends all",)


def _number(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageError(f"{flag} {text}: give a number above 0")
    return value


def _given(words: Iterable[str]) -> set[str]:
    """Names of the flags among ``words``."""
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def _take_switch(words: list[str], flag: str) -> bool:
    if flag not in words:
        return False
    words.remove(flag)
    return True


def _take_value(words: list[str], flag: str) -> str:
    """The value of ``flag``, taken out of ``words`` in either spelling; empty where it is not there."""
    for position, word in enumerate(words):
        if word.startswith(f"{flag}="):
            del words[position]
            return word.partition("=")[2]
        if word == flag:
            if position + 1 == len(words) or words[position + 1].startswith("--"):
                raise UsageError(f"{flag} needs a value")
            del words[position]
            return words.pop(position)
    return ""


def _take_name(words: list[str], flag: str, known: Mapping[str, Flags]) -> str:
    name = _take_value(words, flag)
    if name and name not in known:
        raise UsageError(f"{flag} {name} is unknown: choose {', '.join(known)}")
    return name
