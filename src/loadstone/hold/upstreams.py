"""The model servers behind the gate: their connections, their health, and what the admission is told of it."""

import asyncio
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from loadstone.core.clock import Clock
from loadstone.core.errors import UsageError
from loadstone.hold.asking import Answer, NoAnswer, ask
from loadstone.hold.bodies import decode_models
from loadstone.hold.engine_watch import EngineWatch
from loadstone.hold.headers import upstream_head
from loadstone.hold.health import Health
from loadstone.hold.permits import Permits
from loadstone.hold.relay import Relay
from loadstone.hold.signals import Pace
from loadstone.wire.origin import parse_origin
from loadstone.wire.upstream import UpstreamCall, UpstreamPool

PROBE_TIMEOUT_S = 2.0
_LEAST_PAUSE_S = 0.05
_HEALTH_PATH = "/health"


@dataclass(frozen=True)
class UpstreamPlan:
    """One upstream as it is configured."""

    url: str
    max_concurrency: int | None = None
    weight: float = 1.0
    max_tokens: int | None = None


@dataclass(frozen=True)
class Dialing:
    """How upstreams are spoken to."""

    authorization: bytes | None = None
    """Replaces the client's own."""
    drop_authorization: bool = False
    """The client's key is the gate's own and goes no further."""
    connect_timeout_s: float = 5.0
    tls: ssl.SSLContext | None = None
    """For https upstreams; None where there are none."""


class UpstreamServer:
    """One upstream: where it is, how it is, who is spoken to through it."""

    def __init__(self, plan: UpstreamPlan, dialing: Dialing, permits: Permits, clock: Clock) -> None:
        self.plan = plan
        self.origin = parse_origin(plan.url)
        self.health = Health(clock.now_ns())
        self.pool = UpstreamPool(
            self.origin,
            tls=dialing.tls if self.origin.scheme == "https" else None,
            connect_timeout_s=dialing.connect_timeout_s,
        )
        self.marked_down = asyncio.Event()
        self.pace: Pace | None = None
        self.engine = EngineWatch(self._ask_metrics, clock)
        self.replies = 0
        """Whole replies, ever."""
        self.silent_in_a_row = 0
        """Requests that ran out of time without a byte from here, since the last whole reply."""
        self.busy_replies = 0
        """429 and 503 that it answered itself, ever."""
        self._dialing = dialing
        self._permits = permits
        self._clock = clock
        self._netloc = self.origin.netloc.encode("ascii")
        self._root = self.origin.root.encode("ascii")

    def __repr__(self) -> str:
        return f"<UpstreamServer {self.plan.url} {self.health.condition.value}>"

    def send(self, relay: Relay) -> UpstreamCall:
        """Send a request that was granted a place here."""
        asked, account = relay.asked, relay.account
        here = (self.plan.url, account.proxied)
        head = asked.written.get(here)
        if head is None:
            head = asked.written[here] = upstream_head(
                asked.method,
                self._root + asked.target,
                asked.headers,
                netloc=self._netloc,
                proxied=account.proxied,
                authorization=self._dialing.authorization,
                drop_authorization=self._dialing.drop_authorization,
            )
        data = head.with_body(relay.body, account.forwarded_for, relay.request_id)
        return self.pool.send(data, relay, head_only=asked.method == "HEAD")

    def good(self) -> None:
        """A reply came back whole."""
        self.replies += 1
        self.silent_in_a_row = 0
        self.health.good_reply()

    def busy(self) -> None:
        """It said 429 or 503: alive, but at its own limit."""
        self.busy_replies += 1

    def silent(self) -> None:
        """A request's time was up, and no byte had come."""
        self.silent_in_a_row += 1

    def broken(self, reason: str) -> None:
        """A reply did not come back whole."""
        if self.health.broken_reply(reason, self._clock.now_ns()):
            self._closed()

    def unreachable(self, reason: str) -> None:
        """It could not be connected to: nothing more is sent there until a probe is answered."""
        if self.health.no_connection(reason, self._clock.now_ns()):
            self._closed()

    async def probe(self) -> None:
        """Ask for its health once, and act on the answer."""
        answer = await self.ask(_HEALTH_PATH)
        if isinstance(answer, Answer):
            # Whoever speaks HTTP is up, with or without a /health; 5xx there means it says that it is not.
            refused = answer.status >= 500
            reason = f"GET {_HEALTH_PATH} answers {answer.status}" if refused else ""
        else:
            refused, reason = answer.refused, answer.reason
        now_ns = self._clock.now_ns()
        if reason:
            if self.health.probe_failed(reason, now_ns, refused=refused):
                self._closed()
        elif self.health.probe_answered(now_ns):
            self._permits.tell(self._permits.admission.upstream_up(self.plan.url, now_ns))

    def look_again(self) -> None:
        """Probe at once: whoever runs it says that it has come up."""
        self.health.look_again(self._clock.now_ns())
        self.marked_down.set()

    async def ask(self, path: str) -> Answer | NoAnswer:
        """GET ``path`` beside the relayed requests."""
        api = path.startswith("/v1/")
        target = self.origin.request_path(path) if api else self.origin.service_path(path)
        authorization = self._dialing.authorization
        key = b"authorization: %b\r\n" % authorization if authorization else b""
        head = b"GET %b HTTP/1.1\r\nhost: %b\r\n%baccept: application/json\r\n\r\n" % (
            target.encode("ascii"),
            self._netloc,
            key,
        )
        return await ask(self.pool, head, PROBE_TIMEOUT_S)

    async def _ask_metrics(self) -> tuple[int, bytes] | None:
        answer = await self.ask("/metrics")
        return (answer.status, answer.body) if isinstance(answer, Answer) else None

    async def models(self) -> list[str]:
        """The models that it says it serves; empty where it does not tell."""
        answer = await self.ask("/v1/models")
        if not isinstance(answer, Answer) or answer.status != 200:
            return []
        try:
            return [model.id for model in decode_models(answer.body).data]
        except (msgspec.DecodeError, UnicodeDecodeError):
            return []

    def _closed(self) -> None:
        self.marked_down.set()
        now_ns = self._clock.now_ns()
        self._permits.tell(self._permits.admission.upstream_down(self.plan.url, now_ns))

    def close(self) -> None:
        """No new connections; those in use end with their replies."""
        self.pool.close()


