"""Tokens read from what passes by."""

import pytest

from loadstone.hold.usage import UsageReader

USAGE = b'"usage":{"prompt_tokens":7,"completion_tokens":5,"total_tokens":12}'


def read(streams: bool, *pieces: bytes) -> tuple[int | None, int]:
    reader = UsageReader(streams)
    for piece in pieces:
        reader.feed(piece)
    return reader.tokens()


@pytest.mark.parametrize(
    ("streams", "pieces", "expected"),
    [
        (False, (b'{"choices":[],' + USAGE + b"}",), (12, 5)),
        (False, (b'{"choices":[],"us', b"age" + USAGE[6:] + b"}"), (12, 5)),
        (False, (b'{"data":[],"usage":{"prompt_tokens":9}}',), (9, 0)),
        (False, (b'{"choices":[]}',), (None, 0)),
        (False, (b'{"usage": broken',), (None, 0)),
        (False, (b'{"usage":null}',), (None, 0)),
        (True, (b'data: {"choices":[1]}\n\n',) * 4 + (b"data: [DONE]\n\n",), (None, 4)),
        (True, (b'data: {"choices":[1]}\n\n', b"data: {" + USAGE + b"}\n\ndata: [DONE]\n\n"), (12, 5)),
        (True, (b"data: {" + USAGE + b"}\n\n", b"data: [DONE]\n\n"), (12, 5)),
        (True, (b"data: {" + USAGE[:20], USAGE[20:] + b"}\n\ndata: [DONE]\n\n"), (12, 5)),
        (True, (b'data: {"text":"\\"usage\\""}\n\n', b"data: [DONE]\n\n"), (None, 1)),
    ],
)
def test_usage_where_the_server_tells_and_events_where_not(
    streams: bool, pieces: tuple[bytes, ...], expected: tuple[int | None, int]
) -> None:
    assert read(streams, *pieces) == expected


def test_a_long_document_is_not_kept() -> None:
    reader = UsageReader(streams=False)
    for _ in range(100):
        reader.feed(b"x" * 100_000)
    assert reader.tokens() == (None, 0)
    assert "bytes" in repr(reader)
