"""Who asks, by address: through trusted proxies only, IPv6 by /64. Pure."""

import ipaddress
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from loadstone.core.errors import UsageError

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_MOST_HOPS = 32
"""No sane chain of proxies is longer; one of 10,000 hops must not cost 10,000 hops."""
_IPV4_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
_IPV6_HOST_BITS = 64
_NOBODY = "unknown"

_MOST_REMEMBERED = 16_384
_LONGEST_REMEMBERED = 256


class TrustedProxies:
    """The networks whose ``X-Forwarded-For`` is believed."""

    def __init__(self, networks: Sequence[_Network] = ()) -> None:
        self._networks = tuple(networks)

    @classmethod
    def parse(cls, cidrs: Sequence[str]) -> "TrustedProxies":
        """From ``10.0.0.0/8``, ``2001:db8::/32`` or single addresses. Raises UsageError, naming the bad one."""
        return cls([_network(cidr) for cidr in cidrs])

    def __bool__(self) -> bool:
        return bool(self._networks)

    def __contains__(self, address: _Address) -> bool:
        return any(address in network for network in self._networks)

    def __repr__(self) -> str:
        return f"<TrustedProxies {', '.join(map(str, self._networks)) or 'none'}>"


def _network(cidr: str) -> _Network:
    try:
        network = ipaddress.ip_network(cidr.strip())
    except ValueError as error:
        raise UsageError(f"--trusted-proxy: {error}; give a network such as 10.0.0.0/8, or an address") from None
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_IPV4_MAPPED):
        address = ipaddress.IPv4Address(int(network.network_address) & 0xFFFF_FFFF)
        return ipaddress.IPv4Network((address, network.prefixlen - _IPV4_MAPPED.prefixlen))
    return network


def client_address(peer: str, forwarded_for: Sequence[bytes], trusted: TrustedProxies) -> str:
    """The address of the client: the nearest hop that is not one of our proxies.

    ``peer`` is the other end of the connection, ``forwarded_for`` all values of X-Forwarded-For in their order. Each
    proxy appends whom it was asked by, so the chain is walked from its right end, and only as long as the hop that
    vouches for the next one is trusted. What is no address ends the walk at the last hop that was one.
    """
    hop = _parse(peer)
    if hop is None:
        return peer or _NOBODY
    for text in _from_the_right(forwarded_for):
        if hop not in trusted:
            break
        before = _parse(text)
        if before is None:
            break
        hop = before
    return str(hop)


def _from_the_right(forwarded_for: Sequence[bytes]) -> Iterator[str]:
    hops = 0
    for value in reversed(forwarded_for):
        for part in reversed(value.rsplit(b",", _MOST_HOPS)):
            if hops == _MOST_HOPS:
                return
            hops += 1
            yield part.decode("latin-1")


def _parse(text: str) -> _Address | None:
    """An address with or without brackets, port and zone; an IPv4 address in IPv6 clothes is taken out of them."""
    text = text.strip(" \t")
    if text.startswith("["):
        text, closed, rest = text[1:].partition("]")
        if not closed or (rest and not _is_port(rest)):
            return None
    elif text.count(":") == 1:
        text, colon, port = text.partition(":")
        if not _is_port(colon + port):
            return None
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_port(text: str) -> bool:
    digits = text.removeprefix(":")
    return text.startswith(":") and digits.isascii() and digits.isdigit() and len(digits) <= 5


def client_key(address: str) -> str:
    """What quotas are counted under: an IPv6 client has a whole /64 to choose addresses from, so that is its key."""
    if ":" not in address:
        return address
    try:
        number = int(ipaddress.IPv6Address(address))
    except ValueError:
        return address
    return f"{ipaddress.IPv6Address(number >> _IPV6_HOST_BITS << _IPV6_HOST_BITS)}/64"


class Caller(NamedTuple):
    """Who asks, as far as addresses tell."""

    address: str
    key: str
    proxied: bool
    """The peer is a trusted proxy: its X-Forwarded-* headers are believed."""
    forwarded_for: bytes
    """X-Forwarded-For as it goes on: the peer, behind what a trusted one says."""


class Callers:
    """``client_address`` and ``client_key`` of each request; short ones are remembered, up to 16,384 of them."""

    def __init__(self, trusted: TrustedProxies) -> None:
        self._trusted = trusted
        self._known: dict[str | tuple[str | bytes, ...], Caller] = {}

    def find(self, peer: str, forwarded_for: Sequence[bytes]) -> Caller:
        """Who asks."""
        asked: str | tuple[str | bytes, ...] = peer
        if forwarded_for and self._trusted:
            asked = (peer, *forwarded_for)
        caller = self._known.get(asked)
        if caller is None:
            caller = self._identify(peer, forwarded_for)
            if isinstance(asked, str) or sum(len(part) + 8 for part in asked) <= _LONGEST_REMEMBERED:
                if len(self._known) >= _MOST_REMEMBERED:
                    self._known.clear()
                self._known[asked] = caller
        return caller

    def _identify(self, peer: str, forwarded_for: Sequence[bytes]) -> Caller:
        address = client_address(peer, forwarded_for, self._trusted)
        hop = _parse(peer)
        proxied = hop is not None and hop in self._trusted
        chain = [*(forwarded_for if proxied else ()), *([peer.encode("ascii", "replace")] if peer else [])]
        return Caller(address, client_key(address), proxied, b", ".join(chain))

    def __repr__(self) -> str:
        return f"<Callers behind {self._trusted!r}, {len(self._known)} remembered>"
