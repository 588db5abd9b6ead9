"""Header hygiene in both directions. Pure: lists of (lower-case name, value) in, bytes or lists out.

What belongs to one connection stays there (RFC 9110, 7.6.1); the gate names itself in ``Via``; what a client claims
about its own address is not believed, only added to by proxies that are trusted.
"""

from collections.abc import Iterable

from loadstone.hold.rate_headers import NAMES as RATE_NAMES

Header = tuple[bytes, bytes]

VIA = b"1.1 loadstone"
_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    )
)
_OURS = frozenset(
    (
        # Framing and address are written anew; a compressed reply would hide its usage from the gate.
        b"host",
        b"content-length",
        b"expect",
        b"accept-encoding",
        b"via",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-real-ip",
        b"forwarded",
        b"x-request-id",
        b"x-loadstone-admin",
    )
)
_NOT_FORWARDED = _HOP_BY_HOP | _OURS
_NOT_RETURNED = frozenset((b"server", b"x-request-id", b"x-accel-buffering", b"via", b"x-loadstone-reason"))
_NOT_RETURNED_WITH_RATES = _NOT_RETURNED | RATE_NAMES
_WHOLE = b"via: " + VIA + b"\r\nx-request-id: %b\r\n"
_STREAMED = _WHOLE + b"x-accel-buffering: no\r\n"
_PLAIN_CONNECTION = frozenset((b"keep-alive", b"close"))
_KEYS = frozenset((b"authorization", b"x-api-key"))
_MOST_REQUEST_ID = 128


def connection_names(headers: Iterable[Header]) -> frozenset[bytes]:
    """Further headers that ``Connection`` ties to this hop."""
    named = [value for name, value in headers if name == b"connection"]
    return frozenset(part.strip().lower() for value in named for part in value.split(b","))


def first(headers: Iterable[Header], name: bytes) -> bytes | None:
    """The first value of a header, by its lower-case name."""
    return next((value for key, value in headers if key == name), None)


def relayed_target(target: bytes, path: str, query: bytes) -> bytes:
    """The target as a server takes it, also where the client sent one with scheme and host."""
    if target.startswith((b"/", b"*")):
        return target
    return path.encode("latin-1") + (b"?" + query if query else b"")


def request_id(given: bytes | None, fresh: bytes) -> bytes:
    """The client's own id where it is sane, else ``fresh``."""
    if not given or len(given) > _MOST_REQUEST_ID:
        return fresh
    return given if given.translate(None, b"-_.:").isalnum() else fresh


def _of_all_hops(headers: list[Header]) -> list[Header]:
    """Without what ``Connection`` names."""
    for name, value in headers:
        if name == b"connection" and value.lower() not in _PLAIN_CONNECTION:
            named = connection_names(headers)
            return [header for header in headers if header[0] not in named]
    return headers


def upstream_head(
    method: str,
    target: bytes,
    headers: list[Header],
    *,
    netloc: bytes,
    length: int,
    request_id: bytes,
    peer: bytes,
    forwarded: list[bytes],
    authorization: bytes | None,
    drop_authorization: bool,
) -> bytes:
    """The head of the request as the upstream gets it.

    ``forwarded``: the values of X-Forwarded-For that came from a trusted proxy, empty where the peer is none.
    ``authorization`` replaces the client's; ``drop_authorization`` hides a key that is the gate's own.
    """
    hides_keys = drop_authorization or authorization is not None
    lines = [b"%b %b HTTP/1.1\r\nhost: %b\r\n" % (method.encode("ascii"), target, netloc)]
    host, proto, via = b"", b"http", VIA
    for name, value in _of_all_hops(headers):
        if name in _NOT_FORWARDED:
            if name == b"host":
                host = value
            elif name == b"via":
                via = b"%b, %b" % (value, via)
            elif name == b"x-forwarded-proto" and forwarded and value in (b"http", b"https"):
                proto = value
            continue
        if hides_keys and name in _KEYS:
            continue
        lines.append(b"%b: %b\r\n" % (name, value))
    if authorization:
        lines.append(b"authorization: %b\r\n" % authorization)
    if length or method not in ("GET", "HEAD", "OPTIONS", "DELETE"):
        lines.append(b"content-length: %d\r\n" % length)
    chain = b", ".join([*forwarded, peer]) if peer else b", ".join(forwarded)
    lines.append(
        b"via: %b\r\nx-forwarded-for: %b\r\nx-forwarded-host: %b\r\nx-forwarded-proto: %b\r\nx-request-id: %b\r\n\r\n"
        % (via, chain, host, proto, request_id)
    )
    return b"".join(lines)


def header_pairs(lines: bytes) -> list[Header]:
    """Header lines taken apart again."""
    pairs = (line.partition(b": ") for line in lines.split(b"\r\n") if line)
    return [(name, value) for name, _, value in pairs]


def header_lines(headers: Iterable[Header]) -> bytes:
    """Headers as they go out, each line with its end."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def reply_lines(headers: list[Header], request_id: bytes, *, streams: bool, rates: bytes) -> bytes:
    """The upstream's headers (its hop-by-hop ones already removed) as the client gets them, as lines.

    ``rates``: where the client stands with its quota here, which hides what the upstream says of its own.
    """
    hidden = _NOT_RETURNED_WITH_RATES if rates else _NOT_RETURNED
    lines = [b"%b: %b\r\n" % header for header in headers if header[0] not in hidden]
    # A proxy before the gate must not hold events back.
    ours = _STREAMED if streams else _WHOLE
    lines.append(ours % request_id)
    lines.append(rates)
    return b"".join(lines)
