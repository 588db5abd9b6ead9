"""Why an engine ended, from its exit status and the end of its log: one line with the remedy. Pure."""

import re
import signal
from dataclasses import dataclass

from loadstone.serve.symptoms import ANYWHERE, LAST_WORDS, LESS_HOST_MEMORY, Symptom

_MOST_CHARACTERS = 300


@dataclass(frozen=True)
class Diagnosis:
    """What happened and what to do about it."""

    cause: str
    remedy: str = ""
    """Empty where none is known."""

    def __str__(self) -> str:
        return f"{self.cause}: {self.remedy}" if self.remedy else self.cause


_SIGNALS = {
    signal.SIGKILL: Diagnosis(
        "killed with SIGKILL, most likely by the kernel for want of memory (dmesg tells)", LESS_HOST_MEMORY
    ),
    signal.SIGILL: Diagnosis(
        "it used an instruction that this processor does not have", "install a build for this processor"
    ),
    signal.SIGTERM: Diagnosis("somebody ended it with SIGTERM"),
}

_EXCEPTION = re.compile(
    r"(?:^|\] |\) )((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|NotFound)(?:: .*)?)$", re.MULTILINE
)
_VALUE_ERROR = re.compile(r"^\s*(?:\(.*?\) )?\s*Value error, (.*?)(?: \[type=.*)?$", re.MULTILINE)
"""Pydantic's, in the line after its exception."""
_HARMLESS = re.compile(r"^(?:\([^)]*\) )*(?:DEBUG|INFO|WARNING)\b.*\n?", re.MULTILINE)
_SAID_ELSEWHERE = re.compile(r"root cause|EngineCore encountered an issue", re.IGNORECASE)
_OURS = re.compile(r"^loadstone(?:\.\w+)*: ")


def diagnose(status: int | None, log: str) -> Diagnosis:
    """Why an engine ended or did not get ready.

    ``status``: its exit status; of a signal minus its number, or 128 plus it; None where it had not ended.
    ``log``: the end of what it wrote.
    """
    log = _HARMLESS.sub("", log) or log
    last = _last_words(log)
    for text, symptoms in ((log, ANYWHERE), (last, LAST_WORDS)):
        for symptom in symptoms:
            if match := symptom.pattern.search(text):
                return _told(symptom, match)
    number = _signal_of(status)
    if number in _SIGNALS:
        return _SIGNALS[number]
    if _OURS.match(last):  # one line with its remedy already
        return Diagnosis(_OURS.sub("", last))
    return Diagnosis(f"{_way(status, number)}; {f'its last words: {_cut(last)}' if last else 'it wrote nothing'}")


def _told(symptom: Symptom, match: re.Match[str]) -> Diagnosis:
    said = [group for group in match.groups() if group is not None] or [""]
    return Diagnosis(symptom.cause.format(*said).replace(" ()", "").rstrip(), symptom.remedy.format(*said))


def _signal_of(status: int | None) -> signal.Signals | None:
    if status is None or 0 <= status <= 128:
        return None
    try:
        return signal.Signals(-status if status < 0 else status - 128)
    except ValueError:
        return None


def _way(status: int | None, number: signal.Signals | None) -> str:
    if status is None:
        return "it still ran"
    return f"it crashed with {number.name}" if number is not None else f"it ended with status {status}"


def _last_words(log: str) -> str:
    """The last exception, a hint at another only where there are no others, or the last line; empty: there is none."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if lines and _OURS.match(lines[-1]):
        return lines[-1]
    found = _VALUE_ERROR.findall(log) or _EXCEPTION.findall(log)
    exceptions = [text for text in found if not _SAID_ELSEWHERE.search(text)] or found
    return str(exceptions[-1]).strip() if exceptions else (lines or [""])[-1]


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
