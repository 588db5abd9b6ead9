"""A gate in process, between scripted model servers and raw clients, all on one uvloop."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, cast

import uvloop

from loadstone.core.clock import Timer
from loadstone.core.limits import Limits, LimitsFile, Upstream
from loadstone.core.settings import LimitSettings
from loadstone.hold.access_log import AccessLog
from loadstone.hold.configuration import Enforced, enforce
from loadstone.hold.gate import Gate
from loadstone.hold.options import GateOptions
from loadstone.wire.clock import MonotonicClock
from loadstone.wire.server import HttpServer, IncomingRequest, Response
from loadstone.wire.server_connection import ServerConnection
from wire_servers import turns_until

CHAT = "/v1/chat/completions"
ASK = b'{"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}'
STREAM = ASK[:-1] + b', "stream": true}'
REPLY = b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}'
JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream")
PATIENCE_S = 5.0
_ESTABLISHED = 1
_RESET = struct.pack("ii", 1, 0)

Headers = Iterable[tuple[bytes, bytes]]


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a test on uvloop; whatever goes wrong in a callback, or is left behind, fails it."""
    reported: list[str] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(str(context)))
        async with asyncio.timeout(2 * PATIENCE_S):
            await main
        await until(lambda: len(asyncio.all_tasks()) == 1)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(watched())
    finally:
        assert not reported, reported[0]


