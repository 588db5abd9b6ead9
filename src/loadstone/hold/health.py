"""Is an upstream to be sent anything? A pure state machine for one upstream, ``now_ns`` an argument.

Theory of operation::

    UP ──connect refused, or 3 probes fail──▶ DOWN ──a probe is answered──▶ UP (slow start)
     │                                          ▲
     └──5 broken replies in a row──▶ OPEN ──cool-down over, probe answered──▶ HALF_OPEN ──a good reply──▶ UP
                                      ▲                                           │
                                      └──────────a broken reply, twice as long────┘

A dead server has the fewest requests in flight, so whoever balances by them would send it everything: the first
refused connection marks it down. A broken reply is a connection that ended within it, or a 502 or 504. A 500 may be one
client's bad request, and 429 and 503 say busy, not broken: neither opens the circuit. A single upstream is held to the
same rules.
"""

import enum

BROKEN_IN_A_ROW = 5
PROBES_IN_A_ROW = 3
COOL_DOWN_NS = 2_000_000_000
MOST_COOL_DOWN_NS = 60_000_000_000
PROBE_UP_EVERY_NS = 5_000_000_000
PROBE_DOWN_EVERY_NS = 500_000_000
MOST_PROBE_DOWN_NS = 5_000_000_000


class Condition(enum.Enum):
    """Values are what /stats says."""

    UP = "up"
    DOWN = "down"
    OPEN = "open circuit"
    HALF_OPEN = "half open"


class Health:
    """Every method that may change the condition returns True where whether it takes requests has changed."""

    __slots__ = ("_broken", "_cool_down_ns", "_failed_probes", "_retry_ns", "condition", "next_probe_ns", "reason")

    def __init__(self, now_ns: int) -> None:
        self.condition = Condition.UP
        self.reason = ""
        self.next_probe_ns = now_ns
        self._broken = 0
        self._failed_probes = 0
        self._cool_down_ns = COOL_DOWN_NS
        self._retry_ns = 0

    def __repr__(self) -> str:
        return f"<Health {self.condition.value}{': ' if self.reason else ''}{self.reason}>"

    @property
    def takes_requests(self) -> bool:
        return self.condition in (Condition.UP, Condition.HALF_OPEN)

    def good_reply(self) -> None:
        """A reply came back whole."""
        self._broken = 0
        if self.condition is Condition.HALF_OPEN:
            self.condition = Condition.UP
            self.reason = ""
            self._cool_down_ns = COOL_DOWN_NS

    def no_connection(self, reason: str, now_ns: int) -> bool:
        """It could not be connected to."""
        return self._close_for(Condition.DOWN, reason, now_ns)

    def broken_reply(self, reason: str, now_ns: int) -> bool:
        """A request was sent and did not come back whole."""
        self._broken += 1
        if self.condition is Condition.HALF_OPEN:
            self._cool_down_ns = min(2 * self._cool_down_ns, MOST_COOL_DOWN_NS)
            return self._open(reason, now_ns)
        if self.condition is Condition.UP and self._broken >= BROKEN_IN_A_ROW:
            return self._open(f"{self._broken} broken replies in a row, the last: {reason}", now_ns)
        return False

    def probe_answered(self, now_ns: int) -> bool:
        """It answered a health probe."""
        self._failed_probes = 0
        self.next_probe_ns = now_ns + PROBE_UP_EVERY_NS
        if self.condition is Condition.DOWN:
            self.condition = Condition.UP
            self.reason = ""
            self._broken = 0
            return True
        if self.condition is Condition.OPEN:
            if now_ns < self._retry_ns:
                self.next_probe_ns = self._retry_ns
                return False
            self.condition = Condition.HALF_OPEN
            return True
        return False

    def look_again(self, now_ns: int) -> None:
        """Something is known to have changed: the next probe is due now."""
        self.next_probe_ns = now_ns

    def probe_failed(self, reason: str, now_ns: int, *, refused: bool) -> bool:
        """It did not answer a probe; ``refused``: no connection, or it says itself that it is not healthy."""
        self._failed_probes += 1
        wait_ns = min(PROBE_DOWN_EVERY_NS * 2 ** min(self._failed_probes, 8), MOST_PROBE_DOWN_NS)
        self.next_probe_ns = now_ns + wait_ns
        if not self.takes_requests:
            self.reason = reason
            return False
        # A busy engine may be slow to answer a probe.
        if refused or self._failed_probes >= PROBES_IN_A_ROW:
            return self._close_for(Condition.DOWN, reason, now_ns)
        return False

    def _open(self, reason: str, now_ns: int) -> bool:
        self._retry_ns = now_ns + self._cool_down_ns
        changed = self._close_for(Condition.OPEN, reason, now_ns)
        self.next_probe_ns = self._retry_ns
        return changed

    def _close_for(self, condition: Condition, reason: str, now_ns: int) -> bool:
        changed = self.takes_requests
        self.condition = condition
        self.reason = reason
        self._broken = 0
        if changed:
            self.next_probe_ns = now_ns + PROBE_DOWN_EVERY_NS
        return changed
