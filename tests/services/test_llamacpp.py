"""The gate in front of real llama.cpp, and the line that ``find`` draws for it."""

import json
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from loadstone.serve.cores import available_cores
from loadstone.serve.engines.llamacpp import MODEL_NAME, running_engine
from loadstone.serve.engines.tiny_gguf import TinyShape, cached_model
from processes import CHAT, NO_QUOTAS, chat, engine_figure, fetch, gate_before, loadstone, open_reply, until

PARALLEL = 4
ENDLESS = 3000


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("engine")
    with running_engine(
        cached_model(TinyShape(), folder),
        parallel=PARALLEL,
        context_tokens=4096,
        cores=frozenset([max(available_cores())]),
        log_path=folder / "engine.log",
    ) as url:
        yield url


def in_engine(url: str) -> float:
    """What it computes and what waits inside it; one consistent count of llama.cpp's own."""
    return engine_figure(url, "llamacpp:requests_processing", "llamacpp:requests_deferred")


def ask(tokens: int, **more: Any) -> dict[str, Any]:
    return chat(tokens, model=MODEL_NAME, ignore_eos=True, **more)


def test_a_stream_comes_through_event_by_event(engine: str) -> None:
    body = ask(20, stream=True, stream_options={"include_usage": True})
    with gate_before(engine) as gate:
        events = fetch(gate.url, CHAT, body).body.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
        assert len(text) == 20
        assert chunks[-1]["usage"]["completion_tokens"] == 20
        assert gate.stats()["output_tokens"] == 20
        assert [one["id"] for one in fetch(gate.url, "/v1/models").document["data"]] == [MODEL_NAME]


def test_clients_that_leave_their_streams_free_the_engines_slots(engine: str) -> None:
    """Streams only: what does not stream llama.cpp computes to its end, whoever has left."""
    options = (*NO_QUOTAS, "--max-concurrency", PARALLEL, "--max-queue", 0, "--max-output-tokens", 0)
    with gate_before(engine, options=options) as gate:
        with ExitStack() as streams:
            for _ in range(PARALLEL):
                reply = streams.enter_context(open_reply(gate.url, CHAT, ask(ENDLESS, stream=True)))
                assert reply.readline().startswith(b"data: ")
            assert fetch(gate.url, CHAT, ask(4)).status == 503
            assert in_engine(engine) == PARALLEL
        until(lambda: gate.outcomes() == {"queue_full": 1, "client_gone": PARALLEL})
        until(lambda: in_engine(engine) == 0)
        assert fetch(gate.url, CHAT, ask(4)).document["usage"]["completion_tokens"] == 4


def test_the_gate_holds_the_engine_to_the_line_that_find_has_drawn(engine: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lengths = ("--random-input-len", 32, "--random-output-len", 64, "--max-level-seconds", 2)
    found = loadstone("find", "--base-url", engine, "--levels", "1,2,4", "--min-gain", 0, *lengths, "--out", run)
    assert found.returncode == 0
    written = tomllib.loads((run / "limits.toml").read_text())
    assert (written["evidence"]["model"], written["evidence"]["through_gate"]) == (MODEL_NAME, False)
    limit = written["limits"]["max_concurrency"]
    assert 1 <= limit < PARALLEL

    with gate_before(engine, options=("--limits", run / "limits.toml")) as gate:
        document = gate.stats()
        assert (document["capacity"], document["limits"]["per_client"]["requests_per_minute"]) == (limit, None)
        assert document["warnings"] == []
        offered = 4 * limit
        with ThreadPoolExecutor(offered) as pool:
            answers = [pool.submit(fetch, gate.url, CHAT, ask(64, stream=True)) for _ in range(3 * offered)]
            most = 0.0
            while not all(answer.done() for answer in answers):
                most = max(most, in_engine(engine))
        assert most == limit
        statuses = [answer.result().status for answer in answers]
        assert statuses.count(200) == gate.outcomes()["ok"]
        assert set(statuses) <= {200, 503}
        assert statuses.count(200) >= offered


def test_limits_above_the_measured_line_are_refused(tmp_path: Path) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text(
        "schema = 1\n[limits]\nmax_concurrency = 3\n[evidence]\nmeasured_max_concurrency = 4\nheadroom = 0.75\n"
        'binding = "ttft"\nclaim = "4 held"\nmeasured_at = "2026-11-20T10:00:00Z"\n'
        'expires_at = "2099-12-20T10:00:00Z"\nmodel = "m"\nendpoint = "chat"\nbase_url = "http://127.0.0.1:9"\n'
        'through_gate = false\nrun = "run"\n'
    )
    done = loadstone("gate", "--upstream", "http://127.0.0.1:9", "--limits", limits, "--max-concurrency", 5)
    assert done.returncode == 2
    assert "--force" in done.stderr
