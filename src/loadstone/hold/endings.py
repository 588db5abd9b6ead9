"""How a request ends, whoever holds it: the reply of a refusal, the outcome of a status, what was spent. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from loadstone.core.limits import Limits
from loadstone.core.outcomes import Outcome
from loadstone.core.refusals import REFUSALS, protocol_error_body, refusal_body, retry_after
from loadstone.core.tickets import Refusal as Denied

Header = tuple[bytes, bytes]

DENIED = {denied: Outcome(denied.value) for denied in Denied}
"""What the admission says, as an outcome."""

_JSON: Header = (b"content-type", b"application/json")
_REASON = b"x-loadstone-reason"
_WITH_HINT = frozenset((429, 503))
_TOO_LARGE = 413
_UNKNOWN_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply, but for its Content-Length."""

    status: int
    headers: Sequence[Header]
    body: bytes


def refusal_reply(outcome: Outcome, wait_s: float, detail: str = "", param: str | None = None) -> Reply:
    """What a refused request is answered; ``wait_s`` is told where coming back may help."""
    status = REFUSALS[outcome].status
    hint = [(b"retry-after", retry_after(wait_s))] if status in _WITH_HINT else []
    headers = [_JSON, *hint, (_REASON, outcome.value.encode())]
    if outcome is Outcome.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    return Reply(status, headers, refusal_body(outcome, detail, param))


def too_large_reply(max_body_bytes: int) -> Reply:
    """A body beyond the bound, of which the rest has not been read."""
    body = protocol_error_body(_TOO_LARGE, f"the body is larger than {max_body_bytes} bytes")
    return Reply(_TOO_LARGE, [_JSON, (_REASON, Outcome.BAD_REQUEST.value.encode())], body)


def wait_hint_s(measured_s: float | None, limits: Limits, throughput_rps: float | None = None) -> float:
    """When to come back: by the measured drain rate.

    Before there is one, once through the queue at the throughput that the limits rest on; without that the shortest
    bound that applies.
    """
    if measured_s is not None:
        return measured_s
    if throughput_rps:
        return (1 + (limits.max_queue or 0)) / throughput_rps
    bounds = [bound for bound in (limits.queue_timeout_s, limits.request_timeout_s) if bound is not None]
    return min(bounds, default=_UNKNOWN_WAIT_S)


def outcome_of(status: int) -> Outcome:
    """What a complete reply of this status counts as."""
    if status < 400:
        return Outcome.OK
    return Outcome.UPSTREAM_ERROR if status >= 500 or status == 429 else Outcome.BAD_REQUEST


def spent_tokens(counted: int | None, output_tokens: int, body_bytes: int, asked: int) -> int:
    """What a served request has to pay: tokens as ``counted`` by the server, else prompt by its size and output seen.

    ``asked`` is what was reserved for it: an estimate never costs more.
    """
    return counted if counted is not None else min(asked, -(-body_bytes // 4) + output_tokens)
