"""SSE: any split of the bytes gives the same events."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.sse import Event, SseParser


def parse(*pieces: bytes) -> tuple[list[Event], bytes]:
    parser = SseParser()
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events, parser.leftover


@pytest.mark.parametrize(
    ("stream", "expected", "leftover"),
    [
        (b"data: 1\n\n", [Event(b"1")], b""),
        (b"data:1\n\n", [Event(b"1")], b""),
        (b"data:  1\n\n", [Event(b" 1")], b""),
        (b"data: 1\r\n\r\ndata: 2\r\n\r\n", [Event(b"1"), Event(b"2")], b""),
        (b"data: 1\r\rdata: 2\r\r", [Event(b"1"), Event(b"2")], b""),
        (b"data: a\ndata: b\n\n", [Event(b"a\nb")], b""),
        (b"data\n\n", [Event(b"")], b""),
        (b": ping\n\ndata: 1\n\n: ping\n\n", [Event(b"1")], b""),
        (b"\xef\xbb\xbfdata: 1\n\n", [Event(b"1")], b""),
        (b"event: error\ndata: x\n\ndata: y\n\n", [Event(b"x", b"error"), Event(b"y")], b""),
        (b"id: 7\nretry: 3\nunknown: z\ndata: 1\n\n", [Event(b"1")], b""),
        (b"event: lost\n\ndata: 1\n\n", [Event(b"1")], b""),
        (b"\n\n\ndata: 1\n\n\n\n", [Event(b"1")], b""),
        (b"data: [DONE]\n\ndata: [DONE]\n\n", [Event(b"[DONE]"), Event(b"[DONE]")], b""),
        (b"data: 1\n\ndata: {half", [Event(b"1")], b"{half"),
        (b"data: 1\n", [], b"1"),
        (b"data: 1", [], b"1"),
        (b"dat", [], b"dat"),
        (b"data: 1\n\n: a comment cut sho", [Event(b"1")], b""),
        (b"", [], b""),
    ],
)
def test_events(stream: bytes, expected: list[Event], leftover: bytes) -> None:
    assert parse(stream) == (expected, leftover)
    assert parse(*(stream[i : i + 1] for i in range(len(stream)))) == (expected, leftover)


PIECES = st.lists(
    st.sampled_from([b"data", b":", b" ", b"\n", b"\r", b"\r\n", b"{}", b"event", b"\xef\xbb\xbf", b"x", b"\n\n", b""]),
    max_size=40,
)


@given(PIECES, st.lists(st.integers(0, 200), max_size=10))
def test_any_split_gives_the_same_events(parts: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(parts)
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    assert parse(*(stream[a:b] for a, b in itertools.pairwise(places))) == parse(stream)
