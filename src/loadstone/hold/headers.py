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
_WHOLE = b"via: " + VIA + b"\r\nx-request-id: "
# A proxy before the gate must not hold events back.
_UNBUFFERED = b"\r\nx-accel-buffering: no\r\n"
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


def sane_id(given: bytes | None) -> bytes | None:
    """The client's own X-Request-Id where it is fit to be handed on."""
    if not given or len(given) > _MOST_REQUEST_ID:
        return None
    return given if given.translate(None, b"-_.:").isalnum() else None


def _of_all_hops(headers: list[Header]) -> list[Header]:
    """Without what ``Connection`` names."""
    for name, value in headers:
        if name == b"connection" and value.lower() not in _PLAIN_CONNECTION:
            named = connection_names(headers)
            return [header for header in headers if header[0] not in named]
    return headers


class UpstreamHead:
    """The head of a request as an upstream gets it, but for what is the request's own."""

    __slots__ = ("chain", "rest", "sized", "start")

    def __init__(self, start: bytes, sized: bool, chain: bytes, rest: bytes) -> None:
        self.start = start
        self.sized = sized
        """There is a Content-Length even if it is 0."""
        self.chain = chain
        """From the size to X-Forwarded-For."""
        self.rest = rest
        """From there to X-Request-Id."""

    def with_body(self, body: bytes, forwarded_for: bytes, request_id: bytes) -> bytes:
        """The whole request. ``forwarded_for``: all hops, the peer the last of them."""
        size = b"content-length: %d\r\n" % len(body) if body or self.sized else b""
        parts = (self.start, size, self.chain, forwarded_for, self.rest, request_id, b"\r\n\r\n", body)
        return b"".join(parts)


def upstream_head(
    method: str,
    target: bytes,
    headers: list[Header],
    *,
    netloc: bytes,
    proxied: bool,
    authorization: bytes | None,
    drop_authorization: bool,
) -> UpstreamHead:
    """The head of the request as the upstream gets it.

    ``proxied``: X-Forwarded-* came from a trusted proxy. ``authorization`` replaces the client's;
    ``drop_authorization`` hides a key that is the gate's own.
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
            elif name == b"x-forwarded-proto" and proxied and value in (b"http", b"https"):
                proto = value
            continue
        if hides_keys and name in _KEYS:
            continue
        lines.append(b"%b: %b\r\n" % (name, value))
    if authorization:
        lines.append(b"authorization: %b\r\n" % authorization)
    return UpstreamHead(
        b"".join(lines),
        method not in ("GET", "HEAD", "OPTIONS", "DELETE"),
        b"via: %b\r\nx-forwarded-for: " % via,
        b"\r\nx-forwarded-host: %b\r\nx-forwarded-proto: %b\r\nx-request-id: " % (host, proto),
    )


def header_pairs(lines: bytes) -> list[Header]:
    """Header lines taken apart again."""
    pairs = [line.partition(b": ") for line in lines.split(b"\r\n") if line]
    return [(name, value) for name, _, value in pairs]


def header_lines(headers: Iterable[Header]) -> bytes:
    """Headers as they go out, each line with its end."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


class ReplyLines:
    """The headers of an upstream's reply as the client gets them, but for what is the request's own."""

    __slots__ = ("last", "plain", "says_when", "streams", "with_rates")

    def __init__(self, streams: bool, says_when: bool, plain: bytes, with_rates: bytes, last: bytes) -> None:
        self.streams = streams
        """The body is a stream of events."""
        self.says_when = says_when
        """It tells when to come back."""
        self.plain = plain
        """To the place of the request's id."""
        self.with_rates = with_rates
        """The same where the client's standing with its quota here hides what the upstream says of its own."""
        self.last = last
        """Behind the id."""

    def of(self, request_id: bytes, rates: bytes) -> bytes:
        """As lines, each with its end; ``rates``: where the client stands with its quota here."""
        return b"".join((self.with_rates if rates else self.plain, request_id, self.last, rates))


def reply_lines(headers: list[Header]) -> ReplyLines:
    """From the upstream's headers, its hop-by-hop ones already removed."""
    kind = first(headers, b"content-type") or b""
    streams = kind.startswith(b"text/event-stream")
    plain, with_rates = [
        header_lines([header for header in headers if header[0] not in hidden]) + _WHOLE
        for hidden in (_NOT_RETURNED, _NOT_RETURNED_WITH_RATES)
    ]
    says_when = first(headers, b"retry-after") is not None
    return ReplyLines(streams, says_when, plain, with_rates, _UNBUFFERED if streams else b"\r\n")
