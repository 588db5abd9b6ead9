"""Levels made by hand: what the pure parts of ``measure`` are told, without a server."""

from collections.abc import Sequence
from typing import Any

import msgspec

from loadstone.core.clock import Clock, Timer
from loadstone.core.records import Outcome, RequestRecord
from loadstone.core.target import Break, Exchange
from loadstone.core.verdict import LevelKind
from loadstone.measure.steady import LevelData, LevelMeta
from loadstone.measure.telemetry import ServerFigures


def record(
    index: int,
    sent_s: float,
    *,
    e2e_s: float = 1.0,
    ttft_s: float | None = 0.1,
    outcome: Outcome = Outcome.OK,
    **more: Any,
) -> RequestRecord:
    """One request; by default a success of one second with its first token after 100 ms."""
    return RequestRecord(
        index=index,
        slot=more.pop("slot", 0),
        planned_s=more.pop("planned_s", sent_s),
        sent_s=sent_s,
        end_s=sent_s + e2e_s,
        outcome=outcome,
        ttft_s=ttft_s if outcome in (Outcome.OK, Outcome.CUT) else None,
        **more,
    )


def meta(concurrency: int, window_s: tuple[float, float], **more: Any) -> LevelMeta:
    return LevelMeta(
        ordinal=more.pop("ordinal", 1),
        kind=more.pop("kind", LevelKind.LADDER),
        concurrency=concurrency,
        planned_requests=more.pop("planned_requests", 8 * concurrency),
        window_start_s=window_s[0],
        window_end_s=window_s[1],
        **more,
    )


def level(
    concurrency: int,
    *,
    waves: int = 12,
    e2e_s: float = 1.0,
    ttft_s: Sequence[float] = (0.1,),
    failed: Sequence[Outcome] = (),
    server: ServerFigures | None = None,
    **more: Any,
) -> LevelData:
    """A closed loop of equal requests, the slots opened evenly; the window leaves one wave at either end.

    ``ttft_s`` is repeated over the judged requests; the first ``len(failed)`` of them, evenly spread, fail.
    """
    records = []
    judged = (waves - 2) * concurrency
    every = judged // len(failed) if failed else 0
    for index in range(waves * concurrency):
        sent_s = index * e2e_s / concurrency
        place = index - concurrency
        outcome = Outcome.OK
        if every and 0 <= place < judged and place % every == 0 and place // every < len(failed):
            outcome = failed[place // every]
        records.append(
            record(
                index,
                sent_s,
                e2e_s=e2e_s,
                ttft_s=ttft_s[place % len(ttft_s)],
                outcome=outcome,
                slot=index % concurrency,
            )
        )
    start_s = e2e_s - 0.4 * e2e_s / concurrency
    end_s = (waves - 1) * e2e_s - 0.4 * e2e_s / concurrency
    return LevelData(meta(concurrency, (start_s, end_s), **more), records, server or ServerFigures())


def replace_meta(data: LevelData, **changes: Any) -> LevelData:
    return LevelData(msgspec.structs.replace(data.meta, **changes), data.records, data.server)


class FakeTarget:
    """Answers each request after a time of its own; remembers what was started, in order."""

    def __init__(self, clock: Clock, took_ns: int = 1_000_000_000, delay_ns: int = 0) -> None:
        self.started: list[Exchange] = []
        self.took_ns = took_ns
        self.failing: dict[int, Break | int] = {}
        """By position in ``started``: how it fails, at once."""
        self.hanging: set[int] = set()
        self._clock = clock
        self._delay_ns = delay_ns
        """Between ``start`` and the write."""
        self._timers: dict[Exchange, Timer] = {}
        self._done: dict[Exchange, Any] = {}

    @property
    def in_flight(self) -> int:
        return len(self._done)

    def start(self, exchange: Exchange, done: Any) -> None:
        place = len(self.started)
        self.started.append(exchange)
        exchange.sent_ns = self._clock.now_ns() + self._delay_ns
        self._done[exchange] = done
        how = self.failing.get(place)
        if place not in self.hanging:
            after_ns = self.took_ns if how is None else 0
            end_ns = exchange.sent_ns + after_ns
            self._timers[exchange] = self._clock.call_at(end_ns, lambda: self._end(exchange, how))

    def cancel(self, exchange: Exchange) -> None:
        if exchange in self._done:
            if exchange in self._timers:
                self._timers[exchange].cancel()
            self._end(exchange, Break.CUT)

    def _end(self, exchange: Exchange, how: Break | int | None) -> None:
        exchange.end_ns = self._clock.now_ns()
        exchange.status = how if isinstance(how, int) and not isinstance(how, Break) else 200
        exchange.broken = how if isinstance(how, Break) else None
        self._done.pop(exchange)(exchange)
