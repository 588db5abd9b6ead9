"""The life of one replica: when it is up, when it is given up, when it is started again. Pure; ``now_ns`` an argument.

Theory of operation::

    STARTING ──/health answers──▶ UP ──its process ends──────────────▶ BACKING_OFF ──time over──▶ STARTING
       │                           └──no answer for long, or stalled──▶ STUCK ──ended by us──▶ BACKING_OFF
       └──ends or is overdue, never having been up──▶ FAILED

What has never been up cannot start: starting it again would only repeat the message. What has been up is started again
for ever, after 1 s, 2 s, 4 s, … at most 30 s, and from 1 s again once it has been up for a minute.
"""

import enum
from dataclasses import dataclass

_NS = 1_000_000_000
_LEAST_PROBES = 3
"""Unanswered, before an engine counts as stuck: one alone may have met a busy moment of ours."""


class State(enum.StrEnum):
    """Of one replica; the values are what /health says."""

    STARTING = "starting"
    UP = "up"
    STUCK = "stuck"
    BACKING_OFF = "backing_off"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Patience:
    """How long things may take."""

    first_backoff_s: float = 1.0
    most_backoff_s: float = 30.0
    reset_after_s: float = 60.0
    """Up for so long, and the back-off begins anew."""
    stuck_after_s: float = 30.0
    """Alive, but without an answer on /health."""
    probe_every_s: float = 2.0
    stop_s: float = 8.0
    """For an engine to end by itself, and again after SIGTERM."""


class Lifecycle:
    """Told what happens to a replica's process; says in ``state`` what that makes of it."""

    def __init__(self, patience: Patience, ready_timeout_s: float) -> None:
        self.state = State.STOPPED
        self.restarts = 0
        self.up_since_ns: int | None = None
        self.restart_at_ns: int | None = None
        self._patience = patience
        self._ready_timeout_ns = int(ready_timeout_s * _NS)
        self._was_up = False
        self._started_ns = 0
        self._answered_ns = 0
        self._unanswered = 0
        self._backoff_ns = 0

    def __repr__(self) -> str:
        return f"<Lifecycle {self.state}, {self.restarts} restarts>"

    def started(self, now_ns: int) -> None:
        """Its process has been started, or is about to be."""
        if self.restart_at_ns is not None:
            self.restarts += 1
            self.restart_at_ns = None
        self.state = State.STARTING
        self._started_ns = now_ns

    def answered(self, now_ns: int) -> bool:
        """A probe was answered; True where it has come up by that."""
        self._answered_ns, self._unanswered = now_ns, 0
        if self.state is not State.STARTING:
            return False
        self.state, self._was_up, self.up_since_ns = State.UP, True, now_ns
        return True

    def unanswered(self, now_ns: int) -> bool:
        """A probe was not answered; True where that is to be borne no longer: end its process."""
        self._unanswered += 1
        if self.state is State.STARTING:
            return now_ns - self._started_ns >= self._ready_timeout_ns
        long = now_ns - self._answered_ns >= self._patience.stuck_after_s * _NS
        return long and self._unanswered >= _LEAST_PROBES and self.stalled()

    def stalled(self) -> bool:
        """It gives nothing although requests run; True where it is up, and so now stuck: end its process."""
        if self.state is not State.UP:
            return False
        self.state = State.STUCK
        return True

    def ended(self, now_ns: int) -> None:
        """Its process is gone."""
        if not self._was_up:
            self.state = State.FAILED
            return
        if self.up_since_ns is not None and now_ns - self.up_since_ns >= self._patience.reset_after_s * _NS:
            self._backoff_ns = 0
        first_ns, most_ns = int(self._patience.first_backoff_s * _NS), int(self._patience.most_backoff_s * _NS)
        self._backoff_ns = min(2 * self._backoff_ns or first_ns, most_ns)
        self.restart_at_ns = now_ns + self._backoff_ns
        self.state, self.up_since_ns = State.BACKING_OFF, None

    def stopped(self) -> None:
        """It was stopped on purpose; one that has failed stays so."""
        if self.state is not State.FAILED:
            self.state = State.STOPPED
        self.up_since_ns = self.restart_at_ns = None
