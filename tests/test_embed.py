"""The embedding service over a pretended engine: what it takes, what it answers, what it refuses."""

import asyncio
import base64
import json
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_calls import Call
from loadstone.core.engine import EngineError
from loadstone.core.errors import UsageError
from loadstone.core.refusals import BadAskError
from loadstone.serve.batching import Batching, BatchSettings
from loadstone.serve.cache import LruCache
from loadstone.serve.embed import EmbedSettings, choose_engine, parse
from loadstone.serve.embed_asks import MAX_CHARACTERS, MAX_IMAGES, MAX_TEXTS, ImageItem, Item, VectorOptions
from loadstone.serve.embed_routes import EmbedService, Served
from loadstone.serve.embed_vectors import Embedding, embeddings, pack, packed_size, shaped, unpack, written
from loadstone.serve.image_fetch import FetchSettings, ImageFetcher
from loadstone.serve.images import ImageBounds

MODEL = "tiny-embedder"
LIMIT_TOKENS = 5
BOUNDS = ImageBounds(max_bytes=1000)


@dataclass(frozen=True)
class Read:
    values: tuple[float, ...]
    param: str
    tokens: int
    truncated: bool = False


class Letters:
    """A text's vector is the places of its first four letters in the alphabet; one token a word. An image's is its
    first bytes. It keeps what it ran."""

    def __init__(self) -> None:
        self.ran: list[tuple[float, ...]] = []
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()

    def prepare(self, item: Item) -> Read:
        if isinstance(item, ImageItem):
            if item.data.startswith(b"broken"):
                raise BadAskError("not an image", item.param)
            return Read(tuple(map(float, item.data[:4])), item.param, 256)
        if not isinstance(item.content, str):
            return Read(tuple(map(float, item.content)), item.param, len(item.content))
        words = item.content.split()
        if len(words) > LIMIT_TOKENS and not item.truncate:
            raise BadAskError(f"{item.param} has {len(words)} tokens", item.param)
        if "nan" in words:
            return Read((float("nan"),) * 4, item.param, 1)
        read = words[:LIMIT_TOKENS]
        values = tuple(float(ord(letter) - 96) for letter in "".join(read)[:4])
        return Read(values, item.param, len(read), len(read) < len(words))

    def tokens(self, prepared: Read) -> int:
        return prepared.tokens

    def run(self, batch: Sequence[Read]) -> list[Embedding | EngineError]:
        self.entered.set()
        assert self.go.wait(30)
        self.ran += [item.values for item in batch]
        return embeddings(np.array([item.values for item in batch], np.float32), batch)


Ask = Callable[..., Awaitable[Call]]


def served(
    test: Callable[[Ask, Letters], Awaitable[None]], *, takes_images: bool = True, cache_size: int = 100
) -> None:
    """Run ``test`` with the service; ``ask(path, **body)`` is one request."""

    async def main() -> None:
        engine = Letters()
        batching = Batching(engine, BatchSettings(), time.monotonic_ns)
        about = Served(MODEL, MODEL, 4, takes_images, {}, {"engine": "letters", "max_num_seqs": 8})
        fetcher = ImageFetcher(FetchSettings())
        service = EmbedService(batching, LruCache(cache_size), fetcher, BOUNDS, about)
        app = service.application()

        async def ask(path: str = "/embed_text", raw: bytes | None = None, **body: Any) -> Call:
            kind = body.pop("content_type", "application/json")
            method = body.pop("method", "POST")
            data = json.dumps(body).encode() if raw is None else raw
            return await Call(app, data, path=path, method=method, headers=[(b"content-type", kind.encode())]).done()

        async with app.router.lifespan_context(app):
            assert MODEL in repr(service)
            await test(ask, engine)

    asyncio.run(main())


def reply_of(call: Call) -> Any:
    assert call.status == 200, call.body
    return json.loads(call.body)


def close(found: Sequence[float], expected: Sequence[float]) -> bool:
    return np.allclose(found, expected, atol=1e-7)


def test_one_text() -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        reply = reply_of(await ask(text="abab"))
        assert close(reply["embeddings"][0], np.array([1, 2, 1, 2]) / 10**0.5)
        assert (reply["dim"], reply["model"], reply["truncated"]) == (4, MODEL, 0)
        assert set(reply["timings_ms"]) == {"tokenise", "queue", "inference", "total"}
        assert reply["usage"] == {"prompt_tokens": 1, "total_tokens": 1}

    served(test)


