"""The head of a request: what was read out of it, and what is refused although httptools lets it through. Pure."""

from http import HTTPStatus

_METHODS = {name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")}
_JUDGED = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect"})


class RejectedError(Exception):
    """A request that is answered with ``status``, and its connection closed."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class RequestHead:
    """Everything before the body. Equal heads may share one, so it is only read."""

    __slots__ = ("expects_continue", "headers", "length", "method", "notes", "path", "query", "target", "version")

    def __init__(
        self,
        method: str,
        target: bytes,
        path: str,
        query: bytes,
        headers: list[tuple[bytes, bytes]],
        version: str,
        length: int | None,
        expects_continue: bool,
        notes: object = None,
    ) -> None:
        self.method = method
        self.target = target
        """As received: it may be absolute (``http://host/path``)."""
        self.path = path
        """Without the query; always that of the target, whatever form it had."""
        self.query = query
        self.headers = headers
        """In the order received, names in lower case, without trailers."""
        self.version = version
        """1.1 or 1.0."""
        self.length = length
        """Of the body, as announced; None: chunked."""
        self.expects_continue = expects_continue
        self.notes = notes
        """The handler's own, for what it makes of the head: kept as long as the head is."""


def checked_head(verb: bytes, target: bytes, headers: list[tuple[bytes, bytes]], version: str) -> RequestHead:
    """The head that httptools has read. Raises RejectedError for one that we don't serve."""
    method = _check_line(verb, target, version)
    length, expects = _check_headers(headers, version)
    path, query = _path_of(target)
    return RequestHead(method, target, path, query, headers, version, length, expects)


def _check_line(verb: bytes, target: bytes, version: str) -> str:
    """The method. Raises RejectedError for a request line that we don't serve."""
    if version not in ("1.1", "1.0"):
        raise RejectedError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f"HTTP/{version} is not served")
    method = _METHODS.get(verb)
    if method is None:
        raise RejectedError(HTTPStatus.NOT_IMPLEMENTED, f"the method {verb.decode()} is not served")
    origin_form = target.startswith(b"/") or (target == b"*" and method == "OPTIONS")
    if b"#" in target or not (origin_form or target.lower().startswith((b"http://", b"https://"))):
        raise RejectedError(HTTPStatus.BAD_REQUEST, "the request target is not a path")
    return method


def _check_headers(headers: list[tuple[bytes, bytes]], version: str) -> tuple[int | None, bool]:
    """The length of the body (None: chunked) and whether 100 Continue is expected. Raises RejectedError."""
    length: int | None = 0
    hosts = 0
    codings: list[bytes] = []
    expects = False
    for name, value in headers:
        if name not in _JUDGED:
            continue
        if name == b"host":
            hosts += 1
        elif name == b"content-length":
            length = int(value)
        elif name == b"transfer-encoding":
            codings.append(value.lower())
        elif version == "1.1":
            expects = _expects_continue(value)
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        raise RejectedError(HTTPStatus.BAD_REQUEST, f"{hosts} Host headers")
    if codings:
        _check_codings(codings, version)
        length = None
    return length, expects


def _check_codings(codings: list[bytes], version: str) -> None:
    if version != "1.1" or len(codings) > 1:
        raise RejectedError(HTTPStatus.BAD_REQUEST, "Transfer-Encoding is repeated, or of HTTP/1.0")
    if codings != [b"chunked"]:
        raise RejectedError(HTTPStatus.NOT_IMPLEMENTED, "the only Transfer-Encoding served is chunked")


def _expects_continue(value: bytes) -> bool:
    if value.lower() != b"100-continue":
        raise RejectedError(HTTPStatus.EXPECTATION_FAILED, "the only expectation served is 100-continue")
    return True


def _path_of(target: bytes) -> tuple[str, bytes]:
    """Path and query of any form of target; an absolute one without a path means ``/``."""
    if not target.startswith((b"/", b"*")):
        _scheme, _, rest = target.partition(b"://")
        start = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
        target = rest[start:]
        if not target.startswith(b"/"):
            target = b"/" + target
    path, _, query = target.partition(b"?")
    return path.decode("latin-1"), query
