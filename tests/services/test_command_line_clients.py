"""The gate as ``curl``, ``ab`` and ``wrk`` see it; what ``ab`` and ``wrk`` are told is in the operators' guide."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import CHAT, NO_QUOTAS, Running, chat, clean, gate_before, simulated, until

ENDLESS = 1_000_000
UNBOUNDED = (*NO_QUOTAS, "--max-output-tokens", 0)


@pytest.fixture(scope="module")
def engine() -> Iterator[Running]:
    with simulated() as engine:
        yield engine


@pytest.fixture
def request_json(tmp_path: Path) -> Path:
    path = tmp_path / "request.json"
    path.write_text(json.dumps(chat(2)))
    return path


def run(program: str, *words: object) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [found(program), *map(str, words)], capture_output=True, text=True, timeout=60, env=clean(), check=False
    )
    assert done.returncode == 0, f"{program} ends with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def found(program: str) -> str:
    path = shutil.which(program)
    assert path, f"{program} is not on PATH; Debian's packages are curl, apache2-utils and wrk"
    return path


def post(body: Path | str) -> tuple[str, ...]:
    return ("-H", "Content-Type: application/json", "--data-binary", f"@{body}")


# -- curl


def test_curl_streams(engine: Running, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_text(json.dumps(chat(5, stream=True, stream_options={"include_usage": True})))
    with gate_before(engine) as gate:
        reply = run("curl", "-sSN", "-D", tmp_path / "head", *post(body), gate.url + CHAT)
        events = reply.stdout.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert json.loads(events[-3].removeprefix("data: "))["usage"]["completion_tokens"] == 5
        head = (tmp_path / "head").read_text().lower()
        assert "transfer-encoding: chunked" in head
        assert "x-accel-buffering: no" in head
        assert "content-type: text/event-stream" in head


def test_curl_that_is_killed_within_a_stream_frees_everything(engine: Running, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_text(json.dumps(chat(ENDLESS, stream=True)))
    with gate_before(engine, options=UNBOUNDED) as gate:
        command = [found("curl"), "-sSN", *post(body), gate.url + CHAT]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
            assert curl.stdout is not None
            assert curl.stdout.readline().startswith("data: ")
            assert (gate.stats()["in_flight"], engine.in_engine()) == (1, 1)
            curl.kill()
        until(lambda: gate.outcomes() == {"client_gone": 1})
        until(lambda: engine.in_engine() == 0)


@pytest.mark.parametrize("streams", [False, True])
def test_curl_of_http_1_0_gets_a_reply_that_ends_with_its_connection(
    engine: Running, tmp_path: Path, streams: bool
) -> None:
    body = tmp_path / "body.json"
    body.write_text(json.dumps(chat(5, stream=streams)))
    with gate_before(engine) as gate:
        reply = run("curl", "-sSN0", "-D", tmp_path / "head", *post(body), gate.url + CHAT)
        head = (tmp_path / "head").read_text().lower()
        assert "transfer-encoding" not in head
        if streams:
            assert reply.stdout.endswith("data: [DONE]\n\n")
        else:
            assert json.loads(reply.stdout)["usage"]["completion_tokens"] == 5
            assert f"content-length: {len(reply.stdout)}" in head


@pytest.mark.parametrize("path", ["/health", "/stats", "/metrics", "/ui", "/openapi.json", "/v1/models"])
def test_curl_asks_for_the_head_alone(engine: Running, path: str) -> None:
    with gate_before(engine) as gate:
        head = run("curl", "-sSI", gate.url + path).stdout
        assert head.startswith("HTTP/1.1 200 ")
        length = int(re.search(r"(?i)content-length: (\d+)", head).group(1))  # type: ignore[union-attr]
        whole = run("curl", "-sS", gate.url + path).stdout
        # Figures move between the two.
        assert length == len(whole.encode()) or path in ("/health", "/stats", "/metrics")


def test_curl_sends_a_large_body_once_it_is_told_to(engine: Running, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    words = " ".join(["word"] * 500_000)
    body.write_text(json.dumps(chat(2) | {"messages": [{"role": "user", "content": words}]}))
    with gate_before(engine) as gate:
        reply = run("curl", "-sSv", "-H", "Expect: 100-continue", *post(body), gate.url + CHAT)
        assert "< HTTP/1.1 100 Continue" in reply.stderr
        assert json.loads(reply.stdout)["usage"]["prompt_tokens"] == 500_000


def test_curl_is_told_before_it_sends_that_a_body_is_too_large(engine: Running, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_text(json.dumps(chat(2, padding="x" * 1_100_000)))
    with gate_before(engine, options=("--max-body-mb", 1)) as gate:
        upload = ("-w", "\n%{http_code} %{size_upload}")
        reply = run("curl", "-sSv", "-H", "Expect: 100-continue", *post(body), *upload, gate.url + CHAT)
        document, _, figures = reply.stdout.rpartition("\n")
        assert figures == "413 0"
        assert json.loads(document)["error"]["code"] == "body_too_large"
        assert "100 Continue" not in reply.stderr
        assert gate.outcomes() == {"bad_request": 1}


def test_curl_sends_chunks(engine: Running, request_json: Path) -> None:
    with gate_before(engine) as gate:
        chunked = ("-H", "Transfer-Encoding: chunked")
        reply = run("curl", "-sS", *chunked, *post(request_json), gate.url + CHAT)
        assert json.loads(reply.stdout)["usage"]["completion_tokens"] == 2


def test_curl_watches(engine: Running) -> None:
    """What ``watch -n 1 curl -s URL/stats`` repeats, while every slot is taken."""
    with gate_before(engine, options=(*UNBOUNDED, "--max-concurrency", 1)) as gate:
        held = [found("curl"), "-sSN", "-H", "Content-Type: application/json", "-d", json.dumps(chat(ENDLESS))]
        with subprocess.Popen([*held, gate.url + CHAT], stdout=subprocess.DEVNULL) as curl:
            until(lambda: gate.stats()["in_flight"] == 1)
            document = json.loads(run("curl", "-s", f"{gate.url}/stats").stdout)
            assert (document["in_flight"], document["queued"], document["capacity"]) == (1, 0, 1)
            assert run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"{gate.url}/health").stdout == "200"
            curl.kill()


# -- ab


@pytest.mark.parametrize("kept_alive", [(), ("-k",)])
def test_ab_gets_ten_answers_under_the_quota_and_ninety_refusals(
    engine: Running, request_json: Path, kept_alive: tuple[str, ...]
) -> None:
    with gate_before(engine) as gate:
        told = ab(gate, request_json, *kept_alive)
        assert figure(told, "Complete requests") == 100
        assert figure(told, "Non-2xx responses") == 90
        assert gate.outcomes() == {"ok": 10, "rate_limited": 90}
        assert gate.stats()["in_flight"] == gate.stats()["queued"] == 0
        if kept_alive:
            assert figure(told, "Keep-Alive requests") == 100


@pytest.mark.parametrize("kept_alive", [(), ("-k",)])
def test_ab_gets_all_answers_without_quotas(engine: Running, request_json: Path, kept_alive: tuple[str, ...]) -> None:
    with gate_before(engine, options=NO_QUOTAS) as gate:
        told = ab(gate, request_json, *kept_alive)
        assert figure(told, "Complete requests") == 100
        assert figure(told, "Failed requests") == 0
        assert "Non-2xx" not in told
        assert gate.outcomes() == {"ok": 100}
        if kept_alive:
            assert figure(told, "Keep-Alive requests") == 100


def ab(gate: Running, body: Path, *options: str) -> str:
    words = ("-n", 100, "-c", 5, "-p", body, "-T", "application/json")
    return run("ab", *options, *words, gate.url + CHAT).stdout


def figure(told: str, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+)", told, re.MULTILINE)
    assert match, f"no {name!r} in what ab says:\n{told}"
    return int(match.group(1))


# -- wrk


def test_wrk_finds_no_error_at_health(engine: Running) -> None:
    with gate_before(engine) as gate:
        told = run("wrk", "-t4", "-c10", "-d2s", "--latency", f"{gate.url}/health").stdout
        assert "Socket errors" not in told
        assert "Non-2xx" not in told
        match = re.search(r"(\d+) requests in", told)
        assert match
        assert int(match.group(1)) > 100
        assert "99%" in told
        # Its own pages are no requests.
        assert gate.stats()["received"] == 0
