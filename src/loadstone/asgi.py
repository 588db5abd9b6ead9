"""Limits for a service in Python: the gate's admission as ASGI middleware.

::

    from loadstone.asgi import AdmissionMiddleware

    app = FastAPI()
    app.add_middleware(AdmissionMiddleware, limits="limits.toml")
"""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict, Unpack

import msgspec

from loadstone.core import limits as limits_file
from loadstone.core.errors import UsageError
from loadstone.core.limits import LimitsFile
from loadstone.core.outcomes import Outcome
from loadstone.core.settings import LimitSettings
from loadstone.hold.api_keys import is_admin
from loadstone.hold.asgi_messages import App, Receive, Scope, Send, answer
from loadstone.hold.clients import TrustedProxies
from loadstone.hold.configuration import Enforced, enforce
from loadstone.hold.endings import Reply, refusal_reply
from loadstone.hold.passage import SAFE, Passage
from loadstone.hold.service import Rules, Service
from loadstone.wire.clock import LoopAlarm, MonotonicClock

_STATS_HEADERS = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
_PASSWORD_PLEASE = (b"www-authenticate", b'Basic realm="loadstone", charset="UTF-8"')
_READS = ("GET", "HEAD")
_ANY_URL = "http://app"


class Bounds(TypedDict, total=False):
    """Each overrides the limits file; 0 is no bound, None what the file says."""

    max_concurrency: int | None
    max_queue: int | None
    queue_timeout_s: float | None
    request_timeout_s: float | None
    max_output_tokens: int | None
    default_output_tokens: int | None
    max_tokens_in_flight: int | None
    requests_per_minute: int | None
    requests_per_hour: int | None
    tokens_per_minute: int | None
    force: bool
    """Start although a limit lies above the measured line."""