class Upstreams:
    """All upstreams by their URL, and the task that watches over their health."""

    def __init__(self, permits: Permits, clock: Clock, dialing: Dialing, log: Callable[[str], None]) -> None:
        self._permits = permits
        self._clock = clock
        self._dialing = dialing
        self._log = log
        self._servers: dict[str, UpstreamServer] = {}
        self._retired: dict[str, UpstreamServer] = {}
        self._watching: dict[str, list[asyncio.Task[None]]] = {}

    def __repr__(self) -> str:
        return f"<Upstreams {list(self._servers.values())!r}>"

    def __getitem__(self, url: str) -> UpstreamServer:
        return self._servers.get(url) or self._retired[url]

    def all(self) -> list[UpstreamServer]:
        return list(self._servers.values())

    def configure(self, plans: Sequence[UpstreamPlan]) -> None:
        """Add, change and remove upstreams; what runs at a removed one runs on. Raises UsageError for a bad URL."""
        wanted = {plan.url: plan for plan in plans}
        for url, plan in wanted.items():
            if url not in self._servers:
                # One that returns begins anew: its pool keeps no connections any more, and its health is old news.
                self._retired.pop(url, None)
                self._servers[url] = UpstreamServer(plan, self._dialing, self._permits, self._clock)
            self._servers[url].plan = plan
            self._permits.tell(
                self._permits.admission.set_upstream(
                    url, plan.max_concurrency, plan.weight, plan.max_tokens, self._clock.now_ns()
                )
            )
        for url in [url for url in self._servers if url not in wanted]:
            server = self._retired[url] = self._servers.pop(url)
            self._permits.tell(self._permits.admission.remove_upstream(url, self._clock.now_ns()))
            server.close()
            for task in self._watching.pop(url, ()):
                task.cancel()
        self._watch_all()

    def _watch_all(self) -> None:
        loop = asyncio.get_running_loop()
        for url, server in self._servers.items():
            if url not in self._watching:
                watches = (self._watch(server), server.engine.watch())
                self._watching[url] = [loop.create_task(watch) for watch in watches]

    async def _watch(self, server: UpstreamServer) -> None:
        before = server.health.condition
        while True:
            await server.probe()
            now = server.health.condition
            if now is not before:
                reason = f": {server.health.reason}" if server.health.reason else ""
                self._log(f"{server.plan.url} is {now.value}{reason}")
                before = now
            await self._until_next(server)

    async def _until_next(self, server: UpstreamServer) -> None:
        """Until the next probe is due, which a request that fails may bring forward."""
        server.marked_down.clear()
        while (pause_ns := server.health.next_probe_ns - self._clock.now_ns()) > 0:
            try:
                async with asyncio.timeout(max(_LEAST_PAUSE_S, pause_ns / 1e9)):
                    await server.marked_down.wait()
                    server.marked_down.clear()
            except TimeoutError:
                return

    async def close(self) -> None:
        """Stop watching and cut all connections."""
        watching = [task for tasks in self._watching.values() for task in tasks]
        self._watching.clear()
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        for server in [*self._servers.values(), *self._retired.values()]:
            server.pool.abort()


def check_url(url: str) -> None:
    """Raises UsageError where ``url`` is none, in the words of the gate's own flag."""
    try:
        parse_origin(url)
    except UsageError as error:
        raise UsageError(str(error).replace("--base-url", "--upstream")) from None
