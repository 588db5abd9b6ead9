"""Why a connection failed, in one line that a person can act on."""

import errno
import ssl

from loadstone.core.target import Break

OURS = {
    errno.EMFILE: "this machine: too many open files for this process (raise ulimit -n)",
    errno.ENFILE: "this machine: too many open files in the system (raise fs.file-max)",
    errno.EADDRNOTAVAIL: "this machine: no local port left (widen net.ipv4.ip_local_port_range)",
    errno.ENOBUFS: "this machine: no buffer space for the socket",
    errno.ENOMEM: "this machine: no memory for the socket",
}
"""Errors of this machine: they say nothing of the server."""

UNREAD = "bytes waited unread past the time-out"


def why_no_connection(error: OSError | None, netloc: str) -> tuple[Break, str]:
    code = error.errno if error is not None else None
    if code in OURS:
        return Break.CLIENT, OURS[code]
    if code == errno.ECONNREFUSED:
        return Break.CONNECT, f"connection refused by {netloc}"
    reason = error.strerror if error is not None else "no address"
    return Break.CONNECT, f"no connection to {netloc}: {(reason or 'unknown error').lower()}"


def how_it_ended(error: OSError | None, status: int, silent: bool) -> str:
    how = "the server reset the connection" if error is not None else "the server closed the connection"
    if silent:
        return f"{how} before it answered"
    return f"{how} in the middle of the {'reply' if status else 'response head'}"


def tls_failure(error: ssl.SSLError) -> str:
    """The reason of a TLS failure, without OpenSSL's source positions."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS failed: certificate verify failed: {error.verify_message} (SSL_CERT_FILE names those to trust)"
    reason = (error.reason or str(error)).replace("_", " ").lower()
    if reason in ("wrong version number", "record layer failure"):
        return "TLS failed: the server does not speak TLS on this port (try http://)"
    return f"TLS failed: {reason}"
