"""The gate's own pages, figures and access log, on real sockets and while every place is taken."""

import asyncio
import base64
import json
import socket
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gates import (
    ASK,
    JSON,
    STREAM,
    Asked,
    Rig,
    answering,
    answers,
    event,
    gate_before,
    gated,
    http,
    run,
    serving,
    until,
)
from loadstone.core.limits import Limits, PerClient
from loadstone.core.outcomes import Outcome
from loadstone.hold.access_log import AccessLog
from loadstone.hold.api_keys import ApiKey, ApiKeys
from loadstone.hold.clients import TrustedProxies
from loadstone.hold.gate import GateOptions

PAGES = ["/health", "/stats", "/metrics", "/ui", "/openapi.json"]
BASIC = b"Basic " + base64.b64encode(b"anyone:sesame")


def figures(text: bytes) -> dict[str, float]:
    """Samples of ``/metrics``, labels behind the name."""
    samples = (sample for family in text_string_to_metric_families(text.decode()) for sample in family.samples)
    return {
        "".join([sample.name, *(f" {value}" for value in sample.labels.values())]): sample.value for sample in samples
    }


# -- at any time


@pytest.mark.parametrize("path", PAGES)
def test_pages_answer_while_every_place_is_taken(path: str) -> None:
    limits = Limits(max_concurrency=1, max_queue=1, per_client=PerClient(requests_per_minute=2))

    async def main() -> None:
        async with gate_before(None, limits=limits) as (rig, [server]):
            await rig.asking()
            await server.next()
            await rig.waiting(1)
            assert (await rig.once()).status == 429
            client = await rig.client()
            for _ in range(3):
                reply = await client.get(path)
                assert reply.status == 200
                assert reply.headers["cache-control"] == "no-store"
                assert reply.headers["server"] == "loadstone"
                assert reply.body
            client.send(http("HEAD", path, b""))
            head = await client.reply(bodyless=True)
            assert (head.status, int(head.headers["content-length"]) > 0) == (200, True)
            refused = await client.post(path=path)
            assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD")
            assert (await rig.stats())["received"] == 3, "pages are not counted"
            assert server.total == 1

    run(main())


def test_the_page_finds_its_own_files() -> None:
    async def main() -> None:
        async with gate_before(answers) as (rig, [server]):
            page = await rig.once(http("GET", "/ui", b""))
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            assert b"ui/app.js" in page.body
            for name in ("style.css", "app.js", "view.js", "chart.js"):
                assert (await rig.once(http("GET", f"/ui/{name}?v=1", b""))).status == 200
            assert server.total == 0

    run(main())


# -- who may read them


def test_the_admins_key_is_wanted_where_there_is_one() -> None:
    async def main() -> None:
        async with gate_before(answers, options=GateOptions(admin_key="sesame")) as (rig, [server]):
            for path in ("/stats", "/metrics", "/ui"):
                reply = await rig.once(http("GET", path, b""))
                assert (reply.status, reply.error["code"]) == (401, "unauthorized")
                assert reply.headers["www-authenticate"].startswith("Basic ")
                for header in (
                    (b"x-loadstone-admin", b"sesame"),
                    (b"authorization", b"Bearer sesame"),
                    (b"authorization", BASIC),
                ):
                    assert (await rig.once(http("GET", path, b"", [header]))).status == 200
                assert (await rig.once(http("GET", path, b"", [(b"x-loadstone-admin", b"wrong")]))).status == 401
            assert (await rig.once(http("GET", "/health", b""))).status == 200
            assert (await rig.once()).status == 200, "whoever only asks the model needs no such key"
            assert server.total == 1

    run(main())


def test_health_needs_no_key_at_all() -> None:
    async def main() -> None:
        async with gate_before(answers, options=GateOptions(api_keys=ApiKeys([ApiKey(b"k", "k")]))) as (rig, _servers):
            assert (await rig.once(http("GET", "/health", b""))).status == 200
            assert (await rig.once(http("GET", "/stats", b""))).status == 200

    run(main())


# -- what they tell


def test_health_tells_the_configuration_in_force() -> None:
    limits = Limits(
        max_concurrency=3, max_queue=50, max_output_tokens=512, per_client=PerClient(requests_per_minute=10)
    )

    async def main() -> None:
        async with gate_before(answers, answers, limits=limits) as (rig, servers):
            document = (await rig.once(http("GET", "/health", b""))).document
            assert (document["status"], document["capacity"]) == ("ok", 6)
            assert document["limits"]["max_concurrency"] == 3
            assert document["limits"]["max_output_tokens"] == 512
            assert document["limits"]["per_client"]["requests_per_minute"] == 10
            assert [it["name"] for it in document["upstreams"]] == [server.url for server in servers]
            assert "a queue of 50" in document["warnings"][0]

    run(main())


