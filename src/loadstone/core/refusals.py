"""What the gate says when it does not relay: ONE table from outcome to HTTP status, OpenAI error code and type.

Errors are OpenAI-shaped: ``{"error": {"message", "type", "code", "param"}}``. 429 is the client's own quota, 503 is no
capacity; both always say when to come back.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from loadstone.core.outcomes import Outcome

LEAST_RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Refusal:
    """How one outcome looks over HTTP."""

    status: int
    code: str
    type: str
    message: str
    retryable: bool
    """The same request may succeed later: OpenAI SDKs try 408, 409, 429 and 5xx again."""


_SERVER = "server_error"
_CLIENT = "invalid_request_error"

REFUSALS: Mapping[Outcome, Refusal] = {
    Outcome.RATE_LIMITED: Refusal(
        429, "rate_limit_exceeded", "rate_limit_error", "请求过于频繁 / too many requests", True
    ),
    Outcome.QUEUE_FULL: Refusal(503, "queue_full", _SERVER, "服务繁忙 / service busy: the queue is full", True),
    Outcome.QUEUE_TIMEOUT: Refusal(
        503, "queue_timeout", _SERVER, "服务繁忙 / service busy: no place came free in time", True
    ),
    Outcome.EXPECTED_WAIT: Refusal(
        503, "queue_timeout", _SERVER, "服务繁忙 / service busy: the wait would outlast this request's time", True
    ),
    Outcome.NO_UPSTREAM: Refusal(503, "no_upstream", _SERVER, "no model server is up behind this gate", True),
    Outcome.DRAINING: Refusal(503, "draining", _SERVER, "this gate is shutting down", True),
    Outcome.REQUEST_TIMEOUT: Refusal(
        504, "request_timeout", _SERVER, "请求超时 / the request was not complete within its time", True
    ),
    Outcome.UPSTREAM_ERROR: Refusal(502, "upstream_error", _SERVER, "the model server failed", True),
    Outcome.BAD_REQUEST: Refusal(400, "bad_request", _CLIENT, "the request cannot be understood", False),
    Outcome.OVER_BUDGET: Refusal(
        400, "over_budget", _CLIENT, "prompt and max_tokens together exceed what this gate ever admits", False
    ),
    Outcome.UNAUTHORIZED: Refusal(401, "unauthorized", "authentication_error", "no valid key was given", False),
}

_BY_STATUS = {413: "body_too_large"}


class BadAskError(Exception):
    """A request body that is refused before it costs anything; ``param`` names the offending key."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def error_body(message: str, kind: str, code: str, param: str | None = None) -> bytes:
    """The JSON of an error, OpenAI-shaped."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "code": code, "param": param}})


def refusal_body(outcome: Outcome, detail: str = "", param: str | None = None) -> bytes:
    """The JSON that answers a refused request; ``detail`` says more than the table."""
    refusal = REFUSALS[outcome]
    message = f"{refusal.message}: {detail}" if detail else refusal.message
    return error_body(message, refusal.type, refusal.code, param)


def protocol_error_body(status: int, reason: str) -> bytes:
    """The JSON for what is wrong with the HTTP itself: 400, 405, 408, 413, 431 and the like."""
    return error_body(reason, _CLIENT, _BY_STATUS.get(status, "bad_request"))


def retry_after(seconds: float) -> bytes:
    """The value of ``Retry-After``: whole seconds, never 0, which would invite the next request at once."""
    return b"%d" % max(LEAST_RETRY_AFTER_S, math.ceil(seconds))
