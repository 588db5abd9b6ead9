"""The gate's own pages. They answer while every slot is taken, and never wait for anything."""

from collections.abc import Callable
from typing import Protocol

import msgspec

from loadstone.core.outcomes import Outcome
from loadstone.core.refusals import REFUSALS, error_body, refusal_body
from loadstone.hold import dashboard
from loadstone.hold.openapi import describe
from loadstone.hold.resources import Resources
from loadstone.hold.status import Now, Status
from loadstone.wire.server import IncomingRequest, Response

_JSON = b"application/json"
_PROMETHEUS = b"text/plain; version=0.0.4; charset=utf-8"
_OPEN = ("/health", "/openapi.json")
_FIXED = {b"cache-control": b"no-store", b"x-content-type-options": b"nosniff"}
_METHODS = ("GET", "HEAD")


class Teller(Protocol):
    """Whom the pages ask."""

    status: Status

    def now(self) -> Now: ...
    def now_ns(self) -> int: ...
    def resources(self) -> Resources: ...


Page = Callable[[], tuple[int, bytes, bytes]]
"""Status, content type, body."""


class Pages:
    """``serve`` answers what belongs to the gate itself; ``protected``: all but /health want the admin's key."""

    def __init__(self, teller: Teller, *, protected: bool) -> None:
        self._teller = teller
        self._protected = protected
        self._pages: dict[str, Page] = {
            "/health": self._health,
            "/stats": self._stats,
            "/metrics": self._metrics,
            "/openapi.json": self._openapi,
        }

    def __repr__(self) -> str:
        return f"<Pages {', '.join(self._pages)}, /ui>"

    def serve(self, request: IncomingRequest, response: Response, *, admin: bool) -> bool:
        """True where the request was for a page of the gate's own, which has been answered."""
        path = request.head.path
        page = self._pages.get(path)
        if page is None and not path.startswith("/ui"):
            return False
        if page is None and dashboard.page(path) is None:
            return False
        if request.method not in _METHODS:
            body = error_body(f"{path} takes GET only", "invalid_request_error", "bad_request")
            _answer(response, 405, _JSON, body, [(b"allow", b"GET, HEAD")])
        elif self._protected and not admin and path not in _OPEN:
            # A browser asks for the key, and sends it as the password.
            body = refusal_body(Outcome.UNAUTHORIZED, "this page wants the admin's key")
            challenge = (b"www-authenticate", b'Basic realm="loadstone", charset="UTF-8"')
            _answer(response, REFUSALS[Outcome.UNAUTHORIZED].status, _JSON, body, [challenge])
        else:
            status, kind, body = page() if page is not None else _dashboard(path)
            _answer(response, status, kind, body, [])
        return True

    def _health(self) -> tuple[int, bytes, bytes]:
        status, document = self._teller.status.health(self._teller.now())
        return status, _JSON, msgspec.json.encode(document)

    def _stats(self) -> tuple[int, bytes, bytes]:
        teller = self._teller
        document = teller.status.stats(teller.now(), teller.now_ns() / 1e9, teller.resources())
        return 200, _JSON, msgspec.json.encode(document)

    def _metrics(self) -> tuple[int, bytes, bytes]:
        teller = self._teller
        return 200, _PROMETHEUS, teller.status.metrics(teller.now(), teller.now_ns() / 1e9)

    def _openapi(self) -> tuple[int, bytes, bytes]:
        return 200, _JSON, msgspec.json.encode(describe(protected=self._protected))


def _dashboard(path: str) -> tuple[int, bytes, bytes]:
    found = dashboard.page(path)
    assert found is not None, "looked up before"
    kind, body = found
    return 200, kind, body


def _answer(response: Response, status: int, kind: bytes, body: bytes, extra: list[tuple[bytes, bytes]]) -> None:
    response.reply(status, [(b"content-type", kind), *_FIXED.items(), *extra], body)