def test_health_tells_of_the_model_service_behind_it() -> None:
    async def main() -> None:
        options = GateOptions(service=lambda: {"engine": "llamacpp", "max_num_seqs": 8})
        async with gate_before(answers, options=options) as (rig, _servers):
            document = (await rig.once(http("GET", "/health", b""))).document
            assert (document["status"], document["engine"], document["max_num_seqs"]) == ("ok", "llamacpp", 8)

    run(main())


async def _every_outcome(rig: Rig, server: object) -> dict[str, int]:
    """Have requests end in as many ways as one server allows; returns how many of each."""
    limits = {"ok": 0, "upstream_error": 0, "bad_request": 0}
    for behave, outcome in (
        (answers, "ok"),
        (answers, "ok"),
        (answering(500), "upstream_error"),
        (answering(429), "upstream_error"),
        (Asked.reset, "upstream_error"),
        (answering(404), "bad_request"),
    ):
        server.behave = behave  # type: ignore[attr-defined]
        await rig.once()
        limits[outcome] += 1
    await rig.once(http(body=b"{"))
    await rig.once(b"nonsense\r\n\r\n")
    return limits | {"bad_request": 3}


def test_stats_and_metrics_tell_the_same_and_add_up() -> None:
    async def main() -> None:
        async with gate_before(answers, limits=Limits(max_concurrency=2, max_queue=0)) as (rig, [server]):
            wanted = await _every_outcome(rig, server)
            server.behave = None
            running = [await rig.asking(), await rig.asking(http(body=STREAM))]
            streaming = [await server.next(), await server.next()][1]
            streaming.stream()
            streaming.say(event("a"))
            assert (await rig.once()).status == 503
            wanted["queue_full"] = 1
            stats = await rig.stats()
            outcomes = stats["outcomes"]
            assert set(outcomes) == {str(outcome) for outcome in Outcome}
            assert {name: count for name, count in outcomes.items() if count} == wanted
            assert stats["received"] == sum(wanted.values()) + 2
            assert (stats["in_flight"], stats["queued"], stats["capacity"]) == (2, 0, 2)
            assert stats["admitted"] == 6
            assert stats["error_rate"] == pytest.approx(3 / 6)
            assert stats["refusal_rate"] == pytest.approx(1 / 9)
            assert 0 <= stats["oldest_in_flight_s"] < 5
            [upstream] = stats["upstreams"]
            assert (upstream["requests"], upstream["failed"], upstream["in_flight"], upstream["limit"]) == (6, 3, 2, 2)
            [client] = stats["clients"]["busiest"]
            assert (client["client"], client["requests"], client["refused"]) == ("127.0.0.1", 8, 1)
            for key in ("mean", "p50", "p95", "p99"):
                assert stats["latency_s"][key] > 0
                assert stats["ttft_s"][key] > 0
            assert set(stats["resources"]) >= {"cpu", "memory", "gpu"}

            told = figures((await rig.once(http("GET", "/metrics", b""))).body)
            assert told["loadstone_gate_received_total"] == stats["received"]
            assert {name: told[f"loadstone_gate_requests_total {name}"] for name in outcomes} == outcomes
            assert told["loadstone_gate_refused_total queue_full"] == 1
            assert told["loadstone_gate_in_flight"] == 2
            assert told[f"loadstone_gate_upstream_in_flight {server.url}"] == 2
            assert told[f"loadstone_gate_upstream_up {server.url}"] == 1
            assert told["loadstone_gate_ttft_seconds_count"] == stats["ttft_s"]["n"]
            for client in running:
                client.close()
            await rig.ended(**wanted, client_gone=2)

    run(main())


# -- the access log


def test_the_access_log_tells_each_request_and_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    options = GateOptions(
        api_keys=ApiKeys([ApiKey(b"alpha-key", "alpha")]),
        admin_key="sesame",
        trusted=TrustedProxies.parse(["127.0.0.1"]),
    )
    limits = Limits(max_concurrency=1, max_queue=1, queue_timeout_s=5)
    headers = [
        JSON,
        (b"authorization", b"Bearer alpha-key"),
        (b"x-forwarded-for", b"203.0.113.9"),
        (b"x-request-id", b"call-1"),
    ]

    async def main() -> None:
        async with serving(None) as [server]:
            log = AccessLog(str(path))
            async with gated(server, limits=limits, options=options, access_log=log) as rig:
                client = await rig.asking(http(path="/v1/chat/completions?token=hidden", headers=headers))
                asked = await server.next()
                [waits] = await rig.waiting(1, http(headers=headers))
                rig.clock.jump(5.5)
                assert (await waits.reply()).status == 503
                asked.answer()
                assert (await client.reply()).status == 200
                assert (await rig.once(http(headers=[JSON, (b"authorization", b"Bearer wrong-key")]))).status == 401
                leaves = await rig.asking(http(headers=headers))
                asked = await server.next()
                leaves.close()
                await asked.left.wait()
                await until(lambda: rig.in_flight == 0)
                assert len(path.read_text().splitlines()) == 4, "written as it happens"
        text = path.read_text()
        assert not [secret for secret in ("alpha-key", "wrong-key", "sesame", "hidden", "Hello") if secret in text]
        lines = [json.loads(line) for line in text.splitlines()]
        assert [line["outcome"] for line in lines] == ["queue_timeout", "ok", "unauthorized", "client_gone"]
        refused, served, unknown, _gone = lines
        assert (served["id"], served["client"], served["address"]) == ("call-1", "key:alpha", "203.0.113.9")
        assert (served["method"], served["path"], served["status"]) == ("POST", "/v1/chat/completions", 200)
        assert (served["upstream"], served["attempts"], served["tokens"]) == (server.url, 1, 5)
        assert 0 <= served["wait_s"] <= served["ttft_s"] <= served["total_s"]
        assert (refused["status"], refused["upstream"], refused["attempts"]) == (503, "", 0)
        assert refused["wait_s"] == pytest.approx(refused["total_s"])
        assert refused["total_s"] >= 5
        assert (unknown["status"], unknown["client"]) == (401, "127.0.0.1" if unknown["address"] == "127.0.0.1" else "")

    run(main())


