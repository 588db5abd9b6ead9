"""The simulator on a real port, speaking OpenAI's API and vLLM's metrics."""

import msgspec

from loadstone.core.clock import Clock
from loadstone.sim.driver import Driver
from loadstone.sim.metrics import metrics_text
from loadstone.sim.openai import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    REFUSALS,
    Ask,
    BadRequestError,
    Replies,
    error_body,
    parse_ask,
)
from loadstone.sim.profiles import MODEL, Profile
from loadstone.sim.service import Service
from loadstone.wire.server import HttpServer, IncomingRequest, Response

_JSON = ((b"content-type", b"application/json"),)
_EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
_METRICS = ((b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),)


class SimServer:
    """A server of the given profile. The engine keeps to its own schedule of the clock, however late it is woken."""

    def __init__(self, profile: Profile, clock: Clock, *, seed: int = 0) -> None:
        self._service = Service(profile, seed)
        self._driver = Driver(self._service, clock)
        self._http = HttpServer(self._handle, name=b"loadstone-sim")
        self._replies = {path: Replies(path) for path in (CHAT_PATH, COMPLETIONS_PATH)}

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port (a free one for 0). Raises OSError where the address cannot be had."""
        return await self._http.start(host, port)

    async def stop(self) -> None:
        """Cut all connections and stand still."""
        await self._http.stop()
        self._driver.stop()

    def _handle(self, request: IncomingRequest, response: Response) -> None:
        replies = self._replies.get(request.path)
        if replies is None:
            self._page(request, response)
        elif request.method != "POST":
            response.reply(405, [*_JSON, (b"allow", b"POST")], error_body(405, f"{request.path} takes POST only"))
        else:
            try:
                ask = parse_ask(request.path, request.body, self._service.profile.default_output_tokens)
            except BadRequestError as error:
                response.reply(error.status, _JSON, error.body)
            else:
                self._generate(ask, replies, response)

    def _page(self, request: IncomingRequest, response: Response) -> None:
        if request.path == "/metrics":
            response.reply(200, _METRICS, metrics_text(self._service).encode())
        elif request.path == "/v1/models":
            model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "loadstone"}
            response.reply(200, _JSON, msgspec.json.encode({"object": "list", "data": [model]}))
        elif request.path == "/health":
            response.reply(200, (), b"")
        else:
            response.reply(404, _JSON, error_body(404, f"no such endpoint: {request.path}"))

    def _generate(self, ask: Ask, replies: Replies, response: Response) -> None:
        sent_tokens = 0

        def on_tokens(tokens: int, finished: bool) -> None:
            nonlocal sent_tokens
            if not ask.stream:
                if finished:
                    response.reply(200, _JSON, replies.whole(ask, tokens))
                return
            if sent_tokens == 0:
                response.start(200, _EVENTS)
            response.write(replies.chunk(ask, sent_tokens, tokens, finished))
            sent_tokens = tokens
            if finished:
                response.end()

        fate, job = self._driver.arrive(ask.prompt_tokens, ask.output_tokens, on_tokens)
        if (refusal := REFUSALS.get(fate)) is not None:
            status, body = refusal
            response.reply(status, _JSON, body)
        else:
            response.on_disconnect = lambda: self._driver.leave(job)

    def __repr__(self) -> str:
        return f"<SimServer {self._http!r}, {self._service!r}>"
