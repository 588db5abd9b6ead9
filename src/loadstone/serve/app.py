"""What the model services share: errors that name the field, JSON bodies, and a server that ends with its parent."""

import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import Lifespan

from loadstone.core.engine import EngineError
from loadstone.core.errors import LoadstoneError
from loadstone.core.refusals import BadAskError, error_body
from loadstone.serve.parent import ParentWatch

_CLIENT, _SERVER = "invalid_request_error", "server_error"
_BACKLOG = 2048
_LAST_REPLIES_S = 5
_KEEP_ALIVE_S = 3600
"""Longer than the gate keeps a connection: it must be the one that closes."""


def json_reply(value: object, status: int = 200) -> Response:
    """``value`` (a msgspec Struct or plain values) as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def health_reply(alive: bool, document: Mapping[str, object]) -> Response:
    """What GET /health answers: ``document``, with 503 where the engine computes no more."""
    status = "ok" if alive else "the engine computes no more"
    return json_reply({"status": status, **document}, 200 if alive else 503)


def error_reply(status: int, message: str, code: str, param: str | None = None) -> Response:
    """An OpenAI-shaped error."""
    kind = _CLIENT if status < 500 else _SERVER
    return Response(error_body(message, kind, code, param), status, media_type="application/json")


async def json_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises BadAskError where it is none."""
    try:
        body = msgspec.json.decode(await request.body())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadAskError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadAskError("the body must be a JSON object")
    return body


def service(routes: Sequence[BaseRoute], lifespan: Lifespan[Starlette]) -> Starlette:
    """A Starlette application whose errors are OpenAI-shaped: 400 for a BadAskError, 500 for an EngineError, but 422
    for one that names the input it came from."""
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={BadAskError: _bad_ask, EngineError: _engine_failed, HTTPException: _http_error},
    )


def _bad_ask(_request: Request, error: Exception) -> Response:
    return error_reply(400, str(error), "bad_request", error.param if isinstance(error, BadAskError) else None)


def _engine_failed(_request: Request, error: Exception) -> Response:
    param = error.param if isinstance(error, EngineError) else None
    # What the model cannot compute for this very input it will not compute next time either: clients try a 500 again.
    status = 500 if param is None else 422
    return error_reply(status, f"the model failed: {error}", "engine_error", param)


def _http_error(_request: Request, error: Exception) -> Response:
    status, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, str(error))
    return error_reply(status, detail, "bad_request" if status < 500 else "engine_error")


def run_replica(serve: Callable[[ParentWatch], None]) -> None:
    """Run a replica's process: a foreseeable error is one line, and its exit status."""
    try:
        serve(ParentWatch())
    except LoadstoneError as error:
        print(f"loadstone: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


def run(app: Starlette, port: int, parent: ParentWatch) -> None:
    """Serve ``app`` on ``port`` of the loopback until the parent is gone or closes our standard input."""
    listener = socket.create_server(("127.0.0.1", port), backlog=_BACKLOG)
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_LAST_REPLIES_S,
    )
    uvloop.run(_serve(uvicorn.Server(config), listener, parent))


async def _serve(server: uvicorn.Server, listener: socket.socket, parent: ParentWatch) -> None:
    loop = asyncio.get_running_loop()
    parent.when_gone(lambda: loop.call_soon_threadsafe(server.handle_exit, signal.SIGTERM, None))
    await server.serve([listener])
