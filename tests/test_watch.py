"""``loadstone watch``: a gate's figures as a screen, as lines, and what is said where there are none."""

import asyncio
import io
from collections.abc import Callable

import msgspec
import pytest
from rich.console import Console

from loadstone.cli import watch as verb
from loadstone.core.errors import LoadstoneError, RefusedError, UnreachableError, UsageError
from loadstone.hold.watch_view import line, number, percent, screen, seconds, shown
from loadstone.wire.server import HttpServer, IncomingRequest, Response
from made_stats import MadeGate
from wire_servers import client_of

Handler = Callable[[IncomingRequest, Response], None]


def drawn(stats: dict, width: int = 100, trouble: str = "") -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(screen(stats, "http://gate:9000", trouble))
    return capture.get()


def after(scene: str, looks: int = 20) -> dict:
    gate = MadeGate(scene)
    return [gate.stats() for _ in range(looks)][-1]


@pytest.mark.parametrize(
    ("shown", "value", "text"),
    [
        (number, None, "–"),
        (number, 0, "0"),
        (number, 0.123, "0.12"),
        (number, 12.34, "12.3"),
        (number, 1234.5, "1,234"),
        (percent, 0.0034, "0.34 %"),
        (percent, None, "–"),
        (seconds, None, "–"),
        (seconds, 0.0123, "12.3 ms"),
        (seconds, 1.25, "1.2 s"),
        (seconds, 600.0, "10 min"),
        (seconds, 10_000.0, "3 h"),
        (seconds, 500_000.0, "6 days"),
    ],
)
def test_values_in_words(shown: Callable[[float | None], str], value: float | None, text: str) -> None:
    assert shown(value) == text


def test_the_screen_of_a_busy_gate() -> None:
    text = drawn(after("busy"))
    for part in ("live", "http://gate:9000", "3/3", "KV cache", "62 %", "keep below 90 %", "queue full", "10.0.0."):
        assert part in text
    assert all(len(row) <= 100 for row in text.splitlines())


def test_the_screen_of_a_gate_in_trouble() -> None:
    text = drawn(after("troubled"), trouble="GET /stats: timeout")
    for part in ("1 of 2 upstreams up", "no answer: GET /stats: timeout", "! the limits file expired", "slow start"):
        assert part in text
    assert text.count(" high ") == 3
    assert "connection refused" in text


def test_the_screen_of_a_gate_that_nobody_has_asked() -> None:
    text = drawn(after("empty"), width=60)
    assert "nothing has ended yet" in text
    assert text.count("not known") == 3
    assert "busiest clients" not in text


def test_no_bound_and_nothing_up() -> None:
    stats = after("empty")
    stats |= {"capacity": None, "queued": 0, "limits": {}, "upstreams": []}
    assert "no upstream is up" in drawn(stats)
    assert "0/∞" in drawn(stats)
    assert "draining" in drawn(stats | {"draining": True})
    assert drawn(stats | {"limits": {"max_queue": 0}})


def test_one_line() -> None:
    said = line(after("troubled"))
    assert said.startswith("in flight 0/1  queued 0/10  3 req/s  refused 0 %  failed 50 %  TTFT p50 2.5 s p99 2.5 s")
    assert said.endswith("down: http://gpu-2.example:8001")
    assert line(after("empty") | {"draining": True}).endswith("draining")


def test_a_terminal_obeys_no_name() -> None:
    assert shown("a\x1b[31mb\n中") == "a�[31mb�中"


# -- the verb, over real sockets


def answering(*replies: tuple[int, bytes]) -> tuple[Handler, list[IncomingRequest]]:
    """Gives these replies in turn, the last one for ever."""
    asked: list[IncomingRequest] = []
    left = list(replies)

    def handle(request: IncomingRequest, response: Response) -> None:
        asked.append(request)
        status, body = left[0] if len(left) == 1 else left.pop(0)
        response.reply(status, [(b"content-type", b"application/json")], body)

    return handle, asked


