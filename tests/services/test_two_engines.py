"""Two simulated engines behind one gate, and one of them killed under load."""

import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from processes import CHAT, NO_QUOTAS, Answer, Running, chat, fetch, gate_before, open_reply, simulated, until

ENDLESS = 1_000_000
SLOTS = 4
OPTIONS = (*NO_QUOTAS, "--max-concurrency", SLOTS, "--max-queue", 100, "--queue-timeout-s", 60)


@contextmanager
def load(gate: Running) -> Iterator[list[Answer]]:
    """Clients that ask again and again until the block ends; then all their answers are there."""
    answers: list[Answer] = []
    over = threading.Event()

    def client() -> None:
        while not over.is_set():
            answers.append(fetch(gate.url, CHAT, chat(10)))

    with ThreadPoolExecutor(3 * SLOTS) as pool:
        clients = [pool.submit(client) for _ in range(3 * SLOTS)]
        try:
            yield answers
        finally:
            over.set()
        for one in clients:
            one.result()


def at(gate: Running, engine: Running) -> dict[str, int]:
    """What ``/stats`` says of this upstream."""
    (found,) = [one for one in gate.stats()["upstreams"] if one["name"] == engine.url]
    counts: dict[str, int] = found
    return counts


def kill_under_load(gate: Running, engine: Running) -> None:
    until(lambda: at(gate, engine)["in_flight"] == SLOTS)
    engine.kill()
    until(lambda: not at(gate, engine)["up"])


def test_no_request_is_lost_when_an_engine_is_killed_and_it_is_used_again_when_it_returns() -> None:
    with (
        simulated() as stays,
        simulated() as dies,
        gate_before(stays, dies, options=OPTIONS) as gate,
        ExitStack() as later,
    ):
        with load(gate) as answers:
            kill_under_load(gate, dies)
            left = at(gate, dies)["requests"]
            served = len(answers)
            until(lambda: len(answers) > served + 20)
            assert at(gate, dies)["in_flight"] == 0
            assert fetch(gate.url, "/health").status == 200
            returned = later.enter_context(simulated(port=dies.port))
            until(lambda: at(gate, returned)["up"])
            until(lambda: at(gate, returned)["requests"] > left + 10)
        assert {answer.status for answer in answers} == {200}
        assert gate.outcomes() == {"ok": len(answers)}


def test_a_stream_that_had_begun_ends_with_an_error_and_the_others_go_elsewhere() -> None:
    body = chat(ENDLESS, stream=True)
    with (
        simulated() as one,
        simulated() as other,
        gate_before(one, other, options=(*OPTIONS, "--max-output-tokens", 0)) as gate,
        open_reply(gate.url, CHAT, body) as stream,
    ):
        assert stream.readline().startswith(b"data: ")
        dies = next(engine for engine in (one, other) if at(gate, engine)["in_flight"])
        with load(gate) as answers:
            kill_under_load(gate, dies)
            with pytest.raises(http.client.IncompleteRead) as caught:
                stream.read()
        last = caught.value.partial.split(b"\n\n")[-2]
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert (error["code"], error["type"]) == ("upstream_error", "server_error")
        assert {answer.status for answer in answers} == {200}
        assert gate.outcomes() == {"ok": len(answers), "upstream_error": 1}
