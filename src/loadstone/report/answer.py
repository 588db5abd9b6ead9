"""The answer in plain words, for the terminal and the page alike. Pure: a verdict in, sentences out."""

import msgspec

from loadstone.core.verdict import NOT_ENDED, LevelRow, RunVerdict, Verdict

_COARSE_LADDER = (
    "Half of the first failing level is what the concurrency-testing guide's script advises: on a coarse ladder one "
    "only knows that the line lies somewhere below the level that failed. "
)

CLIENT_MEANING = (
    "Could the load generator's own delays have changed a verdict? Late sends, empty slots, reads behind the kernel's "
    "stamp, a busy core or a wait for one would make the server look slower than it is; where they could have flipped "
    "the verdict, the level is INVALID and says nothing about the server."
)

_BREAKS = {
    "success": "too few requests succeed",
    "ttft": "the time to first token passes its limit",
    "e2el": "the end-to-end time passes its limit",
    "gain": "nothing breaks, but more concurrency hardly adds throughput",
}

_QUIETER = "Run the generator on a faster or quieter machine to go on."
_LOWER_BOUND = {
    "ladder": "No level failed: the line may be higher. Add higher --levels to find it.",
    "client": "The next level was INVALID, because the load generator was the bottleneck: the line may be higher. "
    + _QUIETER,
}
_NOTHING_KNOWN = {
    "client": "At the lowest level the load generator was the bottleneck, which says nothing about the server. "
    + _QUIETER,
    "": "Every level that was run stayed too close to a limit to tell; more --requests-per-slot may settle it.",
}


class Answer(msgspec.Struct, frozen=True):
    """What a reader wants to know first. Each text is a sentence or two; empty where there is nothing to say."""

    headline: str
    recommendation: str
    binding: str
    certainty: str
    claim: str
    half: str
    why_half: str
    asides: list[str]


def number(value: float | None, unit: str = "") -> str:
    """Three significant figures, whole numbers from 100 on, an en dash for None; ``unit`` after a space."""
    if value is None:
        return "–"
    size = abs(value)
    digits = 0 if size >= 100 or value == 0 else 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{value:,.{digits}f}" if size >= 0.001 or value == 0 else f"{value:.1e}"
    return f"{text} {unit}".rstrip()


def percent(share: float) -> str:
    """At most one decimal: 0.953 reads "95.3 %", 1 reads "100 %"."""
    return f"{round(share * 100, 1):g} %"


def answer(verdict: RunVerdict) -> Answer:
    """Put ``verdict`` into words."""
    return Answer(
        headline=_headline(verdict),
        recommendation=_recommendation(verdict),
        binding=_binding(verdict),
        certainty=_certainty(verdict),
        claim=verdict.claim,
        half=_half(verdict),
        why_half=_why_half(verdict),
        asides=_asides(verdict),
    )


def judged(levels: list[LevelRow]) -> list[LevelRow]:
    """One row for each concurrency, ascending: the one that ran in full with most requests; INVALID ones left out."""
    best: dict[int, LevelRow] = {}
    for row in levels:
        if row.verdict is not Verdict.INVALID and _weight(row) >= _weight(best.get(row.concurrency)):
            best[row.concurrency] = row
    return [best[concurrency] for concurrency in sorted(best)]


def _weight(row: LevelRow | None) -> tuple[bool, int]:
    return (False, -1) if row is None else (not row.stopped_early, row.requests)


def _headline(verdict: RunVerdict) -> str:
    line = verdict.measured_max_concurrency
    if line is not None:
        at_least = "at least " if verdict.binding in _LOWER_BOUND else ""
        return f"This server takes {at_least}{line:,} concurrent request{'s' if line != 1 else ''}."
    if server_failed(verdict):
        return "No level passed: the server failed the rules at the lowest concurrency tried."
    return "No level could be judged, so there is no answer yet."