class AdmissionMiddleware:
    """Admits what the app can take, lets a little queue, refuses the rest at once and says when to come back.

    Which limits: each keyword of ``Bounds`` beats the file ``limits``, which beats the cautious defaults of a chat
    model on a small GPU (3 at once, 10 waiting, 10 requests a minute and 100 an hour for a client, 512 tokens, 120 s).
    With a file nothing but the file holds. Its ``[[upstream]]`` tables are for a gate and mean nothing here.

    Which requests: all but GET, HEAD and OPTIONS; or, with ``paths``, those whose path begins with one of them, by any
    method but OPTIONS, which is a browser asking for leave. The rest passes freely, and so do WebSockets and lifespan.

    What happens to one: its body is read whole (at most ``max_body_bytes``, else 413) and replayed byte for byte,
    unless max_tokens or its like had to be held to the limits. ``request_timeout_s`` covers upload, queue and reply;
    then the client gets 504, or an error event in a stream, and the app is cancelled. A client that leaves while it
    waits frees its place at once; when it leaves a running app, the app receives ``http.disconnect`` and is cancelled
    a second later. The slot is free when the app's coroutine has ended; with a ``def`` handler of Starlette or FastAPI
    that is when its thread has, which cannot be cancelled. (As everywhere in Starlette, a clean-up that has to await
    something after a cancellation needs ``anyio.CancelScope(shield=True)``.)

    Who asks: the address of the connection, IPv6 by /64; behind ``trusted_proxies`` (addresses or networks) the one
    that they forwarded; or what ``client_of(scope)`` returns, such as the user whom an outer middleware has found.
    ``admin_key`` lifts all limits for requests that show it as ``X-Loadstone-Admin``, so that the service itself can be
    measured. ``stats_path`` serves the figures of a gate's /stats, for the admin alone where there is a key.

    Limits are counted in this instance on one event loop: several worker processes have each their own, and together
    take several times as many. One process holds them exactly; so does ``loadstone gate`` in front of many.

    A file or limits that cannot be used keep the server from starting, with one line that says why. Frameworks make
    their middleware so late that an exception would be taken for an app without lifespan, so it is not raised here; on
    a server without lifespan each request raises it, as UsageError.
    """

    def __init__(
        self,
        app: App,
        *,
        limits: str | os.PathLike[str] | None = None,
        paths: Sequence[str] = (),
        stats_path: str | None = None,
        trusted_proxies: Sequence[str] = (),
        client_of: Callable[[Scope], str] | None = None,
        admin_key: str = "",
        max_body_bytes: int = 16 * 1024 * 1024,
        **bounds: Unpack[Bounds],
    ) -> None:
        self.app = app
        self._paths = (paths,) if isinstance(paths, str) else tuple(paths)
        self._stats_path = stats_path
        self._made: Rules | UsageError
        try:
            _check_paths(self._paths)
            enforced, trusted = _enforced(limits, bounds), TrustedProxies.parse(trusted_proxies)
            self._made = Rules(enforced, trusted, admin_key, client_of, max_body_bytes, tells=stats_path is not None)
        except UsageError as error:
            self._made = error
        self._loop: asyncio.AbstractEventLoop | None = None
        self._clock: MonotonicClock | None = None
        self._service: Service | None = None

    def __repr__(self) -> str:
        return f"<AdmissionMiddleware {self._service or 'not in use'}>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI 3 application."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            await self._serve(self._here(), scope, receive, send)

    async def _serve(self, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
        if _path(scope) == self._stats_path and scope["method"] in _READS:
            await answer(send, _stats(service, scope), [])
        elif self._admits(scope):
            await Passage(service, self.app, scope, receive, send).run()
        else:
            await self.app(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        if self._paths:
            return scope["method"] != "OPTIONS" and _path(scope).startswith(self._paths)
        return scope["method"] not in SAFE

    def _here(self) -> Service:
        """The state on the running loop, made when first needed there. Raises UsageError: a second loop, bad limits."""
        loop = asyncio.get_running_loop()
        if self._service is not None and loop is self._loop:
            return self._service
        if isinstance(self._made, UsageError):
            raise UsageError(str(self._made))
        if self._loop is not None and not self._loop.is_closed():
            raise UsageError(
                "this AdmissionMiddleware counts its limits on another event loop; make one instance for each loop"
            )
        self._close()
        # A millisecond is fine enough here, and a loop's own timer holds no file that outlives the loop.
        self._clock = MonotonicClock(loop, LoopAlarm)
        self._loop, self._service = loop, Service(self._made, self._clock)
        return self._service

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start only with limits that can be used; let go of timers and threads when the app shuts down."""
        if isinstance(self._made, UsageError):
            await receive()
            await send({"type": "lifespan.startup.failed", "message": str(self._made)})
            return
        try:
            await self.app(scope, receive, send)
        finally:
            # An app without lifespan returns here at once.
            if self._service is not None and self._service.idle:
                self._close()

    def _close(self) -> None:
        if self._service is not None and self._clock is not None:
            self._service.close()
            self._clock.close()
        self._loop = self._clock = self._service = None


def _stats(service: Service, scope: Scope) -> Reply:
    admin_key = service.rules.admin_key
    if admin_key and not is_admin(scope["headers"], admin_key):
        refusal = refusal_reply(Outcome.UNAUTHORIZED, 0, "this page wants the admin's key")
        return Reply(refusal.status, [*refusal.headers, _PASSWORD_PLEASE], refusal.body)
    return Reply(200, _STATS_HEADERS, service.stats())


def _path(scope: Scope) -> str:
    """As the app routes it: without the prefix under which it is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _check_paths(paths: Sequence[str]) -> None:
    for path in paths:
        if not path.startswith("/"):
            raise UsageError(f"paths: {path!r} must begin with a slash, such as /v1/")


def _enforced(limits: str | os.PathLike[str] | None, bounds: Bounds) -> Enforced:
    """What holds, and a warning in the log for each doubt about it."""
    unknown = sorted(bounds.keys() - Bounds.__annotations__.keys())
    if unknown:
        raise UsageError(
            f"AdmissionMiddleware has no option {unknown[0]!r}; limits are {', '.join(Bounds.__annotations__)}"
        )
    try:
        settings = msgspec.convert(bounds, LimitSettings)
    except msgspec.ValidationError as error:
        raise UsageError(f"AdmissionMiddleware: {error}") from None
    name = "" if limits is None else os.fspath(limits)
    file = None if limits is None else _read(name)
    enforced = enforce(file, name, settings, [_ANY_URL], datetime.now(UTC))
    for warning in enforced.warnings:
        logging.getLogger("loadstone").warning(warning)
    return enforced


def _read(name: str) -> LimitsFile:
    try:
        text = Path(name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise UsageError(f"limits {name}: {reason}") from None
    return msgspec.structs.replace(limits_file.loads(text, name), upstreams=[])
