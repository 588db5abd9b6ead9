"""Rate-limit headers from a client's standings, in the two families that clients know. Pure.

``X-RateLimit-*``: limit, remaining and seconds until more is free; of the tightest quota on requests, and of requests
and tokens apart in the names and the durations that OpenAI uses.

``RateLimit-Policy`` and ``RateLimit``: structured fields as in draft-ietf-httpapi-ratelimit-headers-11. The policy
lists every quota on requests; the other names only the tightest, which is the one whose ``Retry-After`` a client gets
that sends too many. Tokens are not in the draft's registry of quota units, and a quota without a unit is one on
requests: so they are told in the first family alone.
"""

from collections.abc import Sequence

from loadstone.core.quota import Spare, Standing, Window, spare_of

NAMES = frozenset(
    (
        b"x-ratelimit-limit",
        b"x-ratelimit-remaining",
        b"x-ratelimit-reset",
        b"x-ratelimit-limit-requests",
        b"x-ratelimit-remaining-requests",
        b"x-ratelimit-reset-requests",
        b"x-ratelimit-limit-tokens",
        b"x-ratelimit-remaining-tokens",
        b"x-ratelimit-reset-tokens",
        b"ratelimit-policy",
        b"ratelimit",
    )
)
_LEFT = b"%d"
"""Stands where it is told how many are left."""
_TIGHTEST = b"x-ratelimit-limit: %d\r\nx-ratelimit-remaining: %%d\r\nx-ratelimit-reset: %d\r\n"
_REQUESTS = (
    _TIGHTEST + b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %%d\r\n"
    b'x-ratelimit-reset-requests: %b\r\nratelimit: "%b";r=%%d;t=%d\r\nratelimit-policy: %b\r\n'
)
_TOKENS = b"x-ratelimit-limit-tokens: %d\r\nx-ratelimit-remaining-tokens: %%d\r\nx-ratelimit-reset-tokens: %b\r\n"
_MOST_KEPT = 1024


class RateLines:
    """The lines under one set of quotas.

    What is left changes with every request, everything else once a second: so the lines are kept cut at its places.
    """

    def __init__(self, windows: Sequence[Window | Standing]) -> None:
        """``windows``: only their names, kinds and bounds count."""
        requests = [window for window in windows if window.what == "requests"]
        self._limits = {window.name: window.limit for window in requests}
        self._tokens = next((window.limit for window in windows if window.what == "tokens"), None)
        self._policies = b", ".join([b'"%b";q=%d;w=%d' % (it.name.encode(), it.limit, it.window_s) for it in requests])
        self._kept: dict[tuple[str, int, int], tuple[list[bytes], list[bytes]]] = {}

    def __repr__(self) -> str:
        return f"<RateLines {self._policies.decode()}, {self._tokens or 'no'} tokens>"

    def of(self, spare: Spare) -> bytes:
        """Both families, names in lower case, each line with its end; nothing where there is no quota."""
        key = (spare.window, spare.requests_reset_s, spare.tokens_reset_s)
        parts = self._kept.get(key)
        if parts is None:
            parts = self._parts(*key)
        of_requests, of_tokens = parts
        return (b"%d" % spare.requests).join(of_requests) + (b"%d" % spare.tokens).join(of_tokens)

    def _parts(self, window: str, reset_s: int, tokens_reset_s: int) -> tuple[list[bytes], list[bytes]]:
        """The lines on requests and those on tokens, cut where it says how many are left."""
        of_requests = of_tokens = b""
        if window:
            limit = self._limits[window]
            name, duration = window.encode(), _duration(reset_s)
            of_requests = _REQUESTS % (limit, reset_s, limit, duration, name, reset_s, self._policies)
        if self._tokens is not None:
            of_tokens = _TOKENS % (self._tokens, _duration(tokens_reset_s))
            if not window:
                of_tokens += _TIGHTEST % (self._tokens, tokens_reset_s)
        if len(self._kept) >= _MOST_KEPT:
            self._kept.clear()
        parts = self._kept[window, reset_s, tokens_reset_s] = of_requests.split(_LEFT), of_tokens.split(_LEFT)
        return parts


def rate_limit_lines(standings: Sequence[Standing]) -> bytes:
    """The lines for one client."""
    return RateLines(standings).of(spare_of(standings))


def _duration(seconds: int) -> bytes:
    """``1h0m0s``, ``6m0s``, ``21s``."""
    if seconds < 60:
        return b"%ds" % seconds
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return b"%dh%dm%ds" % (hours, minutes, seconds) if hours else b"%dm%ds" % (minutes, seconds)
