"""Badly behaved servers, on real sockets and through the real command: one clear line, or a failure that is counted."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import servers
from loadstone.cli.main import main
from loadstone.core.records import Outcome
from loadstone.measure.runs import open_run
from loadstone.measure.steady import LevelData
from servers import Asked, BadServer, Behaviour, Peer, serving

FIRST = 4
"""Generations before a level of bench: the probe and three to calibrate the lengths."""
BEFORE_FIND = 14
"""And more than the lone requests that find warms up with."""


class Ran(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON line that is printed last."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


class Command:
    """Runs commands in a folder of their own."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *argv: str) -> Ran:
        status = main(argv)
        ran = Ran(status, *self._capsys.readouterr())
        assert "Traceback" not in ran.err
        return ran

    def bench(self, url: str, *more: str, prompts: int = 6) -> Ran:
        lengths = ("--input-len", "8", "--output-len", "4")
        load = ("--num-prompts", str(prompts), "--max-concurrency", "2", "--backend", "openai-chat", "--json")
        return self("bench", "--base-url", url, *lengths, *load, *more)

    def find(self, url: str, *more: str, at: str = "1,2") -> Ran:
        lengths = ("--random-input-len", "8", "--random-output-len", "4")
        return self("find", "--base-url", url, *lengths, "--levels", at, "--out", "run", "--quiet", *more)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("loadstone.measure.probe._PAUSE_S", 0.0)
    return Command(capsys)


def levels() -> list[LevelData]:
    return open_run("run").levels()


# -- no conversation


