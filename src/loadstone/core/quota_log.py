"""What one client took, in order of time: the log behind a quota, with running totals. Pure.

The log reaches back over the longest window. A mark in it shows where the last minute begins, and there is a total for
each of the two stretches, so that checking a quota is a comparison. Whoever reads the totals calls ``expire`` first,
once ``due_ns`` has come.
"""

SECOND_NS = 1_000_000_000
MINUTE_NS = 60 * SECOND_NS


class Entry:
    """What was taken at one instant."""

    __slots__ = ("at_ns", "next", "previous", "requests", "tokens")

    def __init__(self, at_ns: int, requests: int, tokens: int, previous: "Entry | None") -> None:
        self.at_ns = at_ns
        self.requests = requests
        self.tokens = tokens
        self.previous = previous
        self.next: Entry | None = None

    def __repr__(self) -> str:
        return f"<Entry at {self.at_ns} ns: {self.requests} requests, {self.tokens} tokens>"


class Account:
    """The log of one client and its totals."""

    __slots__ = ("due_ns", "minute_requests", "minute_start", "minute_tokens", "newest", "oldest", "requests")

    def __init__(self) -> None:
        self.oldest: Entry | None = None
        self.newest: Entry | None = None
        self.minute_start: Entry | None = None
        """The oldest entry of the last minute; None where there is none."""
        self.requests = 0
        self.minute_requests = 0
        self.minute_tokens = 0
        self.due_ns = 0
        """Nothing has to be subtracted before."""

    def expire(self, now_ns: int, keep_ns: int) -> None:
        """Subtract what has left the minute and drop what is older than ``keep_ns``."""
        entry, left_ns = self.minute_start, now_ns - MINUTE_NS
        while entry is not None and entry.at_ns <= left_ns:
            self.minute_requests -= entry.requests
            self.minute_tokens -= entry.tokens
            self.minute_start = entry = entry.next
        entry, left_ns = self.oldest, now_ns - keep_ns
        while entry is not None and entry.at_ns <= left_ns:
            self.requests -= entry.requests
            # An open reservation may outlive its entry; it must not keep all later ones alive.
            self.oldest, entry.next = entry.next, None
            entry = self.oldest
            if entry is None:
                self.newest = None
            else:
                entry.previous = None
        start, oldest = self.minute_start, self.oldest
        self.due_ns = now_ns + MINUTE_NS  # what comes from now on stays for that long
        if start is not None and start.at_ns + MINUTE_NS < self.due_ns:
            self.due_ns = start.at_ns + MINUTE_NS
        if oldest is not None and oldest.at_ns + keep_ns < self.due_ns:
            self.due_ns = oldest.at_ns + keep_ns

    def take(self, tokens: int, at_ns: int) -> Entry:
        """Count one request at ``at_ns``, or at the newest entry where that is later."""
        self.requests += 1
        self.minute_requests += 1
        self.minute_tokens += tokens
        last = self.newest
        if last is not None and last.at_ns >= at_ns:
            last.requests += 1
            last.tokens += tokens
            entry = last
        else:
            self.newest = entry = Entry(at_ns, 1, tokens, last)
            if last is None:
                self.oldest = entry
            else:
                last.next = entry
        if self.minute_start is None:
            self.minute_start = entry
        return entry

    def change(self, entry: Entry, requests: int, tokens: int) -> None:
        """Add to an entry and to the totals that still count it; an entry without requests leaves the log."""
        oldest, start = self.oldest, self.minute_start
        if oldest is None or entry.at_ns < oldest.at_ns:
            return
        in_minute = start is not None and entry.at_ns >= start.at_ns
        if in_minute:
            self.minute_tokens += tokens
        entry.tokens += tokens
        if not requests:
            return
        if in_minute:
            self.minute_requests += requests
        self.requests += requests
        entry.requests += requests
        if not entry.requests:
            self._unlink(entry)

    def _unlink(self, entry: Entry) -> None:
        before, after = entry.previous, entry.next
        if self.minute_start is entry:
            self.minute_start = after
        if before is None:
            self.oldest = after
        else:
            before.next = after
        if after is None:
            self.newest = before
        else:
            after.previous = before

    def __repr__(self) -> str:
        return f"<Account {self.minute_requests} requests and {self.minute_tokens} tokens in the minute>"
