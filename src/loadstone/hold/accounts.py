"""Whose request it is: read from its head in one pass, and what it has taken from the quota."""

import msgspec

from loadstone.core.quota import Reservation, Standing
from loadstone.hold.api_keys import ApiKeys
from loadstone.hold.clients import Callers
from loadstone.hold.headers import Header
from loadstone.wire.server import IncomingRequest

_READ = frozenset((b"content-type", b"content-encoding", b"x-request-id", b"x-forwarded-for"))
_NONE: list[bytes] = []


class Asked(msgspec.Struct):
    """The few headers that the gate itself looks at; of each but the last the first value."""

    content_type: bytes | None = None
    content_encoding: bytes | None = None
    request_id: bytes | None = None
    forwarded_for: list[bytes] = _NONE


def read_asked(headers: list[Header]) -> Asked:
    """One pass over the head, on the hot path."""
    asked = Asked(forwarded_for=_NONE)
    for name, value in headers:
        if name not in _READ:
            continue
        if name == b"content-type":
            asked.content_type = asked.content_type or value
        elif name == b"x-request-id":
            asked.request_id = asked.request_id or value
        elif name == b"x-forwarded-for":
            asked.forwarded_for = [*asked.forwarded_for, value]
        else:
            asked.content_encoding = asked.content_encoding or value
    return asked


class Account(msgspec.Struct, gc=False):
    """One request's client."""

    client: str
    """Whom quotas and turns are counted for."""
    address: str
    forwarded: list[bytes]
    """X-Forwarded-For as it came from a trusted proxy."""
    priority: int = 0
    known: bool = True
    """It showed a valid key, where one is wanted."""
    reservation: Reservation | None = None
    standings: list[Standing] | None = None
    """How the client stood when this was asked for; from Redis, where quotas are shared."""


def account_of(request: IncomingRequest, asked: Asked, callers: Callers, keys: ApiKeys | None) -> Account:
    """Who asks: by key where keys are wanted, else by address."""
    caller = callers.find(request.peer, asked.forwarded_for)
    forwarded = asked.forwarded_for if caller.proxied else _NONE
    if keys is None:
        return Account(caller.key, caller.address, forwarded)
    key = keys.identify(request.headers)
    if key is None:
        return Account(caller.key, caller.address, forwarded, known=False)
    return Account(f"key:{key.name}", caller.address, forwarded, priority=key.priority)