def _recommendation(verdict: RunVerdict) -> str:
    line, recommended = verdict.measured_max_concurrency, verdict.recommended_concurrency
    if line is None or recommended is None:
        return ""
    text = f"Run it at {recommended:,} ({percent(recommended / line)} of the line)."
    if verdict.recommended_throughput_rps is None:
        return text
    text += f" Measured there: {number(verdict.recommended_throughput_rps)} req/s"
    at_line = next((row.throughput_rps for row in judged(verdict.levels) if row.concurrency == line), None)
    return text + (
        f", {percent(verdict.recommended_throughput_rps / at_line)} of what the line gives." if at_line else "."
    )


def server_failed(verdict: RunVerdict) -> bool:
    """Some level failed by the server's doing; else no level passed because none could be judged."""
    return any(row.verdict is Verdict.FAIL for row in verdict.levels)


def _binding(verdict: RunVerdict) -> str:
    if verdict.measured_max_concurrency is None and verdict.binding in _NOTHING_KNOWN:
        return _NOTHING_KNOWN[verdict.binding] if verdict.levels else ""
    if verdict.binding == "ladder" and _not_ended(verdict):
        return "No level that was run has failed: the line may be higher."
    if verdict.binding in _LOWER_BOUND:
        return _LOWER_BOUND[verdict.binding]
    kind, _, name = verdict.binding.partition(":")
    plain_name = name.replace("_", " ")
    by_name = {"resource": f"the server runs out of {plain_name}", "slo": f"{plain_name} passes its limit"}
    why = by_name.get(kind) or _BREAKS.get(kind, verdict.binding)
    text = f"Above it {why}." if verdict.measured_max_concurrency is not None else f"{why[:1].upper()}{why[1:]}."
    breach = _breach(verdict)
    return f"{text} At {breach.concurrency:,}: {breach.reason}" if breach else text


def _breach(verdict: RunVerdict) -> LevelRow | None:
    """The lowest level above the line that failed by the binding rule."""
    line = verdict.measured_max_concurrency or 0
    rows = (row for row in verdict.levels if row.verdict is Verdict.FAIL and row.rule == verdict.binding)
    return min((row for row in rows if row.concurrency > line), key=lambda row: row.concurrency, default=None)


def _certainty(verdict: RunVerdict) -> str:
    if verdict.measured_max_concurrency is None:
        return ""
    if verdict.non_monotone:
        return "Not monotone: a level failed, again when repeated, below one that passed; the answer lies below it."
    if verdict.sure:
        return "Sure: the deciding levels are further from their limit than their 95 % intervals are wide."
    if _not_ended(verdict):
        return f"Not sure: {NOT_ENDED}."
    return "Not sure: a deciding level has no 95 % interval that clears its limit; more requests would settle it."


def _not_ended(verdict: RunVerdict) -> bool:
    return any(note.startswith(NOT_ENDED) for note in verdict.notes)


def _half(verdict: RunVerdict) -> str:
    if verdict.half_of_failing is None:
        return ""
    return f"Half of the first failing level would be {verdict.half_of_failing:,}."


def _why_half(verdict: RunVerdict) -> str:
    line, recommended = verdict.measured_max_concurrency, verdict.recommended_concurrency
    if line is None or recommended is None or verdict.half_of_failing is None:
        return ""
    if verdict.binding in _LOWER_BOUND:
        return _COARSE_LADDER + f"Here {line:,} was measured and held; the recommendation stays on measured ground."
    share = percent(recommended / line)
    return _COARSE_LADDER + f"Here the line itself was measured: {share} of it is the same caution on better knowledge."


def _asides(verdict: RunVerdict) -> list[str]:
    texts = []
    if verdict.peak_throughput_rps is not None:
        texts.append(f"Highest throughput measured: {number(verdict.peak_throughput_rps)} req/s.")
    if (best := verdict.best_efficiency) is not None:
        texts.append(
            f"Best efficiency: {number(best.rps_per_slot)} req/s per slot at concurrency {best.concurrency:,}."
        )
    # Where it binds it is the line itself, and the claim tells its interval.
    if (gain := verdict.gain_line) is not None and verdict.binding != "gain":
        interval = "" if gain.low == gain.high else f" (between {gain.low:,} and {gain.high:,})"
        texts.append(f"Gain line: {gain.concurrency:,}{interval}; beyond it more concurrency hardly adds throughput.")
    return texts
