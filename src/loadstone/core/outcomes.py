"""How a request to the gate can end: each ends in exactly one of these."""

import enum


class Outcome(enum.StrEnum):
    """The names that stand in ``/stats``, in ``/metrics`` and in the access log."""

    OK = "ok"
    RATE_LIMITED = "rate_limited"
    """The client's own quota is spent."""
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    EXPECTED_WAIT = "expected_wait"
    """Refused at once: it would not have been done in time."""
    REQUEST_TIMEOUT = "request_timeout"
    CLIENT_GONE = "client_gone"
    UPSTREAM_ERROR = "upstream_error"
    NO_UPSTREAM = "no_upstream"
    DRAINING = "draining"
    """The gate is shutting down."""
    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    OVER_BUDGET = "over_budget"
    """Dearer than the whole token budget."""


REFUSED = frozenset(
    {
        Outcome.RATE_LIMITED,
        Outcome.QUEUE_FULL,
        Outcome.QUEUE_TIMEOUT,
        Outcome.EXPECTED_WAIT,
        Outcome.NO_UPSTREAM,
        Outcome.DRAINING,
        Outcome.OVER_BUDGET,
    }
)
"""The gate could not or would not take the request. A request that was wrong in itself is not among them."""

FAILED = frozenset({Outcome.UPSTREAM_ERROR, Outcome.REQUEST_TIMEOUT})
"""What counts as a failure of the service."""
