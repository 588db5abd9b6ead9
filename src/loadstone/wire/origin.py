"""Where a server is: a base URL taken apart, and its addresses."""

import asyncio
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from loadstone.core.errors import UnreachableError, UsageError

_PORTS = {"http": 80, "https": 443}

Address = tuple[socket.AddressFamily, Any]
"""Family and what ``connect`` takes."""


@dataclass(frozen=True)
class Origin:
    """A base URL. ``root`` is its path without a trailing ``/v1``: ``""`` or ``/prefix``."""

    scheme: str
    host: str
    port: int
    root: str
    versioned: bool
    """The base URL ended with ``/v1``."""

    @property
    def netloc(self) -> str:
        """``host:port`` for messages and the Host header, without a default port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def request_path(self, path: str) -> str:
        """The path on the wire of a request to ``path``; the ``/v1`` of the base URL is not doubled."""
        if self.versioned and path != "/v1" and not path.startswith("/v1/"):
            return f"{self.root}/v1{path}"
        return self.root + path

    def service_path(self, path: str) -> str:
        """The path on the wire of what stands beside the API (``/metrics``, ``/health``), never below its ``/v1``."""
        return self.root + path


def parse_origin(base_url: str) -> Origin:
    """Take a base URL apart. Raises UsageError, naming what is wrong with it."""
    try:
        parts = urlsplit(base_url.strip())
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode()
    except ValueError as error:
        raise UsageError(f"--base-url {base_url!r}: {error}") from None
    complaint = _complaint(parts)
    if complaint:
        raise UsageError(f"--base-url {base_url!r}: {complaint}; expected something like http://127.0.0.1:8000")
    path = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~-._")
    versioned = path.endswith("/v1")
    port = _PORTS[parts.scheme] if port is None else port
    return Origin(parts.scheme, host, port, path.removesuffix("/v1"), versioned)


def _complaint(parts: SplitResult) -> str:
    if parts.scheme not in _PORTS:
        return f"the scheme is {parts.scheme!r}, not http or https" if parts.scheme else "no http:// or https://"
    if not parts.hostname:
        return "no host"
    if parts.username is not None:
        return "user and password belong in --api-key or --header"
    if parts.query or parts.fragment:
        return "a base URL has no query and no fragment"
    return ""


async def resolve(origin: Origin) -> list[Address]:
    """All addresses of the host, in the resolver's order. Raises UnreachableError."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UnreachableError(f"host {origin.host!r} is unknown ({reason}); check --base-url") from None
    return [(socket.AddressFamily(family), address) for family, _, _, _, address in found]
