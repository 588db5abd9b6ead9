"""Whose request it is and what it is about: read from its head, once for all requests under the same head."""

from urllib.parse import unquote

from loadstone.hold.api_keys import ApiKey, ApiKeys, without_admin_key
from loadstone.hold.clients import Callers
from loadstone.hold.headers import Header, UpstreamHead, relayed_target, sane_id
from loadstone.hold.shaping import Kind, kind_of
from loadstone.wire.server import RequestHead

_READ = frozenset((b"content-type", b"content-encoding", b"x-request-id", b"x-forwarded-for"))
_METADATA = "/models"
_SAFE = ("GET", "HEAD", "OPTIONS")
_WITH_BODY = ("POST", "PUT", "PATCH")
_MOST_PEERS = 1024


class Asked:
    """What the gate makes of a head."""

    __slots__ = (
        "accounts",
        "content_encoding",
        "forwarded_for",
        "headers",
        "key",
        "kind",
        "known",
        "metadata",
        "method",
        "request_id",
        "target",
        "written",
    )

    def __init__(
        self,
        method: str,
        target: bytes,
        headers: list[Header],
        content_encoding: bytes | None,
        request_id: bytes | None,
        forwarded_for: list[bytes],
        key: ApiKey | None,
        known: bool,
        kind: Kind | None,
        metadata: bool,
        accounts: dict[str, "Account"],
        written: dict[tuple[str, bool], UpstreamHead],
    ) -> None:
        self.method = method
        self.target = target
        """As a server takes it."""
        self.headers = headers
        """As they may go on."""
        self.content_encoding = content_encoding
        self.request_id = request_id
        """The client's own, where it has a sane one."""
        self.forwarded_for = forwarded_for
        self.key = key
        """The valid key that it shows."""
        self.known = known
        """It shows one, or none is wanted."""
        self.kind = kind
        """Of its body; None where it has none that counts."""
        self.metadata = metadata
        """It only asks what there is: that costs nothing."""
        self.accounts = accounts
        """Whose requests came under this head, by the address of the peer."""
        self.written = written
        """Its heads for upstreams that it was sent to before, by URL and whether it came through a trusted proxy."""


def read_asked(head: RequestHead, keys: ApiKeys | None, admin_key: str, *, admin: bool) -> Asked:
    """``admin``: it shows the admin key, which goes no further."""
    content_type = content_encoding = request_id = None
    forwarded_for: list[bytes] = []
    for name, value in head.headers:
        if name not in _READ:
            continue
        if name == b"content-type":
            content_type = content_type or value
        elif name == b"x-request-id":
            request_id = request_id or value
        elif name == b"x-forwarded-for":
            forwarded_for.append(value)
        else:
            content_encoding = content_encoding or value
    key = None if keys is None else keys.identify(head.headers)
    # A server reads a path without its percent signs, and so must who holds it to limits.
    path = unquote(head.path) if "%" in head.path else head.path
    return Asked(
        head.method,
        relayed_target(head.target, head.path, head.query),
        without_admin_key(head.headers, admin_key) if admin else head.headers,
        content_encoding,
        sane_id(request_id),
        forwarded_for,
        key,
        keys is None or key is not None,
        kind_of(path, content_type) if head.method in _WITH_BODY else None,
        head.method in _SAFE and head.path.rstrip("/").endswith(_METADATA),
        {},
        {},
    )


class Account:
    """Whose request it is."""

    __slots__ = ("address", "client", "forwarded_for", "known", "priority", "proxied")

    def __init__(
        self,
        client: str,
        address: str,
        forwarded_for: bytes,
        proxied: bool,
        priority: int,
        known: bool,
    ) -> None:
        self.client = client
        """Whom quotas and turns are counted for."""
        self.address = address
        self.forwarded_for = forwarded_for
        """X-Forwarded-For as it goes on."""
        self.proxied = proxied
        """A trusted proxy says on whose behalf it asks."""
        self.priority = priority
        self.known = known
        """It showed a valid key, where one is wanted."""


def account_of(peer: str, asked: Asked, callers: Callers) -> Account:
    """Who asks: by key where keys are wanted, else by address."""
    account = asked.accounts.get(peer)
    if account is None:
        if len(asked.accounts) >= _MOST_PEERS:
            asked.accounts.clear()
        account = asked.accounts[peer] = _identify(peer, asked, callers)
    return account


def _identify(peer: str, asked: Asked, callers: Callers) -> Account:
    caller, key = callers.find(peer, asked.forwarded_for), asked.key
    proxied = caller.proxied and bool(asked.forwarded_for)
    client, priority = (caller.key, 0) if key is None else (f"key:{key.name}", key.priority)
    return Account(client, caller.address, caller.forwarded_for, proxied, priority, asked.known)