def stats_of(scene: str) -> bytes:
    return msgspec.json.encode(after(scene))


def watched(handler: Handler, console: Console, *, once: bool = True, admin_key: str = "") -> None:
    async def main() -> None:
        server = HttpServer(handler)
        port = await server.start("127.0.0.1", 0)
        try:
            await verb._watch(f"http://127.0.0.1:{port}", admin_key, 0.001, console, once=once)
        finally:
            await server.stop()

    asyncio.run(main())


def test_once_prints_one_table_and_sends_the_key() -> None:
    handler, asked = answering((200, stats_of("busy")))
    console = Console(file=io.StringIO(), width=100)
    watched(handler, console, admin_key="s3cret")
    assert "Loadstone gate  live" in console.file.getvalue()
    assert [(request.path, request.header(b"x-loadstone-admin")) for request in asked] == [("/stats", b"s3cret")]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, b"{}", "--admin-key"),
        (404, b"{}", r"status 404\); is this a Loadstone gate"),
        (200, b"<html>", "is this a Loadstone gate"),
        (200, b"[1]", "is this a Loadstone gate"),
        (200, b'{"object": "list"}', "is this a Loadstone gate"),
    ],
)
def test_what_is_no_gate_is_refused_in_one_line(status: int, body: bytes, said: str) -> None:
    handler, _ = answering((status, body))
    with pytest.raises(RefusedError, match=said):
        watched(handler, Console(file=io.StringIO()))


def test_lines_go_on_while_the_gate_is_away() -> None:
    printed: list[str] = []

    class Log(io.StringIO):
        def write(self, text: str) -> int:
            printed.append(text.strip())
            if sum(map(bool, printed)) >= 3:
                stopped.set()
            return len(text)

    handler, _ = answering((200, stats_of("busy")), (502, b""), (200, stats_of("empty")))
    stopped = asyncio.Event()

    async def main() -> None:
        server = HttpServer(handler)
        port = await server.start("127.0.0.1", 0)
        try:
            async with client_of(port) as gate:
                first = await verb.read_stats(gate)
                await verb.print_lines(Console(file=Log()), gate, first, 0.001, stopped)
        finally:
            await server.stop()

    asyncio.run(main())
    first, second, third = [text for text in printed if text][:3]
    assert "in flight 3/3" in first
    assert "no answer: GET /stats gives no figures (status 502)" in second
    assert "in flight 0/3" in third


def test_the_live_screen_keeps_the_last_figures_while_the_gate_is_away() -> None:
    stopped = asyncio.Event()
    asked = 0
    reply = stats_of("busy")

    def handle(request: IncomingRequest, response: Response) -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            stopped.set()
        response.reply(*((200, [], reply) if asked == 1 else (502, [], b"")))

    terminal = {"TERM": "xterm"}  # whatever this machine's is
    console = Console(
        file=io.StringIO(), force_terminal=True, color_system=None, width=100, height=50, _environ=terminal
    )

    async def main() -> None:
        server = HttpServer(handle)
        port = await server.start("127.0.0.1", 0)
        try:
            async with client_of(port) as gate:
                first = await verb.read_stats(gate)
                await verb.show_live(console, "http://gate:9000", gate, first, 0.001, stopped)
        finally:
            await server.stop()

    asyncio.run(main())
    text = console.file.getvalue()
    trouble = "no answer: GET /stats gives no figures (status 502)"
    assert trouble in text
    assert "3/3" in text[text.rindex(trouble) :]


@pytest.mark.parametrize(
    ("url", "kind", "said"),
    [
        ("http://127.0.0.1:1", UnreachableError, "connection refused by 127.0.0.1:1"),
        ("gate:9000", UsageError, "URL 'gate:9000': the scheme"),
    ],
)
def test_an_address_without_a_gate(url: str, kind: type[LoadstoneError], said: str) -> None:
    with pytest.raises(kind, match=said):
        verb.watch(url, once=True)
    with pytest.raises(UsageError, match="--interval-s"):
        verb.watch(url, interval_s=0.0)