def test_the_access_log_tells_where_a_request_went_and_why_it_failed(tmp_path: Path) -> None:
    path = tmp_path / "access.log"

    async def main() -> None:
        log = AccessLog(str(path))
        async with serving(Asked.reset, Asked.reset) as servers, gated(*servers, access_log=log) as rig:
            assert (await rig.once()).status == 502
        [line] = [json.loads(line) for line in path.read_text().splitlines()]
        assert (line["outcome"], line["status"], line["attempts"]) == ("upstream_error", 502, 2)
        assert line["upstream"] in [server.url for server in servers]
        assert "before it answered" in line["error"]

    run(main())


# -- the way down


def test_a_drain_finishes_what_runs_refuses_what_is_new_and_says_so() -> None:
    async def main() -> None:
        async with serving(None) as [server], gated(server, limits=Limits(max_concurrency=1, max_queue=5)) as rig:
            streaming = await rig.asking(http(body=STREAM))
            asked = await server.next()
            asked.stream()
            asked.say(event("a"))
            await streaming.head()
            [waits] = await rig.waiting(1)
            idle = await rig.client()
            assert (await idle.get("/health")).status == 200
            drained = asyncio.create_task(rig.gate.drain())
            await until(lambda: rig.gate.draining)
            health = await idle.get("/health")
            assert (health.status, health.document["status"]) == (503, "draining")
            refused = await rig.once()
            assert (refused.status, refused.error["code"]) == (503, "draining")
            assert refused.headers["connection"] == "close"
            assert int(refused.headers["retry-after"]) >= 1
            assert (await rig.outcomes()) == {"draining": 1}
            asked.end(event("b"))
            assert [await streaming.chunk() for _ in range(3)] == [event("a"), event("b"), b""]
            (await server.next()).answer()
            last = await waits.reply()
            assert (last.status, last.headers["connection"]) == (200, "close")
            assert await waits.rest() == b""
            assert await idle.rest() == b""
            for client in (streaming, waits, idle):
                client.close()
            await asyncio.wait_for(drained, 5)
            with pytest.raises(OSError, match="refused"):
                await rig.client()

    run(main())


def test_a_drain_waits_until_a_slow_client_has_all_of_its_reply() -> None:
    body = bytes(60_000)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with gate_before(None) as (rig, [server]):
            with closing(socket.socket()) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", rig.port))
                await loop.sock_sendall(client, http())
                asked = await server.next()
                [connection] = rig.gate.server.connections
                own = connection._transport.get_extra_info("socket")
                own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                asked.answer(body)
                await until(lambda: rig.gate.in_flight == 0)
                drained = asyncio.create_task(rig.gate.drain())
                await until(lambda: rig.gate.server.draining)
                assert connection._transport.get_write_buffer_size() > 0, "all is relayed and not all of it taken"
                received = b""
                while data := await loop.sock_recv(client, 65536):
                    received += data
                assert received.endswith(b"\r\n\r\n" + body)
            await asyncio.wait_for(drained, 5)

    run(main())


def test_a_drain_that_takes_too_long_cuts_what_is_left() -> None:
    async def main() -> None:
        async with serving(None) as [server], gated(server) as rig:
            client = await rig.asking(http(body=STREAM))
            asked = await server.next()
            asked.stream()
            await client.head()
            await rig.gate.drain(0.01)
            await asyncio.wait_for(asked.left.wait(), 5)
            assert "1 requests were cut" in rig.log[-1]

    run(main())


def test_outcomes_are_told_of_an_empty_gate_too() -> None:
    async def main() -> None:
        async with gate_before(answers) as (rig, _servers):
            stats = await rig.stats()
            assert not any(stats["outcomes"].values())
            assert (stats["error_rate"], stats["refusal_rate"], stats["latency_s"]["p50"]) == (0, 0, None)
            assert json.loads(ASK)["max_tokens"] == 5

    run(main())
