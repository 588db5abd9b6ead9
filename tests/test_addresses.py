"""Which addresses a server may connect to for a stranger."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.errors import UsageError
from loadstone.serve.addresses import Opened, complaint, host_key, is_public, parse_opened

PRIVATE = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
]
PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "192.167.255.255",
    "192.169.0.0",
    "223.255.255.255",
    "2606:4700::1111",
    "2a00:1450::1",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_not_public(address: str) -> None:
    assert not is_public(ip_address(address))
    assert complaint("a.test", 443, address, Opened()) == "is not on the public internet"


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address: str) -> None:
    assert is_public(ip_address(address))
    assert complaint("a.test", 443, address, Opened()) == ""


@given(st.ip_addresses())
def test_nothing_is_public_that_the_standard_library_knows_as_private(address: object) -> None:
    found = ip_address(str(address))
    if is_public(found) and getattr(found, "ipv4_mapped", None) is None:
        assert {found.is_private, found.is_loopback, found.is_link_local, found.is_multicast} == {False}


def test_a_public_host_on_an_odd_port() -> None:
    assert complaint("a.test", 80, "8.8.8.8", Opened()) == ""
    assert complaint("a.test", 25, "8.8.8.8", Opened()) == "is asked for on port 25, not 80 or 443"


def test_what_is_opened_is_open_on_every_port() -> None:
    opened = parse_opened(["CDN.Internal.", "10.1.0.0/16", "fd00::7", "bücher.test"])
    for host, address in [
        ("cdn.internal", "10.9.9.9"),
        ("x.test", "10.1.2.3"),
        ("y.test", "fd00::7"),
        (host_key("BÜCHER.test"), "127.0.0.1"),
    ]:
        assert complaint(host, 9000, address, opened) == ""
    for host, address in [("sub.cdn.internal", "10.9.9.9"), ("x.test", "10.2.0.1"), ("y.test", "fd00::8")]:
        assert complaint(host, 443, address, opened) == "is not on the public internet"


@pytest.mark.parametrize(
    "entry",
    ["", "10.0.0.1/8", "10.0.0.0/33", "http://cdn.internal", "cdn.internal:9000", "10.1.2", "a b", "*.x", "a/b"],
)
def test_what_cannot_be_opened(entry: str) -> None:
    with pytest.raises(UsageError, match=r"^--image-url-allow: .*; give a host or a network, cdn\.internal or"):
        parse_opened([entry])
