"""``judge``: the verdict of a run again, from its records and under any rules."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from loadstone.core.errors import UsageError
from loadstone.core.limits import LimitsFile
from loadstone.core.verdict import RunVerdict
from loadstone.measure.answer import Subject, limits_of
from loadstone.measure.book import RunBook
from loadstone.measure.find import search_settings, settings_of
from loadstone.measure.runs import RunFolder
from loadstone.measure.steady import LevelData


@dataclass(frozen=True)
class Judged:
    """A folder and what is to be said of it; nothing of it is written yet."""

    folder: RunFolder
    document: dict[str, Any]
    """``run.toml``, with the rules that it was judged by."""
    verdict: RunVerdict
    limits: LimitsFile | None
    """None where nothing passed."""

    def write(self) -> None:
        """``run.toml``, ``verdict.json`` and ``limits.toml``: a report must draw the limits that were applied."""
        self.folder.write_run(self.document)
        self.folder.write_verdict(self.verdict)
        self.folder.write_limits(self.limits)


def judge_run(folder: RunFolder, overrides: Mapping[str, Any]) -> Judged:
    """Judge a run folder under its own rules, ``overrides`` (fields of ``RuleSettings``) in place of some.

    Raises UsageError for a folder that cannot be read or holds no finished level, and for rules that make no sense.
    """
    document = folder.read_run()
    settings = settings_of(document, str(folder.path))
    rules = replace(settings.rules, **overrides)
    levels = folder.levels()
    if not levels:
        remedy = f"go on with it by: loadstone find --resume {folder.path}"
        raise UsageError(f"{folder.path} holds no finished level; {remedy}")
    search = search_settings(rules, settings.ladder, levels[0].meta.streams)
    book = RunBook(search, levels)
    verdict = book.verdict()
    limits = limits_of(
        verdict,
        levels,
        search,
        _subject(folder, document),
        settings.server.request_timeout_s,
        _measured_at(document, levels[-1]),
    )
    return Judged(folder, under_rules(document, asdict(rules)), verdict, limits)


def under_rules(document: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, Any]:
    """``run.toml`` with these rules; those that the run was measured under are kept beside them."""
    settings = document["settings"]
    # TOML knows no tuples.
    plain = {name: list(rule) if isinstance(rule, tuple) else rule for name, rule in rules.items()}
    if plain == settings["rules"]:
        return dict(document)
    # Those kept from an earlier judgement stay; they come last, as a reader takes the first rule that it meets.
    kept = {"measured_under": settings["rules"]} if "measured_under" not in document else {}
    return {**document, "settings": {**settings, "rules": plain}, **kept}


def _subject(folder: RunFolder, document: Mapping[str, Any]) -> Subject:
    server = document.get("server", {})
    return Subject(
        model=server.get("model", ""),
        endpoint=server.get("endpoint", ""),
        base_url=server.get("base_url", ""),
        run=str(folder.path),
        through_gate=server.get("through_gate", False),
    )


def _measured_at(document: Mapping[str, Any], last: LevelData) -> datetime:
    """When the last level began: limits grow old from the measurement, not from its judgement."""
    text = last.meta.started_at or str(document.get("created_at", ""))
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        raise UsageError(f"run.toml: created_at = {text!r} is no time; restore it") from None
