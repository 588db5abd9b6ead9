"""The simulator on a real port, and ``loadstone sim`` as a process."""

import asyncio
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from loadstone.sim.profiles import MODEL, Profile
from loadstone.sim.server import SimServer
from loadstone.wire.clock import MonotonicClock

FAST = Profile("fast", base_s=0.000_5)
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 4}


async def call(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, str, bytes]:
    """(status, head in lower case, body with its chunks joined)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    answer_head, _, rest = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in answer_head:
        pieces = rest.split(b"\r\n")
        assert pieces[-3:] == [b"0", b"", b""]
        rest = b"".join(pieces[1:-3:2])
    return int(answer_head.split()[1]), answer_head.decode().lower(), rest


def serve(profile: Profile, talk: Callable[[int], Awaitable[None]]) -> None:
    async def main() -> None:
        clock = MonotonicClock(asyncio.get_running_loop())
        server = SimServer(profile, clock)
        port = await server.start("127.0.0.1", 0)
        try:
            async with asyncio.timeout(30):
                await talk(port)
        finally:
            await server.stop()
            clock.close()

    asyncio.run(main())


def post(port: int, path: str, **body: object) -> Awaitable[tuple[int, str, bytes]]:
    return call(port, "POST", path, json.dumps(body).encode())


def test_chat_streams_and_whole_replies() -> None:
    async def talk(port: int) -> None:
        status, head, body = await post(port, "/v1/chat/completions", **CHAT, stream=True)
        assert status == 200
        assert "content-type: text/event-stream" in head
        assert "server: loadstone-sim" in head
        events = body.removesuffix(b"\n\n").split(b"\n\n")
        assert len(events) == 1 + 4 + 1
        assert events[-1] == b"data: [DONE]"
        _, _, body = await post(
            port, "/v1/chat/completions", **CHAT, stream=True, stream_options={"include_usage": True}
        )
        usage = json.loads(body.split(b"\n\n")[-3].removeprefix(b"data: "))["usage"]
        assert usage == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        status, _, body = await post(port, "/v1/chat/completions", **CHAT)
        assert json.loads(body)["choices"][0]["message"]["content"] == " lode" * 4
        status, _, body = await post(port, "/v1/completions", prompt="a b", max_completion_tokens=2, ignore_eos=True)
        assert (status, json.loads(body)["choices"][0]["text"]) == (200, " lode lode")

    serve(FAST, talk)


def test_many_at_once_are_all_answered() -> None:
    async def talk(port: int) -> None:
        asked = [post(port, "/v1/chat/completions", **CHAT, stream=True) for _ in range(100)]
        answers = await asyncio.gather(*asked)
        assert {status for status, _, _ in answers} == {200}
        assert all(body.count(b'lode"') == 4 for _, _, body in answers)
        _, _, metrics = await call(port, "GET", "/metrics")
        label = f'engine="0",model_name="{MODEL}"'
        for line in (
            f"vllm:num_requests_running{{{label}}} 0.0",
            f"vllm:kv_cache_usage_perc{{{label}}} 0.0",
            f"vllm:generation_tokens_total{{{label}}} 400.0",
            f"vllm:prompt_tokens_total{{{label}}} 300.0",
        ):
            assert line.encode() in metrics

    serve(replace(FAST, max_num_seqs=8), talk)


def test_pages_and_errors() -> None:
    async def talk(port: int) -> None:
        assert (await call(port, "GET", "/health"))[0] == 200
        models = json.loads((await call(port, "GET", "/v1/models"))[2])
        assert [model["id"] for model in models["data"]] == [MODEL]
        for path, method, body, status in (
            ("/v1/chat/completions", "POST", b"{", 400),
            ("/v1/chat/completions", "POST", json.dumps({**CHAT, "model": "other"}).encode(), 404),
            ("/v1/chat/completions", "GET", b"", 405),
            ("/v1/nothing", "GET", b"", 404),
        ):
            answered, _, reply = await call(port, method, path, body)
            assert (answered, json.loads(reply)["error"]["code"]) == (status, status)

    serve(FAST, talk)


def test_refusing_and_stray_errors() -> None:
    async def refuse(port: int) -> None:
        status, _, body = await post(port, "/v1/chat/completions", **CHAT)
        assert (status, json.loads(body)["error"]["type"]) == (503, "ServiceUnavailableError")

    async def err(port: int) -> None:
        assert (await post(port, "/v1/chat/completions", **CHAT))[0] == 500

    serve(replace(FAST, refuse_beyond=0), refuse)
    serve(replace(FAST, error_rate=1.0), err)


@pytest.mark.parametrize("outlives", [False, True])
def test_a_client_that_leaves_cancels_its_job_unless_work_outlives_it(outlives: bool) -> None:
    profile = replace(FAST, base_s=0.002, work_outlives_client=outlives)
    finished = b'finished_reason="length"} 1.0' if outlives else b'finished_reason="length"} 0.0'

    async def talk(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({**CHAT, "max_tokens": 300, "stream": True}).encode()
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await reader.readuntil(b"lode")
        writer.close()
        await writer.wait_closed()
        idle = f'vllm:num_requests_running{{engine="0",model_name="{MODEL}"}} 0.0'.encode()
        while idle not in (metrics := (await call(port, "GET", "/metrics"))[2]):
            pass
        assert finished in metrics

    serve(profile, talk)


def test_the_command_says_when_it_is_ready_and_stops_on_a_signal() -> None:
    async def main() -> None:
        code = "from loadstone.cli.sim import sim; raise SystemExit(sim(profile='narrow', max_num_seqs=3))"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        async with asyncio.timeout(30):
            ready = (await process.stdout.readline()).decode()
            assert ready.startswith("loadstone sim: ready on http://127.0.0.1:")
            assert ready.endswith(" (profile narrow)\n")
            port = int(ready.split(":")[3].split()[0])
            assert (await call(port, "GET", "/health"))[0] == 200
            process.send_signal(signal.SIGTERM)
            _out, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")

    asyncio.run(main())
