"""Rate-limit headers, as bytes on the wire."""

import msgspec
import pytest

from loadstone.core.quota import Standing, spare_of
from loadstone.hold.headers import header_pairs
from loadstone.hold.rate_headers import NAMES, RateLines, rate_limit_lines

MINUTE = Standing("minute", "requests", 10, 3, 20.2, 60)
HOUR = Standing("hour", "requests", 100, 2, 3540.0, 3600)
TOKENS = Standing("minute", "tokens", 20000, 1500, 0.001, 60)

TABLE = [
    ([], {}),
    (
        [MINUTE],
        {
            "x-ratelimit-limit": "10",
            "x-ratelimit-remaining": "3",
            "x-ratelimit-reset": "21",
            "x-ratelimit-limit-requests": "10",
            "x-ratelimit-remaining-requests": "3",
            "x-ratelimit-reset-requests": "21s",
            "ratelimit-policy": '"minute";q=10;w=60',
            "ratelimit": '"minute";r=3;t=21',
        },
    ),
    (
        [MINUTE, HOUR, TOKENS],
        {
            "x-ratelimit-limit": "100",
            "x-ratelimit-remaining": "2",
            "x-ratelimit-reset": "3540",
            "x-ratelimit-limit-requests": "100",
            "x-ratelimit-remaining-requests": "2",
            "x-ratelimit-reset-requests": "59m0s",
            "x-ratelimit-limit-tokens": "20000",
            "x-ratelimit-remaining-tokens": "1500",
            "x-ratelimit-reset-tokens": "1s",
            "ratelimit-policy": '"minute";q=10;w=60, "hour";q=100;w=3600',
            "ratelimit": '"hour";r=2;t=3540',
        },
    ),
    (
        [TOKENS],
        {
            "x-ratelimit-limit": "20000",
            "x-ratelimit-remaining": "1500",
            "x-ratelimit-reset": "1",
            "x-ratelimit-limit-tokens": "20000",
            "x-ratelimit-remaining-tokens": "1500",
            "x-ratelimit-reset-tokens": "1s",
        },
    ),
    (
        # Both spent: the one that is spent for longer.
        [Standing("minute", "requests", 10, 0, 5.0, 60), Standing("hour", "requests", 100, 0, 3600.0, 3600)],
        {
            "x-ratelimit-limit": "100",
            "x-ratelimit-remaining": "0",
            "x-ratelimit-reset": "3600",
            "x-ratelimit-limit-requests": "100",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "1h0m0s",
            "ratelimit-policy": '"minute";q=10;w=60, "hour";q=100;w=3600',
            "ratelimit": '"hour";r=0;t=3600',
        },
    ),
]


@pytest.mark.parametrize(("standings", "expected"), TABLE)
def test_both_families(standings: list[Standing], expected: dict[str, str]) -> None:
    headers = header_pairs(rate_limit_lines(standings))
    assert {name for name, _ in headers} <= NAMES
    assert {name.decode(): value.decode() for name, value in headers} == expected
    assert len(headers) == len(expected), "no header twice"


def test_lines_that_are_kept_say_what_is_left_now() -> None:
    standings = [MINUTE, HOUR, TOKENS]
    lines = RateLines(standings)
    for left in (2, 1, 0, 2):
        now = [MINUTE, msgspec.structs.replace(HOUR, remaining=left), msgspec.structs.replace(TOKENS, remaining=left)]
        assert lines.of(spare_of(now)) == rate_limit_lines(now)
    for reset_s in range(3000):
        later = [msgspec.structs.replace(HOUR, reset_s=float(reset_s))]
        assert RateLines(later).of(spare_of(later)) == rate_limit_lines(later)
        assert b"x-ratelimit-reset: %d\r\n" % reset_s in lines.of(spare_of([*later, TOKENS]))
    assert repr(lines).endswith(", 20000 tokens>")