async def until(reached: Callable[[], object]) -> None:
    """Let the loop turn until it has come to that."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            await turns_until(reached)
    except TimeoutError:
        raise AssertionError("it did not come to that") from None


# -- model servers


class Asked:
    """One request that has reached a scripted server, and what becomes of it."""

    def __init__(self, server: "Server", request: IncomingRequest, response: Response) -> None:
        self.request = request
        self.response = response
        self.left = asyncio.Event()
        """The gate has gone away before the answer was complete."""
        self._server = server
        response.on_disconnect = self._gone

    @property
    def document(self) -> Any:
        return json.loads(self.request.body)

    def header(self, name: bytes) -> bytes | None:
        return self.request.header(name)

    @property
    def connected(self) -> bool:
        """As the kernel knows it, which hears of a hang-up before the loop does."""
        transport = cast(ServerConnection, self.response._connection)._transport
        if transport is None:
            return False
        own: socket.socket = transport.get_extra_info("socket")
        return own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _ESTABLISHED

    def answer(self, body: bytes = REPLY, status: int = 200, headers: Headers = (JSON,)) -> None:
        self._over()
        self.response.reply(status, headers, body)

    def stream(self, length: int | None = None) -> None:
        """Begin a reply of events."""
        self.response.start(200, [EVENTS], length)

    def say(self, data: bytes) -> None:
        self.response.write(data)

    def end(self, data: bytes = b"") -> None:
        self._over()
        self.response.end(data)

    def raw(self, data: bytes) -> None:
        """Bytes of a reply, just as they are."""
        self.response._connection.send(data)

    def hang_up(self) -> None:
        """Close in good order, however incomplete the reply is."""
        self._over()
        self.response.fail()

    def reset(self) -> None:
        """Die: the connection breaks."""
        self._over()
        self.response.on_disconnect = None
        self.response._connection.cut(reset=True)

    def _over(self) -> None:
        self._server.running.discard(self)

    def _gone(self) -> None:
        self._over()
        self.left.set()

    def __repr__(self) -> str:
        return f"<Asked {self.request.method} {self.request.path}>"


class Server:
    """A model server that does as it is told: with ``behave`` at once, else each request waits in ``asked``."""

    def __init__(self, behave: Callable[[Asked], None] | None = None) -> None:
        self.asked: asyncio.Queue[Asked] = asyncio.Queue()
        self.running: set[Asked] = set()
        self.most = 0
        """Most that ever ran at once, without those that were answered at once."""

        self.total = 0
        self.healthy = True
        self.model = b"m"
        self.told_model = asyncio.Event()
        """A gate has asked for it."""
        self.behave = behave
        self.scheme = "http"
        self.port = 0
        self._http: HttpServer | None = None

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        return 0 if self._http is None else len(self._http.connections)

    @property
    def up(self) -> bool:
        return self._http is not None

    async def start(self) -> None:
        """Listen, where it did before if it has been stopped."""
        self._http = HttpServer(self._handle, max_body_bytes=1 << 28)
        self.port = await self._http.start("127.0.0.1", self.port)

    async def stop(self) -> None:
        """Be gone, with everything under way."""
        http, self._http = self._http, None
        if http is not None:
            await http.stop()

    async def next(self) -> Asked:
        return await asyncio.wait_for(self.asked.get(), PATIENCE_S)

    def _handle(self, request: IncomingRequest, response: Response) -> None:
        if request.header(b"via") is None:
            self._answer_gate(request, response)
            return
        asked = Asked(self, request, response)
        self.total += 1
        self.running.add(asked)
        # The gate closes a connection in the next turn of the loop.
        asyncio.get_running_loop().call_soon(self._count)
        if self.behave is not None:
            self.behave(asked)
        else:
            self.asked.put_nowait(asked)

    def _answer_gate(self, request: IncomingRequest, response: Response) -> None:
        """What the gate asks on its own account. Relayed requests begin with connections of their own: one that breaks
        could be taken for an old one."""
        status = {"/health": 200 if self.healthy else 503, "/v1/models": 200}.get(request.path, 404)
        response.close_after = True
        response.reply(status, [JSON], b'{"data": [{"id": "%b"}]}' % self.model)
        if request.path == "/v1/models":
            self.told_model.set()

    def _count(self) -> None:
        self.most = max(self.most, sum(asked.connected for asked in self.running))

    def __repr__(self) -> str:
        return f"<Server at {self.port}, {len(self.running)} running>"


# -- clients


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    """Names in lower case; of several with one name, all, separated by a line feed."""
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.document["error"]


def http(
    method: str = "POST", path: str = CHAT, body: bytes = ASK, headers: Headers = (JSON,), version: str = "1.1"
) -> bytes:
    """A request."""
    lines = [b"%b %b HTTP/%b" % (method.encode(), path.encode(), version.encode()), b"host: gate"]
    lines += [b"%b: %b" % header for header in headers]
    if body or method == "POST":
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join([*lines, b"", body])


class Client:
    """One raw connection to a gate."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def get(self, path: str, headers: Headers = ()) -> Reply:
        self.send(http("GET", path, b"", headers))
        return await self.reply()

    async def post(self, body: bytes = ASK, headers: Headers = (JSON,), path: str = CHAT) -> Reply:
        self.send(http("POST", path, body, headers))
        return await self.reply()

    async def head(self) -> Reply:
        """The head of a reply; its body is still to come."""
        lines = (await self._within(self._reader.readuntil(b"\r\n\r\n"))).decode("latin-1").split("\r\n")
        headers: dict[str, str] = {}
        for line in lines[1:-2]:
            name, value = line.split(": ", 1)
            headers[name] = f"{headers[name]}\n{value}" if name in headers else value
        return Reply(int(lines[0].split()[1]), headers, b"")

    async def chunk(self) -> bytes:
        """The next chunk; empty at the end."""
        size = int(await self._within(self._reader.readuntil(b"\r\n")), 16)
        data = await self._within(self._reader.readexactly(size + 2))
        return data[:-2]

    async def reply(self, *, bodyless: bool = False) -> Reply:
        """A whole reply; ``bodyless``: to HEAD."""
        head = await self.head()
        return head if bodyless else head._replace(body=await self.body(head))

    async def body(self, head: Reply) -> bytes:
        """What follows the head."""
        if head.status in (204, 304):
            return b""
        if "content-length" in head.headers:
            return await self.some(int(head.headers["content-length"]))
        if head.headers.get("transfer-encoding") != "chunked":
            return await self.rest()
        body = b""
        while data := await self.chunk():
            body += data
        return body

    async def some(self, size: int) -> bytes:
        return await self._within(self._reader.readexactly(size))

    async def rest(self) -> bytes:
        """All until the connection ends in good order. Raises ConnectionResetError where it does not."""
        return await self._within(self._reader.read())

    async def _within(self, reading: Coroutine[Any, Any, bytes]) -> bytes:
        return await asyncio.wait_for(reading, PATIENCE_S)

    def finish_sending(self) -> None:
        self._writer.write_eof()

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        own: socket.socket | None = self._writer.get_extra_info("socket")
        if own is not None:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._writer.transport.abort()