@contextmanager
def nobody() -> Iterator[str]:
    """A port that is taken and on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


@pytest.mark.parametrize("model", [(), ("--model", "m")], ids=["asks for the model", "names it"])
def test_nobody_listens(command: Command, model: tuple[str, ...]) -> None:
    with nobody() as url:
        for ran in (command.bench(url, *model), command.find(url, *model)):
            assert ran.status == 3
            assert re.fullmatch(
                r"loadstone: .*connection refused by 127.0.0.1:\d+; is the server running\?.*\n", ran.err
            )
    assert not Path("run").exists()


def test_a_certificate_that_nobody_vouches_for(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tls=True) as server:
        for model in ((), ("--model", "m")):
            ran = command.find(server.url, *model)
            assert ran.status == 3
            assert "certificate verify failed: self-signed certificate (SSL_CERT_FILE names those to trust)" in ran.err
        assert command.bench(server.url, "--insecure").result["completed"] == 6
        monkeypatch.setenv("SSL_CERT_FILE", str(servers.TLS / "server.crt"))
        assert command.bench(server.url).result["completed"] == 6


def test_the_wrong_scheme(command: Command) -> None:
    with serving(tls=True) as server:
        ran = command.find(server.url.replace("https", "http"))
    assert ran.status == 3
    assert "closed the connection before it answered" in ran.err
    assert "http or https" in ran.err


def test_a_host_that_is_unknown(command: Command) -> None:
    ran = command.find("http://no-such-host.invalid")
    assert ran.status == 3
    assert ran.err.startswith("loadstone: host 'no-such-host.invalid' is unknown")


# -- a no to the first request

NOES = {
    "closes at once": (servers.closes_at_once, 3, "closed the connection before its first reply was complete"),
    "closes mid-stream": (servers.closes_mid_stream, 3, "closed the connection in the middle of the reply"),
    "html": (servers.html, 3, "does not speak the OpenAI API: .* got text/html: Welcome to nginx!; check --base-url"),
    "401": (servers.wants_key, 1, r"Incorrect API key provided\); give --api-key or set OPENAI_API_KEY"),
    "404": (servers.knows_no_model, 1, r"has no model 'nope' .*it has: stub \(--model\)"),
    "429": (servers.too_many, 1, r"takes no work \(HTTP 429: slow down\); wait until"),
    "500": (servers.breaks, 1, r"rejects the first request \(HTTP 500: EngineDeadError\)"),
    "error event": (servers.error_event, 1, r"fails the first request \(error event in the stream: CUDA out of memory"),
    "half an event": (servers.half_event, 1, r"fails the first request \(the stream ended in half an event"),
}


@pytest.mark.parametrize(("behave", "status", "says"), NOES.values(), ids=NOES.keys())
def test_a_first_request_that_fails_is_explained_in_one_line(
    command: Command, behave: Behaviour, status: int, says: str
) -> None:
    with serving(behave) as server:
        ran = command.bench(server.url, "--model", "nope")
    assert ran.status == status
    assert re.fullmatch(rf"loadstone: .*{says}.*\n", ran.err.split("rely on\n")[-1])


def test_a_first_request_that_hangs(command: Command) -> None:
    with serving(servers.never_ends) as server:
        ran = command.find(server.url, "--request-timeout-s", "0.5")
    assert ran.status == 3
    assert "did not answer the first request: no complete reply within 0.5 s (--request-timeout-s)" in ran.err


@pytest.mark.parametrize("page", [servers.html, servers.knows_no_model], ids=["html", "404"])
def test_no_list_of_models(command: Command, page: Behaviour) -> None:
    with serving(pages={"/v1/models": page}) as server:
        ran = command.find(server.url)
        assert (ran.status, ran.err) == (1, "loadstone: the server names no model at /v1/models; give --model NAME\n")
        assert command.bench(server.url, "--model", "m").result["completed"] == 6


def test_a_list_of_models_that_wants_a_key(command: Command) -> None:
    with serving(pages={"/v1/models": servers.wants_key}) as server:
        ran = command.find(server.url)
    assert ran.status == 1
    assert "give --api-key or set OPENAI_API_KEY" in ran.err


def test_an_unknown_model_where_there_is_no_list(command: Command) -> None:
    with serving(servers.knows_no_model, pages={"/v1/models": servers.hangs}) as server:
        ran = command.bench(server.url, "--model", "nope", "--request-timeout-s", "1")
    assert ran.status == 1
    assert "The model `nope` does not exist" in ran.err
    assert "--model" in ran.err


# -- failures in the middle of a level are counted

FAILURES = {
    "half an event": (servers.half_event, "malformed: the stream ended in half an event"),
    "error event": (servers.error_event, "malformed: error event in the stream: CUDA out of memory"),
    "closes mid-stream": (servers.closes_mid_stream, "disconnect: the server closed the connection in the middle"),
    "html": (servers.html, "malformed: expected an event stream or JSON, got text/html: Welcome to nginx!"),
    "401": (servers.wants_key, "http_error: HTTP 401: Incorrect API key provided"),
    "404": (servers.knows_no_model, "http_error: HTTP 404: The model `stub` does not exist"),
    "429": (servers.too_many, "refused: HTTP 429: slow down"),
    "500": (servers.breaks, "http_error: HTTP 500: EngineDeadError"),
}


@pytest.mark.parametrize(("behave", "says"), FAILURES.values(), ids=FAILURES.keys())
def test_failures_are_counted_with_their_reason(command: Command, behave: Behaviour, says: str) -> None:
    with serving(behave, good=FIRST, every=2) as server:
        ran = command.bench(server.url)
    assert ran.status == 0
    assert (ran.result["completed"], ran.result["failed"]) == (3, 3)
    assert f"loadstone: 3 × {says}" in ran.err


def test_a_request_that_hangs_is_a_time_out(command: Command) -> None:
    with serving(servers.never_ends, good=FIRST + 5) as server:
        ran = command.bench(server.url, "--request-timeout-s", "2")
    assert (ran.result["completed"], ran.result["failed"]) == (5, 1)
    assert "loadstone: 1 × timeout: no complete reply within 2 s" in ran.err


def test_a_server_that_closes_without_an_answer(command: Command) -> None:
    with serving(servers.closes_at_once, good=FIRST) as server:
        ran = command.bench(server.url)
    assert ran.status == 1
    assert (ran.result["completed"], ran.result["failed"]) == (0, 6)
    assert "6 × disconnect: the server closed the connection before it answered" in ran.err


# -- odd but good replies


def test_done_repeated(command: Command) -> None:
    with serving(servers.repeats_done) as server:
        result = command.bench(server.url).result
    assert (result["completed"], result["total_output_tokens"]) == (6, 24)


def test_coalesced_tokens_are_counted_by_usage(command: Command) -> None:
    with serving(servers.coalesces) as server:
        result = command.bench(server.url).result
    assert (result["completed"], result["total_output_tokens"]) == (6, 24)
    assert result["loadstone"]["output_tokens_from"] == "usage"


def test_without_usage_chunks_are_counted(command: Command) -> None:
    with serving(servers.no_usage) as server:
        ran = command.bench(server.url)
    assert (ran.result["completed"], ran.result["total_output_tokens"]) == (6, 24)
    assert ran.result["loadstone"]["output_tokens_from"] == "chunks"
    assert "the server reports no usage: a word is taken for a token" in ran.err


@pytest.mark.parametrize("behave", [servers.close_delimited, servers.byte_by_byte])
def test_odd_framing(command: Command, behave: Behaviour) -> None:
    with serving(behave) as server:
        result = command.bench(server.url).result
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (6, 0, 24)


REJECTED = {
    "stream_options": ("stream_options", "Unrecognized request argument supplied: stream_options"),
    "ignore_eos": ("ignore_eos", "body.ignore_eos: extra fields not permitted"),
    "ignore_eos, unnamed": ("ignore_eos", "bad request"),
}


@pytest.mark.parametrize(("field", "says"), REJECTED.values(), ids=REJECTED.keys())
def test_a_rejected_field_is_dropped_and_it_is_said(command: Command, field: str, says: str) -> None:
    with serving(servers.rejects(field, says)) as server:
        ran = command.bench(server.url)
        assert all(field not in asked.body for asked in server.asked[-6:])
        kept = {"stream_options", "ignore_eos"} - {field}
        assert all(name in asked.body for name in kept for asked in server.asked[-6:])
    assert ran.result["completed"] == 6
    assert f"loadstone: the server rejects {field}: measured without it\n" in ran.err


def test_replies_without_content_are_successes_without_ttft(command: Command) -> None:
    with serving(servers.no_content) as server:
        ran = command.bench(server.url)
        assert ran.result["completed"] == 6
        assert "the first reply has no content" in ran.err
        command.find(server.url, "--max-level-seconds", "0.3", at="1")
    records = [record for level in levels() for record in level.records if record.ok]
    assert records
    assert all(record.ttft_s is None and record.first_choice_s is not None for record in records)


@pytest.mark.parametrize("behave", [servers.role_first, servers.reasoning_first])
def test_ttft_is_the_first_chunk_that_says_something(command: Command, behave: Behaviour) -> None:
    with serving(behave, token_s=0.005) as server:
        command.find(server.url, "--max-level-seconds", "0.3", at="1")
    records = [record for level in levels() for record in level.records if record.ok]
    assert records
    for record in records:
        assert record.ttft_s is not None
        assert record.first_choice_s is not None
        assert (record.ttft_s == record.first_choice_s) == (behave is servers.reasoning_first)


# -- a search that meets a bad server ends with what it has measured


@pytest.mark.parametrize(
    ("behave", "outcome", "pages"),
    [
        (servers.closes_mid_stream, Outcome.DISCONNECT, {}),
        (servers.too_many, Outcome.REFUSED, {"/metrics": servers.html}),
        (servers.error_event, Outcome.MALFORMED, {"/metrics": servers.closes_at_once}),
    ],
    ids=["closes mid-stream", "429", "error event"],
)
def test_a_first_level_that_fails(
    command: Command, behave: Behaviour, outcome: Outcome, pages: dict[str, Behaviour]
) -> None:
    with serving(behave, good=BEFORE_FIND, token_s=0.004, pages=pages) as server:
        ran = command.find(server.url, "--json", "--max-level-seconds", "1")
    assert ran.status == 1
    assert (ran.result["measured_max_concurrency"], ran.result["binding"]) == (None, "success")
    assert {row["verdict"] for row in ran.result["levels"]} == {"FAIL"}
    failed = [record for level in levels() for record in level.records if record.outcome is outcome]
    assert failed
    if outcome is Outcome.REFUSED:
        assert {record.retry_after_s for record in failed} == {7.0}
    assert Path("run/report.html").is_file()
    assert not Path("run/limits.toml").exists()


def one_at_a_time(reached: list[BadServer]) -> Behaviour:
    """Serves one request at a time; with a second the whole server dies."""
    busy = 0

    async def behave(asked: Asked, peer: Peer) -> None:
        nonlocal busy
        busy += 1
        try:
            if busy > 1:
                reached[0].die()
            await servers.well(asked, peer)
        finally:
            busy -= 1

    return behave


def test_a_server_that_dies_in_the_middle(command: Command) -> None:
    reached: list[BadServer] = []
    with serving(one_at_a_time(reached), token_s=0.005) as server:
        reached.append(server)
        ran = command.find(server.url, "--max-level-seconds", "0.5")
    at_one, *later = levels()
    assert at_one.meta.concurrency == 1
    assert all(record.ok or record.outcome is Outcome.CUT for record in at_one.records)
    assert any(record.outcome is Outcome.REFUSED for level in later for record in level.records)
    assert ran.status in (0, 1, 4)
    assert Path("run/verdict.json").is_file()


def test_a_metrics_page_that_hangs_holds_nothing_up(command: Command) -> None:
    with serving(token_s=0.005, pages={"/metrics": servers.hangs}) as server:
        command.find(server.url, "--max-level-seconds", "0.3", at="1")
    assert any(record.ok for level in levels() for record in level.records)


def test_requests_that_hang_fail_the_first_level(command: Command) -> None:
    with serving(servers.never_ends, good=BEFORE_FIND, every=2, token_s=0.004) as server:
        ran = command.find(server.url, "--json", "--max-level-seconds", "0.5", "--request-timeout-s", "1", at="1")
    assert ran.status == 1
    assert (ran.result["measured_max_concurrency"], ran.result["binding"]) == (None, "success")
