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

Header = tuple[bytes, bytes]


def rate_limit_headers(standings: Iterable[Standing]) -> list[Header]:
    """Both families, names in lower case; nothing where there is no quota."""
    requests: Standing | None = None
    tokens: Standing | None = None
    policies: list[bytes] = []
    for standing in standings:
        if standing.what == "tokens":
            tokens = standing
        else:
            policies.append(b'"%b";q=%d;w=%d' % (standing.name.encode(), standing.limit, standing.window_s))
            if requests is None or _tighter(standing, requests):
                requests = standing
    headers: list[Header] = []
    if requests is not None:
        headers += _of_requests(requests)
        headers.append((b"ratelimit-policy", b", ".join(policies)))
    if tokens is not None:
        headers += _of_tokens(tokens, alone=requests is None)
    return headers


def _tighter(one: Standing, other: Standing) -> bool:
    """It has less remaining; of equals, it stays so for longer."""
    return one.remaining < other.remaining or (one.remaining == other.remaining and one.reset_s > other.reset_s)


def _of_requests(standing: Standing) -> list[Header]:
    limit, remaining, reset_s = b"%d" % standing.limit, b"%d" % standing.remaining, math.ceil(standing.reset_s)
    return [
        (b"x-ratelimit-limit", limit),
        (b"x-ratelimit-remaining", remaining),
        (b"x-ratelimit-reset", b"%d" % reset_s),
        (b"x-ratelimit-limit-requests", limit),
        (b"x-ratelimit-remaining-requests", remaining),
        (b"x-ratelimit-reset-requests", _duration(reset_s)),
        (b"ratelimit", b'"%b";r=%b;t=%d' % (standing.name.encode(), remaining, reset_s)),
    ]


def _of_tokens(standing: Standing, *, alone: bool) -> list[Header]:
    limit, remaining, reset_s = b"%d" % standing.limit, b"%d" % standing.remaining, math.ceil(standing.reset_s)
    headers = [
        (b"x-ratelimit-limit-tokens", limit),
        (b"x-ratelimit-remaining-tokens", remaining),
        (b"x-ratelimit-reset-tokens", _duration(reset_s)),
    ]
    if alone:
        headers += [
            (b"x-ratelimit-limit", limit),
            (b"x-ratelimit-remaining", remaining),
            (b"x-ratelimit-reset", b"%d" % reset_s),
        ]
    return headers


def _duration(seconds: int) -> bytes:
    """``1h0m0s``, ``6m0s``, ``21s``."""
    if seconds < 60:
        return b"%ds" % seconds
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return b"%dh%dm%ds" % (hours, minutes, seconds) if hours else b"%dm%ds" % (minutes, seconds)
