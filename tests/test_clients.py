"""Who asks, by address: tables of honest and hostile chains."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.errors import UsageError
from loadstone.hold.clients import Caller, Callers, TrustedProxies, client_address, client_key

NOBODY = TrustedProxies()
OURS = TrustedProxies.parse(["10.0.0.0/8", "2001:db8:1::/48", "192.0.2.7"])


@pytest.mark.parametrize("trusted", [NOBODY, OURS])
@pytest.mark.parametrize(
    "forwarded",
    [
        [],
        [b"1.2.3.4"],
        [b"127.0.0.1, 10.0.0.1"],
        [b"10.0.0.1", b"10.0.0.2"],
        [b""],
        [b",,,"],
        [b"\xff\xfe\x00"],
        [b"1.2.3.4," * 10_000],
    ],
)
def test_what_a_stranger_forwards_changes_nothing(trusted: TrustedProxies, forwarded: list[bytes]) -> None:
    assert client_address("203.0.113.9", forwarded, trusted) == "203.0.113.9"


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [b"1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", [b" 1.2.3.4\t"], "1.2.3.4"),
        ("192.0.2.7", [b"1.2.3.4"], "1.2.3.4"),
        ("192.0.2.8", [b"1.2.3.4"], "192.0.2.8"),
        # A client that writes a chain of its own is found behind it; the leftmost is never taken unasked.
        ("10.0.0.1", [b"6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", [b"10.6.6.6, 1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", [b"6.6.6.6, 1.2.3.4, 10.0.0.2"], "1.2.3.4"),
        # Several headers are one list, in the order received.
        ("10.0.0.1", [b"6.6.6.6", b"1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", [b"6.6.6.6, 1.2.3.4", b"10.0.0.3, 10.0.0.2"], "1.2.3.4"),
        # All of them ours: the one farthest away.
        ("10.0.0.1", [b"10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        # Junk ends the walk at the last hop that was an address.
        ("10.0.0.1", [b"unknown"], "10.0.0.1"),
        ("10.0.0.1", [b"1.2.3.4, unknown"], "10.0.0.1"),
        ("10.0.0.1", [b"1.2.3.4, _hidden, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [b"1.2.3.4,"], "10.0.0.1"),
        ("10.0.0.1", [b"", b"1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", [b"1.2.3.4", b""], "10.0.0.1"),
        ("10.0.0.1", [b"1.2.3.4.5"], "10.0.0.1"),
        ("10.0.0.1", [b"010.0.0.2"], "10.0.0.1"),
        ("10.0.0.1", [b"1.2.3"], "10.0.0.1"),
        ("10.0.0.1", [b"16909060"], "10.0.0.1"),
        ("10.0.0.1", [b"1.2.3.4; DROP TABLE"], "10.0.0.1"),
        ("10.0.0.1", [b"1.2.3.4\x00"], "10.0.0.1"),
        ("10.0.0.1", ["１.2.3.4".encode()], "10.0.0.1"),
        ("10.0.0.1", [b"1.2.3.4:"], "10.0.0.1"),
        ("10.0.0.1", [b"1.2.3.4:99999999"], "10.0.0.1"),
        ("10.0.0.1", [b"1.2.3.4:http"], "10.0.0.1"),
        ("10.0.0.1", [b'"[2001:db8::1]"'], "10.0.0.1"),
        ("10.0.0.1", [b"[2001:db8::1"], "10.0.0.1"),
        ("10.0.0.1", [b"[2001:db8::1]80"], "10.0.0.1"),
        ("10.0.0.1", [b"[]"], "10.0.0.1"),
        ("10.0.0.1", [b"2001:db8::1::2"], "10.0.0.1"),
        # Ports, brackets, zones and IPv4 in IPv6 clothes.
        ("10.0.0.1", [b"1.2.3.4:5678"], "1.2.3.4"),
        ("10.0.0.1", [b"2001:DB8:0:0::5"], "2001:db8::5"),
        ("10.0.0.1", [b"[2001:db8::5]"], "2001:db8::5"),
        ("10.0.0.1", [b"[2001:db8::5]:443"], "2001:db8::5"),
        ("10.0.0.1", [b"fe80::1%eth0"], "fe80::1"),
        ("10.0.0.1", [b"[fe80::1%25eth0]:443"], "fe80::1"),
        ("10.0.0.1", [b"::ffff:1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", [b"1.2.3.4, ::ffff:10.0.0.2"], "1.2.3.4"),
        ("::ffff:10.0.0.1", [b"1.2.3.4"], "1.2.3.4"),
        ("2001:db8:1::1", [b"1.2.3.4, 2001:db8:1::2"], "1.2.3.4"),
        ("2001:db8:2::1", [b"1.2.3.4"], "2001:db8:2::1"),
        ("fe80::1%eth0", [b"1.2.3.4"], "fe80::1"),
        # A Unix socket has no address, and is no proxy by address.
        ("", [b"1.2.3.4"], "unknown"),
        ("somewhere", [b"1.2.3.4"], "somewhere"),
    ],
)
def test_the_chain_is_walked_from_the_right_through_trusted_hops_only(
    peer: str, forwarded: list[bytes], address: str
) -> None:
    assert client_address(peer, forwarded, OURS) == address


def test_a_chain_of_ten_thousand_hops_ends_after_thirty_two() -> None:
    hops = [f"10.1.{i >> 8}.{i & 255}" for i in range(10_000)]
    assert client_address("10.0.0.1", [", ".join(hops).encode()], OURS) == hops[-32]
    assert client_address("10.0.0.1", [hop.encode() for hop in hops], OURS) == hops[-32]


@given(st.lists(st.binary(max_size=40), max_size=5), st.ip_addresses(v=4))
def test_no_bytes_whatever_break_the_walk_or_fool_it(forwarded: list[bytes], real: ipaddress.IPv4Address) -> None:
    address = client_address("10.0.0.1", forwarded, OURS)
    assert str(ipaddress.ip_address(address)) == address
    if real not in OURS:
        assert client_address("10.0.0.1", [*forwarded, str(real).encode()], OURS) == str(real)


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8::1", "2001:db8::/64"),
        ("::1", "::/64"),
        ("unknown", "unknown"),
        ("some:where", "some:where"),
    ],
)
def test_ipv6_clients_are_counted_by_their_64(address: str, key: str) -> None:
    assert client_key(address) == key


@pytest.mark.parametrize("bad", ["10.0.0.0/33", "10.0.0.1/8", "proxy.example", "", "10.0.0.0/8,192.0.2.0/24", "::/129"])
def test_a_bad_network_is_named(bad: str) -> None:
    with pytest.raises(UsageError, match=r"^--trusted-proxy: .*; give a network such as 10\.0\.0\.0/8") as caught:
        TrustedProxies.parse(["10.0.0.0/8", bad])
    assert repr(bad) in str(caught.value) or bad in str(caught.value)


def test_a_mapped_network_is_the_one_it_maps() -> None:
    trusted = TrustedProxies.parse(["::ffff:10.0.0.0/104", " 2001:db8::1 "])
    assert repr(trusted) == "<TrustedProxies 10.0.0.0/8, 2001:db8::1/128>"
    assert repr(NOBODY) == "<TrustedProxies none>"


def test_callers_are_remembered_but_never_too_many_nor_too_long() -> None:
    callers = Callers(OURS)
    for _ in range(2):
        assert callers.find("1.2.3.4", [b"6.6.6.6"]) == Caller("1.2.3.4", "1.2.3.4", False, b"1.2.3.4")
        assert callers.find("10.0.0.1", [b"2001:db8:5::6"]) == Caller(
            "2001:db8:5::6", "2001:db8:5::/64", True, b"2001:db8:5::6, 10.0.0.1"
        )
        assert callers.find("10.0.0.1", []) == Caller("10.0.0.1", "10.0.0.1", True, b"10.0.0.1")
        assert callers.find("10.0.0.1", [b"x" * 10_000]) == Caller(
            "10.0.0.1", "10.0.0.1", True, b"x" * 10_000 + b", 10.0.0.1"
        )
    assert repr(callers).endswith(", 3 remembered>")
    for i in range(16_384 + 10):
        assert callers.find(f"203.0.{i >> 8}.{i & 255}", []).address == f"203.0.{i >> 8}.{i & 255}"
    remembered = int(repr(callers).split()[-2])
    assert 0 < remembered <= 16_384


def test_without_trusted_proxies_a_forged_chain_is_not_even_looked_at() -> None:
    callers = Callers(NOBODY)
    for i in range(100):
        assert callers.find("1.2.3.4", [b"6.6.6.%d" % i]) == Caller("1.2.3.4", "1.2.3.4", False, b"1.2.3.4")
    assert repr(callers) == "<Callers behind <TrustedProxies none>, 1 remembered>"