# -- the gate


class JumpClock:
    """The real clock, and the future as soon as it is asked for."""

    def __init__(self) -> None:
        self._real = MonotonicClock(asyncio.get_running_loop())
        self._ahead_ns = 0
        self._timers: set[_JumpTimer] = set()

    def now_ns(self) -> int:
        return self._real.now_ns() + self._ahead_ns

    def call_at(self, when_ns: int, callback: Callable[[], object]) -> "_JumpTimer":
        timer = _JumpTimer(self, when_ns, callback)
        self._timers.add(timer)
        self.arm(timer)
        return timer

    def arm(self, timer: "_JumpTimer") -> None:
        timer.real = self._real.call_at(timer.when_ns - self._ahead_ns, timer.fire)

    def forget(self, timer: "_JumpTimer") -> None:
        self._timers.discard(timer)

    def jump(self, seconds: float) -> None:
        """So much later, all at once."""
        self._ahead_ns += int(seconds * 1e9)
        for timer in tuple(self._timers):
            if timer.real is not None:
                timer.real.cancel()
            self.arm(timer)

    def close(self) -> None:
        self._real.close()


class _JumpTimer:
    def __init__(self, clock: JumpClock, when_ns: int, callback: Callable[[], object]) -> None:
        self.when_ns = when_ns
        self.real: Timer | None = None
        self._clock = clock
        self._callback = callback

    def fire(self) -> None:
        self._clock.forget(self)
        self._callback()

    def cancel(self) -> None:
        self._clock.forget(self)
        if self.real is not None:
            self.real.cancel()


class Rig:
    """A gate that runs, its clock, its log, and whom it has to do with."""

    def __init__(self, gate: Gate, clock: JumpClock, port: int, log: list[str]) -> None:
        self.gate = gate
        self.clock = clock
        self.port = port
        self.log = log
        self._clients: list[Client] = []

    async def client(self, address: str = "127.0.0.1") -> Client:
        """A new connection, from that address."""
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port, local_addr=(address, 0)))
        self._clients.append(client)
        return client

    async def asking(self, data: bytes | None = None, address: str = "127.0.0.1") -> Client:
        """A new connection that has sent a request."""
        client = await self.client(address)
        client.send(http() if data is None else data)
        return client

    async def waiting(self, count: int, data: bytes | None = None, address: str = "127.0.0.1") -> list[Client]:
        """So many more clients in the queue, one after the other; the places are taken, or just about to be."""
        await until(lambda: self.in_flight)
        clients = []
        for _ in range(count):
            queued = self.queued
            clients.append(await self.asking(data, address))
            await until(partial(self._queue_is, queued + 1))
        return clients

    def _queue_is(self, length: int) -> bool:
        return self.queued == length

    async def once(self, data: bytes | None = None, address: str = "127.0.0.1") -> Reply:
        """One request on a connection of its own."""
        client = await self.asking(data, address)
        reply = await client.reply()
        client.close()
        return reply

    async def stats(self) -> Any:
        """``/stats`` as it is served."""
        admin = (b"x-loadstone-admin", self.gate.options.admin_key.encode())
        return (await self.once(http("GET", "/stats", b"", [admin]))).document

    @property
    def in_flight(self) -> int:
        return self.gate.now().in_flight

    @property
    def queued(self) -> int:
        return self.gate.now().queued

    async def outcomes(self) -> dict[str, int]:
        """Those that have happened; checks that they account for every request."""
        stats = await self.stats()
        assert sum(stats["outcomes"].values()) == stats["received"] - stats["in_flight"] - stats["queued"]
        return {name: count for name, count in stats["outcomes"].items() if count}

    async def ended(self, **wanted: int) -> None:
        """All that was under way has ended, and so."""
        await until(lambda: self.gate.in_flight == 0)
        assert await self.outcomes() == wanted

    def upstream(self, server: Server) -> Any:
        """What ``/stats`` says of it."""
        return next(it for it in self.gate.now().upstreams if it.name == server.url)

    async def probe(self, server: Server) -> None:
        """Ask for its health now rather than when it is time to."""
        await self.gate.upstreams[server.url].probe()

    def hang_up(self) -> None:
        for client in self._clients:
            client.close()


