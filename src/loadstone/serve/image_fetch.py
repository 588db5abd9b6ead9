"""Images by URL, fetched so that a stranger's URL reaches nothing but the public internet (and what is opened).

Theory of operation. The only way to a socket is ``_GuardedNetwork.connect_tcp``: it resolves the host once, checks
every address found, and connects to one of those addresses, never to the name; so a name that resolves differently a
moment later (DNS rebinding) gains nothing, and each redirect, being another connection, is checked like the first. TLS
is still verified against the name. Proxies and ``.netrc`` from the environment are not used. One deadline covers
everything, from the first name resolved to the last byte.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from socket import SOCK_STREAM
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import httpcore2 as httpcore

from loadstone import __version__
from loadstone.core.refusals import BadAskError
from loadstone.serve.addresses import Opened, complaint, host_key
from loadstone.wire.tls import client_context

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port → its addresses, best first. Raises OSError."""

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 3
_MOST_CONNECTIONS = 32
"""Each may hold an image of the largest size in memory."""
_MOST_ADDRESSES = 4
_CONNECT_TIMEOUT_S = 3.0
"""For one address of several: the next one still has time."""
_KEEP_ALIVE_S = 5.0
_SAFE = "/?&=%:@!$'()*+,;~-._"
_LONGEST_URL = 8192
_HEADERS = [
    ("Accept", "image/*"),
    ("Accept-Encoding", "identity"),
    ("User-Agent", f"loadstone/{__version__}"),
]


@dataclass(frozen=True)
class FetchSettings:
    """Bounds of one fetch, and what is opened to it."""

    max_bytes: int = 16 * 2**20
    timeout_s: float = 10.0
    opened: Opened = field(default_factory=Opened)


class ImageFetcher:
    """Fetches images for a service; keeps connections for a few seconds. Belongs to the loop of its first fetch."""

    def __init__(
        self, settings: FetchSettings, resolve: Resolve | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self._settings = settings
        self._running = 0
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls or client_context(),
            max_connections=_MOST_CONNECTIONS,
            keepalive_expiry=_KEEP_ALIVE_S,
            network_backend=_GuardedNetwork(settings.opened, resolve or resolve_host),
        )

    async def fetch(self, url: object, param: str | None) -> bytes:
        """The body of a 200 answer, whatever type it claims to have.

        Raises BadAskError, naming ``param``, for a URL that is invalid, refused or unreachable, an answer other than
        200, one that is too large, and one that takes too long.
        """
        self._running += 1
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                return await self._follow(url)
        except _RefusedError as refused:
            raise BadAskError(f"the image URL: {refused}", param) from None
        except TimeoutError:
            raise BadAskError(f"the image did not arrive within {self._settings.timeout_s:g} s", param) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            raise BadAskError(f"the image cannot be fetched: {error or type(error).__name__}", param) from None
        finally:
            self._running -= 1

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.aclose()

    async def _follow(self, url: object) -> bytes:
        for _ in range(_MOST_REDIRECTS + 1):
            parts = _parse(url)
            answer = await self._get(_wire_url(parts))
            if isinstance(answer, bytes):
                return answer
            url = urljoin(parts.geturl(), answer)
        raise _RefusedError(f"more than {_MOST_REDIRECTS} redirects")

    async def _get(self, url: httpcore.URL) -> bytes | str:
        """The body, or where a redirect points."""
        host = url.host.decode()
        async with self._pool.stream("GET", url, headers=_HEADERS) as response:
            headers = {name.lower(): value for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in headers:
                return headers[b"location"].decode("utf-8", "replace")
            if response.status != 200:
                raise _RefusedError(f"{host} answered {response.status}, not 200")
            self._check_size(host, int(headers.get(b"content-length", b"0")))
            body = bytearray()
            async for part in response.aiter_stream():
                body += part
                self._check_size(host, len(body))
            return bytes(body)

    def _check_size(self, host: str, size: int) -> None:
        most = self._settings.max_bytes
        if size > most:
            raise _RefusedError(f"what {host} sends is larger than {most / 2**20:.3g} MiB")

    def __repr__(self) -> str:
        return f"<ImageFetcher, {self._running} running>"


async def resolve_host(host: str, port: int) -> list[str]:
    """The system's resolver: addresses in its order, each once. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for _, _, _, _, address in found))


class _RefusedError(Exception):
    """A URL that is not fetched; the message says why."""


class _GuardedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to checked addresses only."""

    def __init__(self, opened: Opened, resolve: Resolve) -> None:
        self._opened = opened
        self._resolve = resolve
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises _RefusedError, or httpcore's ConnectError or ConnectTimeout of the last address tried."""
        addresses = await self._checked(host, port)
        for address in addresses[:-1]:
            try:
                return await self._network.connect_tcp(address, port, _CONNECT_TIMEOUT_S)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._network.connect_tcp(addresses[-1], port, _CONNECT_TIMEOUT_S)

    async def _checked(self, host: str, port: int) -> list[str]:
        try:
            found = await self._resolve(host, port)
        except (OSError, UnicodeError):
            raise _RefusedError(f"the host {host} is unknown") from None
        # One bad address among good ones condemns the host: which one is tried first is the attacker's choice.
        for address in found:
            if why := complaint(host, port, address, self._opened):
                raise _RefusedError(f"the host {host} {why} (--image-url-allow opens a host or network)")
        if not found:
            raise _RefusedError(f"the host {host} has no address")
        return list(found[:_MOST_ADDRESSES])


def _parse(url: object) -> SplitResult:
    """Raises _RefusedError; the URL itself is not repeated, for it may hold a password."""
    if not isinstance(url, str):
        raise _RefusedError("not a string")
    if len(url) > _LONGEST_URL:
        raise _RefusedError(f"longer than {_LONGEST_URL} characters")
    # urlsplit drops tabs and line ends, and a backslash is a slash to some: what is read twice must read the same.
    if not url.isprintable() or any(character in url for character in " \\"):
        raise _RefusedError("has a blank, a backslash or a control character in it")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _RefusedError("is not a URL") from None
    if parts.scheme not in _PORTS:
        raise _RefusedError("does not begin with http:// or https://")
    if "@" in parts.netloc:
        raise _RefusedError("has a user or password in it")
    if not parts.hostname or port == 0:
        raise _RefusedError("has no host" if not parts.hostname else "has port 0")
    return parts


def _wire_url(parts: SplitResult) -> httpcore.URL:
    """What is sent and where, from the one parse, so that no second parser can see another host."""
    host = _host_of(parts.hostname or "")
    target = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
    return httpcore.URL(scheme=parts.scheme, host=host, port=parts.port or _PORTS[parts.scheme], target=target)


def _host_of(hostname: str) -> str:
    try:
        return str(ip_address(hostname))
    except ValueError:
        pass
    try:
        return host_key(hostname)
    except UnicodeError:
        raise _RefusedError("its host is no host name") from None
