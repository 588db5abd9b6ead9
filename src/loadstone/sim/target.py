"""The simulator as a ``core.target.Target`` in virtual time: real reply bytes, no HTTP, no sockets."""

from collections.abc import Callable

from loadstone.core.clock import Clock, Timer
from loadstone.core.target import Break, Exchange
from loadstone.sim.driver import Driver
from loadstone.sim.metrics import metrics_text
from loadstone.sim.openai import CHAT_PATH, COMPLETIONS_PATH, REFUSALS, Ask, BadRequestError, Replies, parse_ask
from loadstone.sim.profiles import Profile
from loadstone.sim.service import Service

_JSON = {b"content-type": b"application/json"}
_EVENTS = {b"content-type": b"text/event-stream; charset=utf-8"}


class _Flight:
    """One exchange on its way."""

    __slots__ = ("ask", "done", "exchange", "job", "replies", "sent_tokens", "timer")

    def __init__(self, exchange: Exchange, done: Callable[[Exchange], None]) -> None:
        self.exchange = exchange
        self.done = done
        self.job = 0
        self.sent_tokens = 0
        self.ask: Ask
        self.replies: Replies
        self.timer: Timer


class SimTarget:
    """A server of the given profile, its network without delay. ``Request.input_tokens``, where given, is believed."""

    def __init__(self, profile: Profile, clock: Clock, *, seed: int = 0, request_timeout_s: float = 600.0) -> None:
        self._service = Service(profile, seed)
        self._driver = Driver(self._service, clock)
        self._clock = clock
        self._timeout_ns = round(request_timeout_s * 1e9)
        self._replies = {path: Replies(path) for path in (CHAT_PATH, COMPLETIONS_PATH)}
        self._flights: dict[Exchange, _Flight] = {}

    def metrics_text(self) -> str:
        """What ``/metrics`` would answer now, in vLLM's names."""
        return metrics_text(self._service)

    def start(self, exchange: Exchange, done: Callable[[Exchange], None]) -> None:
        """As ``core.target.Target``; times out after ``request_timeout_s``."""
        flight = _Flight(exchange, done)
        self._flights[exchange] = flight
        now_ns = exchange.sent_ns = self._clock.now_ns()
        answer = self._arrive(flight)
        if answer is None:
            flight.timer = self._clock.call_at(now_ns + self._timeout_ns, lambda: self._time_out(flight))
        else:
            status, body = answer
            flight.timer = self._clock.call_at(now_ns, lambda: self._answer(flight, status, body))

    def cancel(self, exchange: Exchange) -> None:
        """As ``core.target.Target``."""
        flight = self._flights.get(exchange)
        if flight is not None:
            self._break(flight, Break.CUT, "cut")

    def _arrive(self, flight: _Flight) -> tuple[int, bytes] | None:
        """Status and body of an answer that comes at once; None for a request that is being worked on, or hangs."""
        request = flight.exchange.request
        replies = self._replies.get(request.path)
        if replies is None:
            error = BadRequestError(404, f"no such endpoint: {request.path}")
            return error.status, error.body
        try:
            default = request.output_tokens or self._service.profile.default_output_tokens
            ask = parse_ask(request.path, request.body, default, request.input_tokens)
        except BadRequestError as error:
            return error.status, error.body
        flight.ask, flight.replies = ask, replies

        def on_tokens(tokens: int, finished: bool) -> None:
            self._on_tokens(flight, tokens, finished)

        fate, flight.job = self._driver.arrive(ask.prompt_tokens, ask.output_tokens, on_tokens)
        return REFUSALS.get(fate)

    def _on_tokens(self, flight: _Flight, tokens: int, finished: bool) -> None:
        exchange = flight.exchange
        if flight.ask.stream:
            if flight.sent_tokens == 0:
                exchange.status = 200
                exchange.headers = dict(_EVENTS)
            data = flight.replies.chunk(flight.ask, flight.sent_tokens, tokens, finished)
            flight.sent_tokens = tokens
            exchange.log.append(self._clock.now_ns(), data)
            if finished:
                self._end(flight)
        elif finished:
            self._answer(flight, 200, flight.replies.whole(flight.ask, tokens))

    def _answer(self, flight: _Flight, status: int, body: bytes) -> None:
        exchange = flight.exchange
        exchange.status = status
        exchange.headers = dict(_JSON)
        exchange.log.append(self._clock.now_ns(), body)
        self._end(flight)

    def _time_out(self, flight: _Flight) -> None:
        self._break(flight, Break.TIMEOUT, f"no complete response within {self._timeout_ns / 1e9:g} s")

    def _break(self, flight: _Flight, broken: Break, error: str) -> None:
        flight.exchange.broken = broken
        flight.exchange.error = error
        self._driver.leave(flight.job)
        self._end(flight)

    def _end(self, flight: _Flight) -> None:
        flight.timer.cancel()
        exchange = flight.exchange
        del self._flights[exchange]
        exchange.log.seal()
        exchange.end_ns = self._clock.now_ns()
        flight.done(exchange)

    def __repr__(self) -> str:
        return f"<SimTarget {self._service!r}>"
