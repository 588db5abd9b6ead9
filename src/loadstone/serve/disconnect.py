"""Work for a client that may leave before it is done."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

_CLIENT_CLOSED_REQUEST = 499


async def while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The reply that ``work`` makes; it is cancelled as soon as the client hangs up.

    The body of ``request`` must have been read: what is received after it can only be the client's end.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=_CLIENT_CLOSED_REQUEST)
    finally:
        gone.cancel()
        task.cancel()
