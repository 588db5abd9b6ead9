"""TLS without a socket: ciphertext in, plaintext out, so that each read keeps its own time-stamp."""

import ssl


class TlsLayer:
    """The client side of one TLS connection over memory.

    What TLS itself wants sent (``pending``) is the caller's to send. Errors are ``ssl.SSLError``.
    """

    __slots__ = ("_in", "_out", "_tls", "ended")

    def __init__(self, context: ssl.SSLContext, hostname: str) -> None:
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=hostname)
        self.ended = False
        """The server said that it will send no more."""

    def handshake(self, received: bytes | memoryview = b"") -> bool:
        """Take the handshake one step on; True once it stands. Raises ``ssl.SSLError``."""
        if received:
            self._in.write(received)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def encrypt(self, data: bytes) -> bytes:
        """Ciphertext to be sent for ``data``. Raises ``ssl.SSLError``."""
        self._tls.write(data)
        return self._out.read()

    def decrypt(self, received: bytes | memoryview) -> bytes:
        """Plaintext of all complete records received so far, often empty. Raises ``ssl.SSLError``."""
        self._in.write(received)
        parts = []
        try:
            while part := self._tls.read(65_536):
                parts.append(part)
            self.ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.ended = True
        return b"".join(parts)

    def pending(self) -> bytes:
        """Ciphertext that TLS itself wants sent: handshake, key updates, alerts."""
        return self._out.read()


def client_context() -> ssl.SSLContext:
    """Verifies against the system's authorities (``SSL_CERT_FILE`` adds others) and offers HTTP/1.1 only."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
