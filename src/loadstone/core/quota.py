"""Quotas per client: requests per minute and hour, tokens per minute, each in a true sliding window. Pure.

Theory of operation. A client's account is a log of what was taken (``core.quota_log``): an entry for each instant, its
requests and its tokens. What has left a window is subtracted when the account is next touched.

A reservation is *open* until the first ``settle`` or ``refund``, and *closed* from then on, whatever follows:

    reserve ── Reservation (open) ─┬─ settle: its tokens become those really served
             └ Exceeded            └─ refund: it leaves the log, as if it had never been

Entries carry exact times, so a window never holds more than its limit and never less than it could. Only where the
bounds on requests (or their absence) would allow one client more than 60,000 entries are they gathered in steps of
60 ms, each counted until its last instant has left: then the window is up to 60 ms longer, never shorter.

An account without entries is dropped, by a refund at once, by time when new clients come: each new one drops up to two
that have been idle longest. Beyond ``most_clients`` the one that was served longest ago is forgotten.
"""

from collections import OrderedDict
from collections.abc import Iterable
from math import ceil
from typing import Any, Literal

import msgspec

from loadstone.core.limits import PerClient
from loadstone.core.quota_log import MINUTE_NS, SECOND_NS, Account, Entry

QuotaSettings = PerClient
"""requests_per_minute, requests_per_hour, tokens_per_minute; None is no bound."""

What = Literal["requests", "tokens"]

_MINUTE_S, _HOUR_S = 60, 3600
_HOUR_NS = _HOUR_S * SECOND_NS
_UNBOUNDED = 1 << 62
_MOST_EXACT_ENTRIES = 60_000
_COARSE_NS = _HOUR_NS // _MOST_EXACT_ENTRIES
_MOST_CLIENTS = 250_000
"""Some 380 bytes each with one request on record."""


class Window(msgspec.Struct):
    """One quota: at most ``limit`` of ``what`` in any stretch of ``window_s``."""

    name: str
    """minute or hour."""
    what: What
    limit: int
    window_s: int


def windows_of(settings: QuotaSettings) -> tuple[Window, ...]:
    """The quotas that are set: requests per minute, requests per hour, tokens per minute."""
    bounds: tuple[tuple[str, What, int | None, int], ...] = (
        ("minute", "requests", settings.requests_per_minute, _MINUTE_S),
        ("hour", "requests", settings.requests_per_hour, _HOUR_S),
        ("minute", "tokens", settings.tokens_per_minute, _MINUTE_S),
    )
    return tuple(Window(name, what, limit, window_s) for name, what, limit, window_s in bounds if limit is not None)


class Reservation:
    """One request and its tokens, taken from every window, to be settled or refunded."""

    __slots__ = ("at_ns", "client", "held", "tokens")

    def __init__(self, client: str, tokens: int, at_ns: int, held: Any = None) -> None:
        self.client = client
        self.tokens = tokens
        self.at_ns = at_ns
        self.held = held
        """What finds it again where it was taken; None once it is settled or refunded."""

    def __repr__(self) -> str:
        return f"<Reservation {self.client} {self.tokens} tokens, {'closed' if self.held is None else 'open'}>"


class Exceeded(msgspec.Struct):
    """A refusal: nothing was taken."""

    window: str
    """Name of the window that is full; of several, the one that takes longest."""
    what: What
    limit: int
    retry_after_s: float
    """Until enough has left the window."""
    never: bool = False
    """The request is dearer than the whole quota: no waiting helps, and ``retry_after_s`` is merely the window."""


class Standing(msgspec.Struct):
    """How a client stands in one window."""

    name: str
    what: What
    limit: int
    remaining: int
    reset_s: float
    """Within this time no more than ``remaining`` can be used: the oldest that is counted leaves then."""
    window_s: int


class Spare(msgspec.Struct):
    """What a client has left, in as few figures as it is told in."""

    window: str
    """The window on requests that has least left, and of equals that stays so for longer; empty where there is none."""
    requests: int
    requests_reset_s: int
    """As in ``Standing``, in whole seconds, rounded up."""
    tokens: int
    """Of no meaning where they have no quota."""
    tokens_reset_s: int


