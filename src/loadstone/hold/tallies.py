"""What ended requests are counted in: altogether, by second, by client. All of it in bounded memory."""

import heapq
from collections import deque

from loadstone.core.outcomes import FAILED, REFUSED, Outcome

_MOST_CLIENTS = 1024
# An enumeration's members are slow to read in Python 3.11, and this one is read for every request.
_OK = Outcome.OK

_COUNTS = ("admitted", "failed", "ok", "output_tokens", "refused", "requests")


class Tally:
    """Counts of ended requests."""

    __slots__ = _COUNTS

    def __init__(self) -> None:
        self.requests = 0
        self.admitted = 0
        self.ok = 0
        self.refused = 0
        self.failed = 0
        self.output_tokens = 0

    def add(self, outcome: Outcome, admitted: bool, output_tokens: int) -> None:
        """One more."""
        self.requests += 1
        if admitted:
            self.admitted += 1
            self.output_tokens += output_tokens
        if outcome is _OK:
            self.ok += 1
        elif outcome in REFUSED:
            self.refused += 1
        elif outcome in FAILED:
            self.failed += 1

    def copy(self) -> "Tally":
        return self - Tally()

    def __add__(self, other: "Tally") -> "Tally":
        return _combined(self, other, 1)

    def __sub__(self, other: "Tally") -> "Tally":
        return _combined(self, other, -1)

    def error_rate(self) -> float:
        """Failures for each admitted request. A failure in the queue was never admitted, yet no rate exceeds 1."""
        return self.failed / max(self.admitted, self.failed, 1)

    def refusal_rate(self) -> float:
        return self.refused / max(self.requests, 1)

    def __repr__(self) -> str:
        return f"<Tally {self.requests} requests, {self.ok} ok, {self.refused} refused, {self.failed} failed>"


def _combined(one: Tally, other: Tally, sign: int) -> Tally:
    combined = Tally()
    for name in _COUNTS:
        setattr(combined, name, getattr(one, name) + sign * getattr(other, name))
    return combined


class Past:
    """What a growing tally was at the start of each of the last ``span_s`` seconds in which it grew."""

    def __init__(self, span_s: int) -> None:
        self._span_s = span_s
        self._marks: deque[tuple[int, Tally]] = deque()
        self.next_mark_s = 0.0
        """From when on ``mark`` wants to be called before the tally grows."""

    def mark(self, now_s: float, tally: Tally) -> None:
        """Note what the tally is before it grows in a second that is new; ``now_s`` never goes back."""
        second = int(now_s)
        while self._marks and self._marks[0][0] < second - self._span_s:
            self._marks.popleft()
        self._marks.append((second, tally.copy()))
        self.next_mark_s = second + 1.0

    def growth(self, tally: Tally, span_s: float, now_s: float) -> Tally:
        """By how much the tally has grown in the second under way and the ``span_s`` before it."""
        since_s = int(now_s) - span_s
        # Nothing grew between `since_s` and the first mark after it.
        before = next((marked for second, marked in self._marks if second >= since_s), tally)
        return tally - before

    def __repr__(self) -> str:
        return f"<Past {len(self._marks)} marks in {self._span_s} s>"


class Clients:
    """Who asks most, over the last one to two periods.

    Theory of operation. Two generations of tallies by client: when the newer is a period old it becomes the older, and
    the older is forgotten, so that whoever was busy yesterday doesn't hide who is busy now. A generation that has grown
    to 1,024 clients loses the quieter half: a crowd of clients with a request each cannot push out a busy one.
    """

    def __init__(self, period_s: float, now_s: float) -> None:
        self._period_s = period_s
        self._began_s = now_s
        self._older_began_s = now_s
        self._newer: dict[str, Tally] = {}
        self._older: dict[str, Tally] = {}

    def at(self, client: str, now_s: float) -> Tally:
        """The client's tally of now."""
        if now_s - self._began_s >= self._period_s:
            self._turn(now_s)
        tally = self._newer.get(client)
        if tally is None:
            if len(self._newer) >= _MOST_CLIENTS:
                busier = sorted(self._newer.items(), key=lambda item: item[1].requests, reverse=True)
                self._newer = dict(busier[: _MOST_CLIENTS // 2])
            tally = self._newer[client] = Tally()
        return tally

    def busiest(self, most: int, now_s: float) -> list[tuple[str, Tally]]:
        """The clients with most requests since ``since_s``, the busiest first."""
        if now_s - self._began_s >= self._period_s:
            self._turn(now_s)
        none = Tally()
        requests = {
            client: self._older.get(client, none).requests + self._newer.get(client, none).requests
            for client in {**self._older, **self._newer}
        }
        return [
            (client, self._older.get(client, none) + self._newer.get(client, none))
            for client in heapq.nlargest(most, requests, key=requests.__getitem__)
        ]

    @property
    def since_s(self) -> float:
        """When counting began for what ``busiest`` tells."""
        return self._older_began_s

    def _turn(self, now_s: float) -> None:
        """A newer generation begins; one that has stood for two periods is no news at all."""
        fresh = now_s - self._began_s < 2 * self._period_s
        self._older, self._newer = (self._newer if fresh else {}), {}
        self._older_began_s = self._began_s if fresh else now_s
        self._began_s = now_s

    def __repr__(self) -> str:
        return f"<Clients {len(self._older)} before, {len(self._newer)} now>"
