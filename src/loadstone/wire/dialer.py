"""Opening connections to one server: its addresses in turn, TLS, one time-out over all of it, one line on failure."""

import asyncio
import errno
import socket
import ssl
import time

from loadstone.core.errors import UnreachableError
from loadstone.wire.causes import OURS, tls_failure
from loadstone.wire.origin import Address, Origin
from loadstone.wire.tls import TlsLayer, client_context

_ADDRESSES_LAST_S = 30.0
_READ_BYTES = 65_536


class Dialer:
    """Dials ``origin``, whose name is looked up again after 30 s and after every failure."""

    def __init__(self, origin: Origin, tls: ssl.SSLContext | None, timeout_s: float) -> None:
        self._origin = origin
        self._tls = (tls or client_context()) if origin.scheme == "https" else None
        self._timeout_s = timeout_s
        self._addresses: list[Address] = []
        self._looked_up_s = 0.0
        self._lookup = asyncio.Lock()

    async def dial(self) -> tuple[socket.socket, TlsLayer | None]:
        """A connected non-blocking socket and, for https, the TLS that has been agreed on over it.

        Raises UnreachableError with one line that names the server and the cause.
        """
        missing = "could not be looked up"
        netloc = self._origin.netloc
        try:
            async with asyncio.timeout(self._timeout_s):
                addresses = await self._resolve()
                missing = "did not accept a connection"
                sock = await self._connect(addresses)
                if self._tls is None:
                    return sock, None
                missing = "did not finish the TLS handshake"
                return sock, await self._secure(sock, self._tls)
        except TimeoutError:
            reason = f"{netloc} {missing} within {self._timeout_s:g} s"
        except ssl.SSLError as error:
            reason = f"{netloc}: {tls_failure(error)}"
        except OSError as error:
            reason = _why_not(error, self._origin)
        self._addresses = []
        raise UnreachableError(reason)

    async def _resolve(self) -> list[Address]:
        async with self._lookup:
            if not self._addresses or time.monotonic() - self._looked_up_s > _ADDRESSES_LAST_S:
                self._addresses = await _look_up(self._origin)
                self._looked_up_s = time.monotonic()
            return self._addresses

    async def _connect(self, addresses: list[Address]) -> socket.socket:
        """The first address that accepts, which is tried first from then on. Raises the last one's OSError."""
        failure = OSError("its name has no address")
        for address in tuple(addresses):
            try:
                async with asyncio.timeout(self._timeout_s / len(addresses)):
                    sock = await _connect_to(*address)
            except OSError as error:
                failure = error
            else:
                addresses.remove(address)
                addresses.insert(0, address)
                return sock
        raise failure

    async def _secure(self, sock: socket.socket, context: ssl.SSLContext) -> TlsLayer:
        loop = asyncio.get_running_loop()
        try:
            tls = TlsLayer(context, self._origin.host)
            established = tls.handshake()
            while not established:
                await loop.sock_sendall(sock, tls.pending())
                received = await loop.sock_recv(sock, _READ_BYTES)
                if not received:
                    raise ConnectionResetError(errno.ECONNRESET, "closed during the TLS handshake")
                established = tls.handshake(received)
            await loop.sock_sendall(sock, tls.pending())
        except BaseException:
            sock.close()
            raise
        return tls

    def __repr__(self) -> str:
        return f"<Dialer {self._origin.netloc}, {len(self._addresses)} addresses known>"


async def _look_up(origin: Origin) -> list[Address]:
    try:  # an address in figures needs no resolver, and so no thread
        found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    return [(family, address) for family, _, _, _, address in found]


async def _connect_to(family: socket.AddressFamily, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, address)  # type: ignore[arg-type]
    except BaseException:
        sock.close()
        raise
    return sock


def _why_not(error: OSError, origin: Origin) -> str:
    netloc = origin.netloc
    if isinstance(error, socket.gaierror):
        return f"host {origin.host!r} of {netloc} is unknown ({error.strerror})"
    if error.errno == errno.ECONNREFUSED:
        return f"{netloc} refused the connection"
    if error.errno in OURS:
        return f"no connection to {netloc}: {OURS[error.errno]}"
    return f"no connection to {netloc}: {(error.strerror or str(error)).lower()}"
