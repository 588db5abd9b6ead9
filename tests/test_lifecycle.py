"""When a replica is up, given up, started again: by tables, with made-up times."""

import pytest

from loadstone.serve.lifecycle import Lifecycle, Patience, State

_S = 1_000_000_000
_PATIENCE = Patience()
_READY_TIMEOUT_S = 600.0


def started(now_s: float = 0.0) -> Lifecycle:
    life = Lifecycle(_PATIENCE, _READY_TIMEOUT_S)
    life.started(int(now_s * _S))
    return life


def up(now_s: float = 0.0) -> Lifecycle:
    life = started(now_s)
    assert life.answered(int(now_s * _S))
    return life


def test_it_is_up_once_it_answers() -> None:
    life = started()
    assert life.state is State.STARTING
    assert not life.unanswered(1 * _S)
    assert life.answered(2 * _S)
    assert (life.state, life.up_since_ns) == (State.UP, 2 * _S)
    assert not life.answered(3 * _S), "it was up already"


def test_what_was_never_up_is_not_started_again() -> None:
    life = started()
    life.ended(5 * _S)
    assert (life.state, life.restart_at_ns) == (State.FAILED, None)
    life.stopped()
    assert life.state is State.FAILED


@pytest.mark.parametrize(("at_s", "overdue"), [(1.0, False), (599.9, False), (600.0, True)])
def test_it_is_given_up_where_it_is_not_ready_in_time(at_s: float, overdue: bool) -> None:
    assert started().unanswered(int(at_s * _S)) is overdue


@pytest.mark.parametrize(
    ("uptimes_s", "pauses_s"),
    [
        ([5] * 7, [1, 2, 4, 8, 16, 30, 30]),
        ([5, 5, 60, 5], [1, 2, 1, 2]),
        ([60, 59.9, 3600], [1, 2, 1]),
    ],
)
def test_the_pauses_double_and_begin_anew_after_a_minute_up(uptimes_s: list[float], pauses_s: list[float]) -> None:
    life, now_ns, seen_s = started(), 0, []
    for uptime_s in uptimes_s:
        life.answered(now_ns)
        now_ns += int(uptime_s * _S)
        life.ended(now_ns)
        assert life.state is State.BACKING_OFF
        assert life.restart_at_ns is not None
        seen_s.append((life.restart_at_ns - now_ns) / _S)
        now_ns = life.restart_at_ns
        life.started(now_ns)
    assert seen_s == pauses_s
    assert life.restarts == len(uptimes_s)


def test_one_that_was_up_and_does_not_come_back_is_tried_again_ever_later() -> None:
    life = up()
    life.ended(90 * _S)
    for pause_s in (2, 4, 8):
        assert life.restart_at_ns is not None
        life.started(life.restart_at_ns)
        life.ended(100 * _S)
        assert life.state is State.BACKING_OFF
        assert life.restart_at_ns == (100 + pause_s) * _S


@pytest.mark.parametrize(
    ("unanswered_at_s", "stuck"),
    [
        ([2, 4, 29.9], False),
        ([10, 20, 30], True),
        ([29, 31], False),  # fewer probes than that may have met a busy moment of ours
        ([29, 31, 33], True),
    ],
)
def test_it_is_stuck_after_half_a_minute_without_an_answer(unanswered_at_s: list[float], stuck: bool) -> None:
    life = up()
    said = [life.unanswered(int(at_s * _S)) for at_s in unanswered_at_s]
    assert said == [False] * (len(said) - 1) + [stuck]
    assert life.state is (State.STUCK if stuck else State.UP)


def test_an_answer_begins_the_patience_anew() -> None:
    life = up()
    for at_s in (10, 20):
        life.unanswered(at_s * _S)
    life.answered(29 * _S)
    assert not any(life.unanswered(at_s * _S) for at_s in (35, 45, 55))
    assert life.unanswered(59 * _S)


def test_only_what_is_up_can_stall() -> None:
    life = started()
    assert not life.stalled()
    life.answered(1 * _S)
    assert life.stalled()
    assert not life.stalled(), "it is being ended already"
    life.ended(2 * _S)
    assert repr(life) == "<Lifecycle backing_off, 0 restarts>"
    life.stopped()
    assert (life.state, life.restart_at_ns) == (State.STOPPED, None)
