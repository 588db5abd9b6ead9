"""Rate-limit headers from a client's standings, in the two families that clients know. Pure.

``X-RateLimit-*``: limit, remaining and seconds until more is free; of the tightest quota on requests, and of requests
and tokens apart in the names and the durations that OpenAI uses.

``RateLimit-Policy`` and ``RateLimit``: structured fields as in draft-ietf-httpapi-ratelimit-headers-11. The policy
lists every quota on requests; the other names only the tightest, which is the one whose ``Retry-After`` a client gets
that sends too many. Tokens are not in the draft's registry of quota units, and a quota without a unit is one on
requests: so they are told in the first family alone.
"""

import math
from collections.abc import Iterable

from loadstone.core.quota import Standing

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
_TIGHTEST = b"x-ratelimit-limit: %d\r\nx-ratelimit-remaining: %d\r\nx-ratelimit-reset: %d\r\n"
_REQUESTS = (
    _TIGHTEST + b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %d\r\n"
    b'x-ratelimit-reset-requests: %b\r\nratelimit: "%b";r=%d;t=%d\r\nratelimit-policy: %b\r\n'
)
_TOKENS = b"x-ratelimit-limit-tokens: %d\r\nx-ratelimit-remaining-tokens: %d\r\nx-ratelimit-reset-tokens: %b\r\n"


def rate_limit_lines(standings: Iterable[Standing]) -> bytes:
    """Both families as header lines, names in lower case, each line with its end; nothing where there is no quota."""
    tightest: Standing | None = None
    tokens: Standing | None = None
    policies = b""
    for standing in standings:
        if standing.what == "tokens":
            tokens = standing
            continue
        policy = b'"%b";q=%d;w=%d' % (standing.name.encode(), standing.limit, standing.window_s)
        policies = b"%b, %b" % (policies, policy) if policies else policy
        if tightest is None or _tighter(standing, tightest):
            tightest = standing
    lines = b"" if tightest is None else _of_requests(tightest, policies)
    return lines if tokens is None else lines + _of_tokens(tokens, alone=tightest is None)


def _tighter(one: Standing, other: Standing) -> bool:
    """It has less remaining; of equals, it stays so for longer."""
    return one.remaining < other.remaining or (one.remaining == other.remaining and one.reset_s > other.reset_s)


def _of_requests(standing: Standing, policies: bytes) -> bytes:
    limit, left, reset_s = standing.limit, standing.remaining, math.ceil(standing.reset_s)
    name = standing.name.encode()
    duration = _duration(reset_s)
    return _REQUESTS % (limit, left, reset_s, limit, left, duration, name, left, reset_s, policies)


def _of_tokens(standing: Standing, *, alone: bool) -> bytes:
    limit, left, reset_s = standing.limit, standing.remaining, math.ceil(standing.reset_s)
    lines = _TOKENS % (limit, left, _duration(reset_s))
    return lines + _TIGHTEST % (limit, left, reset_s) if alone else lines


def _duration(seconds: int) -> bytes:
    """``1h0m0s``, ``6m0s``, ``21s``."""
    if seconds < 60:
        return b"%ds" % seconds
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return b"%dh%dm%ds" % (hours, minutes, seconds) if hours else b"%dm%ds" % (minutes, seconds)
