"""Which addresses a server may connect to on a stranger's behalf: public ones, and what the operator opened.

The list is ours because ``ipaddress.is_global`` changes with the Python version and calls multicast, 6to4 and NAT64
global.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from loadstone.core.errors import UsageError

_PUBLIC_PORTS = (80, 443)
"""Elsewhere, what answers is seldom an image and may be a mail server."""

_NOT_PUBLIC = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; Alibaba Cloud's metadata service
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's platform, public in form only
        "169.254.0.0/16",  # link-local; the clouds' metadata service
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments; Oracle Cloud's metadata service
        "192.0.2.0/24",  # documentation, as the two below that end in .100 and .113
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",  # multicast, reserved, broadcast
    )
)
_PUBLIC_V6 = IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo and ORCHID among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class Opened:
    """What the operator opened beside the public internet, on every port."""

    hosts: frozenset[str] = frozenset()
    """Names, in lower case."""
    networks: tuple[IPv4Network | IPv6Network, ...] = ()


def parse_opened(entries: Sequence[str], flag: str = "--image-url-allow") -> Opened:
    """Host names, addresses and networks. Raises UsageError for what is none of them."""
    hosts, networks = set(), []
    for entry in entries:
        try:
            networks.append(ip_network(entry))
        except ValueError as error:
            if not _is_name(entry):
                raise UsageError(f"{flag}: {error}; give a host or a network, cdn.internal or 10.1.0.0/16") from None
            hosts.add(host_key(entry))
    return Opened(frozenset(hosts), tuple(networks))


def _is_name(entry: str) -> bool:
    """Not a network with a slip in it, not a URL, no port. A last label of digits is a mistyped address."""
    try:
        labels = host_key(entry).split(".")
    except UnicodeError:
        return False
    return all(label.replace("-", "").replace("_", "").isalnum() for label in labels) and not labels[-1].isdigit()


def host_key(host: str) -> str:
    """The one spelling of a host: lower case, IDNA, no final dot. Raises UnicodeError where it is no host name."""
    return host.removesuffix(".").encode("idna").decode().lower()


def complaint(host: str, port: int, address: str, opened: Opened) -> str:
    """Why ``host`` (as ``host_key`` spells it), which resolves to ``address``, is not connected to; "" where it is."""
    found = ip_address(address)
    if host in opened.hosts or any(found in network for network in opened.networks):
        return ""
    if not is_public(found):
        return "is not on the public internet"
    if port not in _PUBLIC_PORTS:
        return f"is asked for on port {port}, not {_PUBLIC_PORTS[0]} or {_PUBLIC_PORTS[1]}"
    return ""


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether it can only belong to the public internet; an IPv4 address inside an IPv6 one is judged as itself."""
    if isinstance(address, IPv6Address):
        inner = _inner(address)
        if inner is None:
            return address in _PUBLIC_V6 and not any(address in network for network in _NOT_PUBLIC_V6)
        address = inner
    return not any(address in network for network in _NOT_PUBLIC)


def _inner(address: IPv6Address) -> IPv4Address | None:
    """What a mapped or NAT64 address stands for: a network without IPv4 sees every IPv4 host as NAT64."""
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped
