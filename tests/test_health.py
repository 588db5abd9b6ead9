"""When an upstream is sent requests, and when not."""

from collections.abc import Callable
from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from loadstone.hold.health import (
    BROKEN_IN_A_ROW,
    COOL_DOWN_NS,
    MOST_COOL_DOWN_NS,
    PROBES_IN_A_ROW,
    Condition,
    Health,
)

S = 1_000_000_000


def test_the_first_refused_connection_marks_it_down() -> None:
    health = Health(0)
    assert health.no_connection("refused", 0)
    assert (health.condition, health.takes_requests, health.reason) == (Condition.DOWN, False, "refused")
    assert not health.no_connection("refused", 1), "it was down before"


def test_a_probe_that_is_answered_brings_it_back() -> None:
    health = Health(0)
    health.no_connection("refused", 0)
    assert health.probe_answered(S)
    assert (health.condition, health.reason) == (Condition.UP, "")


def test_slow_probes_mark_it_down_only_after_several() -> None:
    health = Health(0)
    changes = [health.probe_failed("no answer", n, refused=False) for n in range(PROBES_IN_A_ROW)]
    assert changes == [False] * (PROBES_IN_A_ROW - 1) + [True]
    again = Health(0)
    assert again.probe_failed("refused", 0, refused=True)


def broken(health: Health, now_ns: int, times: int = BROKEN_IN_A_ROW) -> list[bool]:
    return [health.broken_reply("reset", now_ns) for _ in range(times)]


def test_broken_replies_in_a_row_open_the_circuit() -> None:
    health = Health(0)
    assert broken(health, 0) == [False] * (BROKEN_IN_A_ROW - 1) + [True]
    assert health.condition is Condition.OPEN
    assert "reset" in health.reason


def test_a_good_reply_between_starts_the_count_anew() -> None:
    health = Health(0)
    broken(health, 0, BROKEN_IN_A_ROW - 1)
    health.good_reply()
    assert not any(broken(health, 0, BROKEN_IN_A_ROW - 1))


def test_an_open_circuit_is_tried_again_after_its_time_and_twice_as_long_the_next() -> None:
    health = Health(0)
    broken(health, 0)
    assert not health.probe_answered(COOL_DOWN_NS - 1), "a healthy /health says nothing of the replies"
    assert health.probe_answered(COOL_DOWN_NS)
    assert (health.condition, health.takes_requests) == (Condition.HALF_OPEN, True)
    assert health.broken_reply("reset again", COOL_DOWN_NS)
    assert not health.probe_answered(3 * COOL_DOWN_NS - 1)
    assert health.probe_answered(3 * COOL_DOWN_NS)
    health.good_reply()
    assert health.condition is Condition.UP


@given(st.lists(st.sampled_from(["refused", "broken", "good", "answered", "silent"]), max_size=60))
def test_a_server_that_answers_probes_always_comes_back(events: list[str]) -> None:
    health, now_ns = Health(0), 0
    happens: dict[str, Callable[[int], bool | None]] = {
        "refused": partial(health.no_connection, "x"),
        "broken": partial(health.broken_reply, "x"),
        "good": lambda now_ns: health.good_reply(),
        "answered": health.probe_answered,
        "silent": partial(health.probe_failed, "x", refused=False),
    }
    for event in events:
        now_ns += S
        before = health.takes_requests
        changed = bool(happens[event](now_ns))
        assert changed == (health.takes_requests != before)
        assert bool(health.reason) or health.condition is Condition.UP
    health.probe_answered(now_ns + MOST_COOL_DOWN_NS)
    assert health.takes_requests
