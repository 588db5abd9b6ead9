"""What a request costs and how its output is bounded."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.limits import Limits
from loadstone.core.refusals import BadAskError
from loadstone.hold.shaping import shape

CHAT = "/v1/chat/completions"
JSON = b"application/json"
BOUNDED = Limits(max_output_tokens=512, default_output_tokens=100)


def shaped(asked: dict[str, object], limits: Limits = BOUNDED, path: str = CHAT) -> dict[str, object]:
    body = json.dumps(asked).encode()
    return dict(json.loads(shape(path, JSON, body, limits).body))


@pytest.mark.parametrize(
    ("asked", "changed"),
    [
        ({}, {"max_tokens": 100}),
        ({"max_tokens": None}, {"max_tokens": 100}),
        ({"max_tokens": 10}, {}),
        ({"max_tokens": 512}, {}),
        ({"max_tokens": 513}, {"max_tokens": 512}),
        ({"max_completion_tokens": 9999}, {"max_completion_tokens": 512}),
        ({"max_tokens": 9999, "max_completion_tokens": 5}, {"max_tokens": 512}),
        ({"n_predict": 4096}, {"n_predict": 512}),
        ({"max_tokens": 9999, "min_tokens": 600}, {"max_tokens": 512, "min_tokens": 512}),
        ({"max_tokens": 400, "min_tokens": 300}, {}),
        ({"min_tokens": 300}, {"max_tokens": 100, "min_tokens": 100}),
    ],
)
def test_output_is_clamped_and_given_a_default(asked: dict[str, object], changed: dict[str, object]) -> None:
    asked = {"model": "m", "messages": [], **asked}
    assert shaped(asked) == asked | changed


def test_what_is_not_changed_goes_on_byte_for_byte() -> None:
    body = b'{ "max_tokens":5 ,\n "temperature": 1.50, "messages":[{"role":"user","content":"\\u4f60"}] }'
    assert shape(CHAT, JSON, body, BOUNDED).body is body
    unbounded = b'{"messages": []  }'
    assert shape(CHAT, JSON, unbounded, Limits()).body is unbounded


def test_the_default_is_the_most_where_none_is_given() -> None:
    assert shaped({}, Limits(max_output_tokens=64))["max_tokens"] == 64
    assert shaped({}, Limits(max_output_tokens=64), "/v1/responses") == {"max_output_tokens": 64}
    assert shaped({}, Limits(max_output_tokens=64), "/completion") == {"n_predict": 64}
    assert shaped({"max_tokens": 99}, Limits(max_output_tokens=64), "/v1/messages") == {"max_tokens": 64}
    assert shaped({}, Limits(max_output_tokens=64, default_output_tokens=100))["max_tokens"] == 64


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "12"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": [1]}, "max_tokens"),
        ({"max_completion_tokens": {}}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 10**9}, "n"),
        ({"best_of": -2}, "best_of"),
        ({"n_predict": -1}, "n_predict"),
    ],
)
def test_impossible_amounts_name_their_key(asked: dict[str, object], param: str) -> None:
    with pytest.raises(BadAskError, match=param) as caught:
        shape(CHAT, JSON, json.dumps(asked).encode(), BOUNDED)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b'{"max_tokens": NaN}',
        b'{"a": 1} x',
        b"{" * 100_000,
        b"[" * 100_000,
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadAskError, match="not a JSON object"):
        shape(CHAT, JSON, body, BOUNDED)


@pytest.mark.parametrize("kind", [b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data"])
def test_another_content_type_is_refused_by_name(kind: bytes) -> None:
    with pytest.raises(BadAskError, match=kind.decode()):
        shape(CHAT, kind, b"{}", BOUNDED)


@pytest.mark.parametrize(
    "kind", [None, b"application/json", b"application/json; charset=utf-8", b"application/vnd.x+json"]
)
def test_json_goes_by_several_names(kind: bytes | None) -> None:
    assert shape(CHAT, kind, b"{}", BOUNDED).body == b'{"max_tokens":100}'


def cost(asked: dict[str, object], path: str = CHAT) -> int:
    body = json.dumps(asked).encode()
    return shape(path, JSON, body, BOUNDED).tokens - -(-len(body) // 4)


def test_cost_counts_choices_and_prompts() -> None:
    assert cost({"max_tokens": 50}) == 50
    assert cost({"max_tokens": 50, "n": 3}) == 150
    assert cost({"max_tokens": 50, "n": 2, "best_of": 4}) == 200
    assert cost({}) == 100
    assert cost({"max_tokens": 10, "prompt": ["a", "b", "c"]}, "/v1/completions") == 30
    assert cost({"max_tokens": 10, "prompt": [1, 2, 3]}, "/v1/completions") == 10
    assert cost({"max_tokens": 10, "prompt": [[1, 2], [3]]}, "/v1/completions") == 20
    assert cost({"input": "text"}, "/v1/embeddings") == 0


def test_other_paths_are_not_read() -> None:
    image = shape("/embed_image", b"multipart/form-data; boundary=x", b"\x00" * 10, BOUNDED)
    assert (image.body, image.tokens) == (b"\x00" * 10, 3)


def test_requests_with_the_same_beginning_belong_together() -> None:
    def affinity(system: str, question: str) -> int | None:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        return shape(CHAT, JSON, json.dumps({"messages": messages, "max_tokens": 1}).encode(), BOUNDED).affinity

    long = "You are helpful. " * 100
    assert affinity(long, "one") == affinity(long, "two")
    assert affinity("short", "one") != affinity("short", "two")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_json_is_shaped_or_refused(document: object) -> None:
    try:
        result = shape(CHAT, JSON, json.dumps(document).encode(), BOUNDED)
    except BadAskError:
        return
    assert isinstance(document, dict)
    assert (
        json.loads(result.body).items()
        >= {k: v for k, v in document.items() if k not in ("max_tokens", "min_tokens")}.items()
    )