def enforced(
    servers: Sequence[Server], limits: Limits, own: Sequence[Upstream] = (), flags: LimitSettings | None = None
) -> Enforced:
    """The limits in force; ``own``: upstreams as the limits file has them."""
    file = LimitsFile(limits, list(own))
    return enforce(file, "limits.toml", flags or LimitSettings(), [it.url for it in servers], datetime.now(UTC))


@asynccontextmanager
async def gated(
    *servers: Server,
    limits: Limits | None = None,
    own: Sequence[Upstream] = (),
    options: GateOptions | None = None,
    access_log: AccessLog | None = None,
) -> AsyncIterator[Rig]:
    """A gate before ``servers``, which run already. Afterwards nothing may have leaked."""
    clock = JumpClock()
    log: list[str] = []
    gate = Gate(
        enforced(servers, limits or Limits(), own), options or GateOptions(), clock, log.append, access_log=access_log
    )
    rig = Rig(gate, clock, await gate.start("127.0.0.1", 0), log)
    try:
        yield rig
        rig.hang_up()
        await until(lambda: gate.in_flight == 0)
        assert (rig.in_flight, rig.queued) == (0, 0)
        stats = gate.status.stats(gate.now(), clock.now_ns() / 1e9, gate.resources())
        assert sum(stats["outcomes"].values()) == stats["received"]
    finally:
        rig.hang_up()
        await gate.stop()
        clock.close()


@asynccontextmanager
async def serving(*behaviours: Callable[[Asked], None] | None) -> AsyncIterator[list[Server]]:
    """Scripted servers, one for each behaviour."""
    servers = [Server(behave) for behave in behaviours]
    try:
        for server in servers:
            await server.start()
        yield servers
    finally:
        for server in servers:
            await server.stop()


@asynccontextmanager
async def gate_before(
    *behaviours: Callable[[Asked], None] | None, limits: Limits | None = None, options: GateOptions | None = None
) -> AsyncIterator[tuple[Rig, list[Server]]]:
    """A gate and its scripted servers."""
    async with serving(*behaviours) as servers, gated(*servers, limits=limits, options=options) as rig:
        yield rig, servers


def answers(asked: Asked) -> None:
    """A server that answers at once."""
    asked.answer()


def answering(status: int, body: bytes = b"{}", headers: Headers = (JSON,)) -> Callable[[Asked], None]:
    """A server that always answers so."""
    return lambda asked: asked.answer(body, status, headers)


def event(text: str) -> bytes:
    return b'data: {"choices": [{"delta": {"content": "%b"}}]}\n\n' % text.encode()


def events_of(data: bytes) -> list[Any]:
    """What the events of a stream say, ``[DONE]`` as text."""
    said = [part.removeprefix(b"data: ") for part in data.split(b"\n\n") if part]
    return [json.loads(part) if part.startswith(b"{") else part.decode() for part in said]