def spare_of(standings: Iterable[Standing]) -> Spare:
    """From how a client stands in each window."""
    tightest = tokens = _NO_STANDING
    for standing in standings:
        if standing.what == "tokens":
            tokens = standing
        elif (
            tightest is _NO_STANDING
            or standing.remaining < tightest.remaining
            or (standing.remaining == tightest.remaining and standing.reset_s > tightest.reset_s)
        ):
            tightest = standing
    return Spare(tightest.name, tightest.remaining, ceil(tightest.reset_s), tokens.remaining, ceil(tokens.reset_s))


_NO_STANDING = Standing("", "requests", 0, 0, 0.0, 0)


def dearer_than_all(settings: QuotaSettings, tokens: int) -> Exceeded | None:
    """The refusal of a request that could not pass even with the whole quota free; None where it could."""
    limit = settings.tokens_per_minute
    if limit is None or tokens <= limit:
        return None
    return Exceeded("minute", "tokens", limit, _MINUTE_S, never=True)


_NOTHING_TAKEN = Account()
"""Stands for a client without an account; never changed."""
_NOTHING_TAKEN.due_ns = _UNBOUNDED


class Quotas:
    """The accounts of all clients under one set of quotas. ``now_ns`` never goes back."""

    def __init__(self, settings: QuotaSettings, most_clients: int = _MOST_CLIENTS) -> None:
        self._accounts: OrderedDict[str, Account] = OrderedDict()
        """By the time of their last reservation, the earliest first."""
        self._most_clients = most_clients
        self.configure(settings)

    def configure(self, settings: QuotaSettings) -> None:
        """Put other quotas in force; what was taken stays counted as far back as the windows reached before."""
        self.settings = settings
        self.windows = windows_of(settings)
        """Those in force."""
        per_minute, per_hour = settings.requests_per_minute or _UNBOUNDED, settings.requests_per_hour or _UNBOUNDED
        self._per_minute, self._per_hour = per_minute, per_hour
        self._tokens_per_minute = settings.tokens_per_minute or _UNBOUNDED
        self._counts_requests = settings.requests_per_minute is not None or settings.requests_per_hour is not None
        self._keep_ns = MINUTE_NS if settings.requests_per_hour is None else _HOUR_NS
        exact = min(per_hour, per_minute * _MINUTE_S) <= _MOST_EXACT_ENTRIES
        self._grain_ns = 1 if exact else _COARSE_NS

    def reserve(self, client: str, tokens: int, now_ns: int) -> Reservation | Exceeded:
        """Take one request and ``tokens`` from every window in one step, or nothing where one of them refuses."""
        if not self.windows:
            return Reservation(client, tokens, now_ns)
        account = self._accounts.get(client)
        if account is None:
            if tokens <= self._tokens_per_minute:
                account = self._open(client, now_ns)
            else:
                return self._refusal(_NOTHING_TAKEN, tokens, now_ns)
        else:
            if now_ns >= account.due_ns:
                account.expire(now_ns, self._keep_ns)
            if (
                account.minute_requests >= self._per_minute
                or account.requests >= self._per_hour
                or account.minute_tokens + tokens > self._tokens_per_minute
            ):
                return self._refusal(account, tokens, now_ns)
            self._accounts.move_to_end(client)
        grain_ns = self._grain_ns
        at_ns = now_ns if grain_ns == 1 else now_ns - now_ns % grain_ns + grain_ns - 1
        return Reservation(client, tokens, now_ns, (account, account.take(tokens, at_ns)))

    def settle(self, reservation: Reservation, tokens: int, now_ns: int) -> None:
        """Count ``tokens``, those really served, instead of those reserved, be they fewer or more. Closes it."""
        self._close(reservation, 0, tokens - reservation.tokens, now_ns)

    def refund(self, reservation: Reservation, now_ns: int) -> None:
        """Give everything back, as if the request had never come. Closes it."""
        self._close(reservation, -1, -reservation.tokens, now_ns)

    def standings(self, client: str, now_ns: int) -> list[Standing]:
        """How a client stands in each window, in the order of ``windows_of``."""
        account = self._up_to_date(client, now_ns)
        standings = []
        for window in self.windows:
            used, first = _counted(account, window)
            start_ns = now_ns if first is None else first.at_ns
            reset_s = (start_ns - now_ns + window.window_s * SECOND_NS) / SECOND_NS
            left = max(0, window.limit - used)
            standings.append(Standing(window.name, window.what, window.limit, left, reset_s, window.window_s))
        return standings

    def spare(self, client: str, now_ns: int) -> Spare:
        """``spare_of`` the client's standings, without making them: it is told with every reply."""
        account = self._up_to_date(client, now_ns)
        first, window, reset_ns = account.minute_start, "minute", MINUTE_NS
        if first is not None:
            reset_ns += first.at_ns - now_ns
        tokens_reset_ns, tokens = reset_ns, self._tokens_per_minute - account.minute_tokens
        left, hour_left = self._per_minute - account.minute_requests, self._per_hour - account.requests
        if hour_left <= left or hour_left <= 0:
            first, hour_reset_ns = account.oldest, _HOUR_NS
            if first is not None:
                hour_reset_ns += first.at_ns - now_ns
            left, hour_left = max(0, left), max(0, hour_left)
            if hour_left < left or hour_reset_ns > reset_ns:
                window, left, reset_ns = "hour", hour_left, hour_reset_ns
        if not self._counts_requests:
            window, left, reset_ns = "", 0, 0
        # In whole seconds, rounded up.
        reset_s, tokens_reset_s = -(-reset_ns // SECOND_NS), -(-tokens_reset_ns // SECOND_NS)
        return Spare(window, left if left > 0 else 0, reset_s, tokens if tokens > 0 else 0, tokens_reset_s)

    def _up_to_date(self, client: str, now_ns: int) -> Account:
        account = self._accounts.get(client) or _NOTHING_TAKEN
        if now_ns >= account.due_ns:
            account.expire(now_ns, self._keep_ns)
        return account

    def _open(self, client: str, now_ns: int) -> Account:
        accounts = self._accounts
        for _ in range(2):
            account = next(iter(accounts.values()), None)
            if account is not None:
                account.expire(now_ns, self._keep_ns)
                if account.newest is None or len(accounts) >= self._most_clients:
                    accounts.popitem(last=False)
        account = accounts[client] = Account()
        return account

    def _close(self, reservation: Reservation, requests: int, tokens: int, now_ns: int) -> None:
        held, reservation.held = reservation.held, None
        if not isinstance(held, tuple):
            return
        account, entry = held
        if now_ns >= account.due_ns:
            account.expire(now_ns, self._keep_ns)
        account.change(entry, requests, tokens)
        if account.newest is None and self._accounts.get(reservation.client) is account:
            del self._accounts[reservation.client]

    def _refusal(self, account: Account, tokens: int, now_ns: int) -> Exceeded:
        """The window that takes longest of those that have no room."""
        never = dearer_than_all(self.settings, tokens)
        if never is not None:
            return never
        waits = []
        for window in self.windows:
            excess = _counted(account, window)[0] + (tokens if window.what == "tokens" else 1) - window.limit
            if excess > 0:
                waits.append((_until_free_s(account, window, excess, now_ns), window))
        wait_s, window = max(waits, key=lambda wait: wait[0])
        return Exceeded(window.name, window.what, window.limit, wait_s)

    def __repr__(self) -> str:
        bounds = ", ".join(f"{window.limit} {window.what}/{window.name}" for window in self.windows)
        return f"<Quotas {bounds or 'none'}; {len(self._accounts)} clients>"


def _counted(account: Account, window: Window) -> tuple[int, Entry | None]:
    """What counts in a window, and the oldest entry of it."""
    if window.what == "tokens":
        return account.minute_tokens, account.minute_start
    if window.window_s == _MINUTE_S:
        return account.minute_requests, account.minute_start
    return account.requests, account.oldest


def _until_free_s(account: Account, window: Window, excess: int, now_ns: int) -> float:
    """Seconds until at least ``excess`` has left the window."""
    entry, last_ns = _counted(account, window)[1], now_ns
    while entry is not None and excess > 0:
        excess -= entry.tokens if window.what == "tokens" else entry.requests
        last_ns, entry = entry.at_ns, entry.next
    return (last_ns - now_ns + window.window_s * SECOND_NS) / SECOND_NS
