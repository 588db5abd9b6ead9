"""Which headers cross the gate, and how."""

import pytest

from loadstone.hold.headers import header_pairs, reply_lines, sane_id, upstream_head


def head(headers: list[tuple[bytes, bytes]], **changes: object) -> list[bytes]:
    settings: dict[str, object] = {
        "netloc": b"engine:8001",
        "proxied": False,
        "authorization": None,
        "drop_authorization": False,
    }
    made = upstream_head("POST", b"/v1/x?q=1", headers, **(settings | changes))  # type: ignore[arg-type]
    whole = made.with_body(b"{}", b"192.0.2.7", b"id-1")
    assert whole.endswith(b"\r\n\r\n{}")
    return whole[:-6].split(b"\r\n")


def test_the_head_is_written_anew() -> None:
    lines = head([(b"host", b"gate:9000"), (b"content-length", b"999"), (b"x-custom", b"kept")])
    assert lines[:2] == [b"POST /v1/x?q=1 HTTP/1.1", b"host: engine:8001"]
    assert b"content-length: 2" in lines
    assert b"content-length: 999" not in lines
    assert b"x-custom: kept" in lines
    assert b"x-forwarded-host: gate:9000" in lines
    assert b"x-request-id: id-1" in lines
    assert b"via: 1.1 loadstone" in lines


@pytest.mark.parametrize(
    "name",
    [
        b"connection",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"proxy-authorization",
        b"proxy-connection",
        b"expect",
        b"accept-encoding",
        b"x-loadstone-admin",
        b"forwarded",
        b"x-real-ip",
    ],
)
def test_what_belongs_to_one_hop_stays_there(name: bytes) -> None:
    assert not [line for line in head([(b"host", b"g"), (name, b"secret-value")]) if b"secret-value" in line]


def test_connection_names_further_headers_of_this_hop() -> None:
    lines = head([(b"connection", b"close, X-Private"), (b"x-private", b"1"), (b"x-public", b"2")])
    assert b"x-private: 1" not in lines
    assert b"x-public: 2" in lines


def test_only_trusted_proxies_add_to_forwarded_for() -> None:
    spoofed = [(b"x-forwarded-for", b"1.2.3.4"), (b"x-forwarded-proto", b"https")]
    assert b"x-forwarded-for: 192.0.2.7" in head(spoofed)
    assert b"x-forwarded-proto: http" in head(spoofed)
    assert b"x-forwarded-proto: https" in head(spoofed, proxied=True)


def test_a_size_is_told_where_a_body_is_expected() -> None:
    def written(method: str, body: bytes) -> bytes:
        made = upstream_head(method, b"/", [], netloc=b"e", proxied=False, authorization=None, drop_authorization=False)
        return made.with_body(body, b"192.0.2.7", b"id-1")

    assert b"content-length: 0\r\n" in written("POST", b"")
    assert b"content-length" not in written("GET", b"")
    assert b"content-length: 2\r\n" in written("GET", b"{}")


def test_a_key_of_the_gate_goes_no_further() -> None:
    keys = [(b"authorization", b"Bearer client"), (b"x-api-key", b"client")]
    assert b"authorization: Bearer client" in head(keys)
    assert not [line for line in head(keys, drop_authorization=True) if b"client" in line]
    assert b"authorization: Bearer ours" in head(keys, authorization=b"Bearer ours")
    assert not [line for line in head(keys, authorization=b"Bearer ours") if b"client" in line]


def test_via_is_added_to() -> None:
    assert b"via: 1.0 cdn, 1.1 loadstone" in head([(b"via", b"1.0 cdn")])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (b"abc-123_x.y", True),
        (b"", False),
        (b"x" * 129, False),
        (b"a b", False),
        (b"a\r\nb", False),
        (b"\xc3\xa9", False),
        (b"---", False),
    ],
)
def test_a_sane_request_id_is_kept(given: bytes, kept: bool) -> None:
    assert sane_id(given) == (given if kept else None)
    assert sane_id(None) is None


def test_a_reply_names_the_gate_and_forbids_buffering_of_streams() -> None:
    upstream = [(b"server", b"uvicorn"), (b"content-type", b"text/event-stream"), (b"x-request-id", b"theirs")]
    upstream.append((b"x-ratelimit-limit", b"of the engine's own"))
    rates = b"x-ratelimit-limit: 10\r\n"
    assert header_pairs(reply_lines(upstream).of(b"ours", rates)) == [
        (b"content-type", b"text/event-stream"),
        (b"via", b"1.1 loadstone"),
        (b"x-request-id", b"ours"),
        (b"x-accel-buffering", b"no"),
        (b"x-ratelimit-limit", b"10"),
    ]
    assert (b"x-ratelimit-limit", b"of the engine's own") in header_pairs(reply_lines(upstream).of(b"ours", b""))