def test_several_texts_keep_their_order_and_equal_ones_are_computed_once() -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        reply = reply_of(await ask(texts=["bbbb", "aaaa", "bbbb", "cccc"], normalize=False))
        assert reply["embeddings"] == [[2.0] * 4, [1.0] * 4, [2.0] * 4, [3.0] * 4]
        assert sorted(engine.ran) == [(1.0,) * 4, (2.0,) * 4, (3.0,) * 4]
        assert reply["usage"]["total_tokens"] == 4

    served(test)


def test_what_was_computed_before_is_not_computed_again() -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        first = reply_of(await ask(text="one two", normalize=False))
        again = reply_of(await ask("/v1/embeddings", input=["one two", "aaaa"]))
        assert len(engine.ran) == 2
        assert close(
            again["data"][0]["embedding"], np.array(first["embeddings"][0]) / np.linalg.norm(first["embeddings"])
        )
        assert again["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        cached = reply_of(await ask(text="aaaa"))
        assert cached["timings_ms"]["inference"] == 0.0
        figures = reply_of(await ask("/health", method="GET"))["cache"]
        assert (figures["hits"], figures["misses"], figures["entries"]) == (2, 2, 2)

    served(test)


def test_without_a_cache_equal_texts_of_a_request_are_still_computed_once() -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        for _ in range(2):
            reply_of(await ask(texts=["aaaa", "aaaa"]))
        assert len(engine.ran) == 2

    served(test, cache_size=0)


def test_as_openai() -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        reply = reply_of(await ask("/v1/embeddings", model=MODEL, input=["dddd", "abab"], user="u"))
        assert (reply["object"], reply["model"]) == ("list", MODEL)
        assert [(entry["object"], entry["index"]) for entry in reply["data"]] == [("embedding", 0), ("embedding", 1)]
        assert close(reply["data"][0]["embedding"], [0.5] * 4)
        coded = reply_of(await ask("/v1/embeddings", input="dddd", encoding_format="base64"))["data"][0]["embedding"]
        assert struct.unpack("<4f", base64.b64decode(coded)) == (0.5,) * 4

    served(test)


def test_fewer_dimensions_are_normalised_again() -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        reply = reply_of(await ask("/v1/embeddings", input="dddd", dimensions=1))
        assert reply["data"][0]["embedding"] == [1.0]
        assert reply_of(await ask(text="dddd", dimensions=2))["dim"] == 2

    served(test)


def test_token_ids_are_one_text_or_several() -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        one = reply_of(await ask("/v1/embeddings", input=[3, 0, 0, 4]))
        assert close(one["data"][0]["embedding"], [0.6, 0, 0, 0.8])
        two = reply_of(await ask("/v1/embeddings", input=[[3, 0, 0, 4], [1, 0, 0, 0]]))
        assert len(two["data"]) == 2
        assert two["usage"]["total_tokens"] == 8
        assert len(engine.ran) == 2

    served(test)


def test_a_long_text_is_cut_only_on_request() -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        long = "aaaa " * 6
        call = await ask(texts=["b", long])
        assert (call.status, call.error["param"]) == (400, "texts[1]")
        reply = reply_of(await ask(texts=["bbbb", long], truncate=True))
        assert (reply["truncated"], reply["usage"]["total_tokens"]) == (1, 6)
        assert reply_of(await ask(text=long, truncate=True))["truncated"] == 1, "the cache remembers"
        assert (await ask(text=long)).status == 400, "what was cut is not the vector of the whole"

    served(test)


def test_nan_fails_its_own_request_alone() -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        engine.go.clear()
        first = asyncio.ensure_future(ask(text="aaaa"))
        await asyncio.to_thread(engine.entered.wait, 30)
        bad, good = asyncio.ensure_future(ask(texts=["cccc", "nan"])), asyncio.ensure_future(ask(text="dddd"))
        engine.go.set()
        reply_of(await first)
        assert (await bad).status == 422
        assert "NaN" in (await bad).error["message"]
        assert close(reply_of(await good)["embeddings"][0], [0.5] * 4)

    served(test)


async def queued(ask: Ask) -> int:
    count: int = reply_of(await ask("/health", method="GET"))["batching"]["queued"]
    return count


def test_a_client_that_leaves_is_not_computed_for() -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        engine.go.clear()
        first = asyncio.ensure_future(ask(text="aaaa"))
        await asyncio.to_thread(engine.entered.wait, 30)
        second = asyncio.ensure_future(ask(text="bbbb"))
        while not await queued(ask):
            pass
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        engine.go.set()
        reply_of(await first)
        assert engine.ran == [(1.0,) * 4]

    served(test)


PNG = b"\x04\x00\x00\x03 pretended"
CODED = base64.b64encode(PNG).decode()


def test_images_as_base64_and_upload() -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        reply = reply_of(await ask("/embed_image", image=CODED))
        assert close(reply["embeddings"][0], [0.8, 0, 0, 0.6])
        assert (reply["dim"], reply["model"]) == (4, MODEL)
        several = reply_of(await ask("/embed_image", images=[CODED, f"data:image/png;base64,{CODED}"], normalize=False))
        assert several["embeddings"] == [[4, 0, 0, 3]] * 2
        uploaded = reply_of(await ask("/embed_image", raw=form(file=PNG), content_type=FORM))
        assert uploaded["embeddings"] == reply["embeddings"]
        plain = reply_of(await ask("/embed_image", raw=form(file=PNG, normalize=b"false"), content_type=FORM))
        assert plain["embeddings"] == [[4, 0, 0, 3]]
        assert len(engine.ran) == 1, "all of them are the same image"

    served(test)


FORM = "multipart/form-data; boundary=cut"


def form(**parts: bytes) -> bytes:
    """A form whose field ``file`` is a file."""
    lines = b""
    for name, data in parts.items():
        file = b'; filename="a.png"' if name == "file" else b""
        lines += b'--cut\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name.encode(), file, data)
    return lines + b"--cut--\r\n"


BAD_IMAGES = {
    "not base64": ({"image": "?"}, "image"),
    "not base64 in a list": ({"images": [CODED, "?"]}, "images[1]"),
    "not an image": ({"images": [CODED, base64.b64encode(b"broken").decode()]}, "images[1]"),
    "too large": ({"image": base64.b64encode(b"x" * 1001).decode()}, "image"),
    "a number": ({"image": 3}, "image"),
    "empty list": ({"images": []}, "images"),
    "too many": ({"images": [CODED] * (MAX_IMAGES + 1)}, "images"),
    "nothing": ({}, "image"),
    "both": ({"image": CODED, "url": "http://example.org/a.png"}, "url"),
    "private address": ({"url": "http://127.0.0.1/a.png"}, "url"),
    "private address in a list": ({"urls": ["http://169.254.169.254/"]}, "urls[0]"),
    "not a URL": ({"url": "file:///etc/passwd"}, "url"),
}


@pytest.mark.parametrize(("body", "param"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_bad_images(body: dict[str, Any], param: str) -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        call = await ask("/embed_image", **body)
        assert (call.status, call.error["param"]) == (400, param)

    served(test)


BAD_FORMS = {
    "no file": (form(other=b"x"), "file"),
    "a field, not a file": (form(other=b"x", normalize=b"true"), "file"),
    "broken": (form(file=b"broken"), "file"),
    "normalize": (form(file=PNG, normalize=b"no"), "normalize"),
}


@pytest.mark.parametrize(("raw", "param"), BAD_FORMS.values(), ids=BAD_FORMS.keys())
def test_bad_uploads(raw: bytes, param: str) -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        call = await ask("/embed_image", raw=raw, content_type=FORM)
        assert (call.status, call.error["param"]) == (400, param)

    served(test)


def test_a_model_of_texts_says_so_of_images() -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        call = await ask("/embed_image", image=CODED)
        assert (call.status, call.error["param"]) == (400, "model")
        assert "texts only" in call.error["message"]

    served(test, takes_images=False)


BAD_TEXTS = {
    "nothing": ({}, "text"),
    "both": ({"text": "a", "texts": ["b"]}, "texts"),
    "empty": ({"text": ""}, "text"),
    "blank": ({"text": " \n"}, "text"),
    "null": ({"text": None}, "text"),
    "not a string": ({"text": 3}, "text"),
    "a list for one": ({"text": ["a"]}, "text"),
    "one for a list": ({"texts": "a"}, "texts"),
    "empty list": ({"texts": []}, "texts"),
    "empty in a list": ({"texts": ["a", ""]}, "texts[1]"),
    "number in a list": ({"texts": ["a", 1]}, "texts[1]"),
    "too many": ({"texts": ["a"] * 10_000}, "texts"),
    "endless": ({"text": "a" * (MAX_CHARACTERS + 1)}, "text"),
    "normalize": ({"text": "a", "normalize": "no"}, "normalize"),
    "truncate": ({"text": "a", "truncate": 1}, "truncate"),
}


@pytest.mark.parametrize(("body", "param"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_bad_texts(body: dict[str, Any], param: str) -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        call = await ask(**body)
        assert (call.status, call.error["param"], call.error["code"]) == (400, param, "bad_request")
        assert param in call.error["message"]
        assert engine.ran == []

    served(test)


BAD_INPUTS = {
    "nothing": ({}, "input"),
    "empty": ({"input": ""}, "input"),
    "empty list": ({"input": []}, "input"),
    "empty ids": ({"input": [[]]}, "input[0]"),
    "mixed": ({"input": ["a", 1]}, "input[1]"),
    "mixed ids": ({"input": [1, "a"]}, "input"),
    "true is no id": ({"input": [[1, True]]}, "input[0]"),
    "an object": ({"input": {"a": 1}}, "input"),
    "too many": ({"input": ["a"] * (MAX_TEXTS + 1)}, "input"),
    "no dimensions": ({"input": "a", "dimensions": 0}, "dimensions"),
    "more dimensions than there are": ({"input": "a", "dimensions": 5}, "dimensions"),
    "dimensions as text": ({"input": "a", "dimensions": "2"}, "dimensions"),
    "encoding": ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
}


@pytest.mark.parametrize(("body", "param"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_inputs_of_openai(body: dict[str, Any], param: str) -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        call = await ask("/v1/embeddings", **body)
        assert (call.status, call.error["param"]) == (400, param)
        assert engine.ran == []

    served(test)


@pytest.mark.parametrize("path", ["/embed_text", "/embed_image", "/v1/embeddings"])
def test_an_unknown_model_is_not_found(path: str) -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        call = await ask(path, model="gpt", text="a", input="a", image=CODED)
        assert (call.status, call.error["code"], call.error["param"]) == (404, "model_not_found", "model")

    served(test)


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'{"text": "\xff"}'])
def test_what_is_not_a_json_object(raw: bytes) -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        for path in ("/embed_text", "/embed_image", "/v1/embeddings"):
            assert (await ask(path, raw=raw)).status == 400

    served(test)


def test_what_is_served_and_how() -> None:
    async def test(ask: Ask, engine: Letters) -> None:
        models = reply_of(await ask("/v1/models", method="GET"))
        assert [model["id"] for model in models["data"]] == [MODEL]
        health = reply_of(await ask("/health", method="GET"))
        assert (health["status"], health["model"], health["engine"], health["max_num_seqs"]) == (
            "ok",
            MODEL,
            "letters",
            8,
        )
        assert (health["max_texts"], health["batching"]["queued"]) == (MAX_TEXTS, 0)
        assert (await ask("/embed_text", method="GET")).status == 405

    served(test)


FLOATS = st.floats(-1e3, 1e3, width=32)


@given(st.lists(FLOATS, min_size=3, max_size=3), st.integers(0, 2**32 - 1), st.booleans())
def test_packing_loses_nothing(values: list[float], tokens: int, truncated: bool) -> None:
    packed = pack(Embedding(np.array(values, np.float32), tokens, truncated))
    assert len(packed) == packed_size(3)
    found = unpack(packed)
    assert (found.vector.tolist(), found.tokens, found.truncated) == (values, tokens, truncated)


@given(st.lists(st.lists(st.floats(-(2.0**66), 2.0**66, width=32), min_size=3, max_size=3), min_size=1, max_size=3))
def test_what_is_written_is_what_float32_holds(rows: list[list[float]]) -> None:
    vectors = np.array(rows, np.float32)
    found = np.array(written(vectors, VectorOptions()))
    assert np.abs(found - vectors).max() <= np.abs(vectors).max() * 1e-7


def test_a_vector_of_zeros_stays_one() -> None:
    nothing = [Embedding(np.zeros(2, np.float32), 1)]
    assert written(shaped(nothing, VectorOptions()), VectorOptions()) == [[0.0, 0.0]]


def test_the_command_line() -> None:
    settings, port = parse(
        ["--port", "1", "--model", "m", "--threads", "3", "--image-url-allow", "cdn", "--image-url-allow", "10.0.0.0/8"]
    )
    assert (port, settings.model, settings.engine, settings.quantization) == (1, "m", "auto", "none")
    assert (settings.prepare_threads, settings.image_url_allow) == (3, ("cdn", "10.0.0.0/8"))
    assert parse(["--port", "1", "--model", "m", "--threads", "3", "--max-workers", "4"])[0].prepare_threads == 4
    with pytest.raises(UsageError, match="--max-num-seqs 0 must be at least 1"):
        parse(["--port", "1", "--model", "m", "--max-num-seqs", "0"])


def test_the_model_calls_for_its_engine(tmp_path: Path) -> None:
    settings = EmbedSettings(str(tmp_path))
    with pytest.raises(UsageError, match=r"config\.json"):
        choose_engine(settings)
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    assert choose_engine(settings) == "siglip"
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert choose_engine(settings) == "sentence"
    (tmp_path / "config.json").unlink()
    (tmp_path / "modules.json").write_text("[]")
    assert choose_engine(settings) == "sentence"
    assert choose_engine(EmbedSettings(str(tmp_path), engine="siglip")) == "siglip"
