"""The rerank service over a pretended engine: what it takes, what it answers, what it refuses."""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from asgi_calls import Call
from loadstone.core.engine import EngineError
from loadstone.core.refusals import BadAskError
from loadstone.serve.batching import Batching, BatchSettings
from loadstone.serve.pairs import Pair, Score, Tokenised, scored, tokens_to_read
from loadstone.serve.rerank_routes import RerankService

MODEL = "tiny-reranker"
LIMIT_TOKENS = 12


class Lengths:
    """A document's score is its length over 100; one token a word. It keeps what it ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()

    def prepare(self, item: Pair) -> Tokenised:
        query, words = item.query.split(), item.document.split()
        read = tokens_to_read(item, document_tokens=len(words), other_tokens=len(query), limit_tokens=LIMIT_TOKENS)
        kept = " ".join([item.instruction, *words[:read]]).strip()
        return Tokenised(list(kept.encode()), item.document_param, truncated=read < len(words))

    def tokens(self, prepared: Tokenised) -> int:
        return len(prepared.ids)

    def run(self, batch: Sequence[Tokenised]) -> list[Score | EngineError]:
        self.entered.set()
        assert self.go.wait(30)
        texts = [bytes(pair.ids).decode() for pair in batch]
        self.ran += texts
        values = [float("nan") if text == "nan" else len(text) / 100 for text in texts]
        return [scored(value, pair) for value, pair in zip(values, batch, strict=True)]


Ask = Callable[..., Awaitable[Call]]


def served(test: Callable[[Ask, Lengths], Awaitable[None]]) -> None:
    """Run ``test`` with the service; ``ask(path, **body)`` is one request."""

    async def main() -> None:
        engine = Lengths()
        batching = Batching(engine, BatchSettings(), time.monotonic_ns)
        app = RerankService(batching, MODEL, {"engine": "lengths", "max_num_seqs": 8}).application()

        async def ask(path: str = "/rerank", method: str = "POST", raw: bytes | None = None, **body: Any) -> Call:
            data = json.dumps(body).encode() if raw is None else raw
            return await Call(app, data, path=path, method=method).done()

        async with app.router.lifespan_context(app):
            await test(ask, engine)

    asyncio.run(main())


def reply_of(call: Call) -> Any:
    assert call.status == 200, call.body
    return json.loads(call.body)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_come_back_best_first(path: str) -> None:
    async def test(ask: Ask, engine: Lengths) -> None:
        documents = ["bb", {"text": "dddd"}, "cc", "a"]
        reply = reply_of(await ask(path, model=MODEL, query="q", documents=documents))
        scores = [(result["index"], result["relevance_score"]) for result in reply["results"]]
        assert scores == [(1, 0.04), (0, 0.02), (2, 0.02), (3, 0.01)]
        assert all(set(result) == {"index", "relevance_score"} for result in reply["results"])
        assert reply["model"] == MODEL
        assert reply["id"].startswith("rerank-")
        assert reply["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
        assert set(reply["timings_ms"]) == {"tokenise", "queue", "inference", "total"}

    served(test)


def test_the_best_few_with_their_texts() -> None:
    async def test(ask: Ask, engine: Lengths) -> None:
        body = {"query": "q", "documents": ["bb", {"text": "dddd"}, "cc"], "return_documents": True}
        assert reply_of(await ask(**body, top_n=1))["results"] == [
            {"index": 1, "relevance_score": 0.04, "document": {"text": "dddd"}}
        ]
        assert len(reply_of(await ask(**body, top_n=50))["results"]) == 3

    served(test)


def test_an_instruction_reaches_the_engine() -> None:
    async def test(ask: Ask, engine: Lengths) -> None:
        reply_of(await ask(query="q", documents=["a"], instruction="task"))
        assert engine.ran == ["task a"]

    served(test)


def test_what_comes_twice_is_computed_once() -> None:
    async def test(ask: Ask, engine: Lengths) -> None:
        reply = reply_of(await ask(query="q", documents=["aaa", "b", "aaa", {"text": "aaa"}]))
        assert [result["index"] for result in reply["results"]] == [0, 2, 3, 1]
        assert sorted(engine.ran) == ["aaa", "b"]
        assert reply["usage"]["prompt_tokens"] == 4

    served(test)


@pytest.mark.parametrize(
    ("text_1", "text_2", "scores"),
    [
        ("q", "aa", [0.02]),
        ("q", ["aa", "b"], [0.02, 0.01]),
        (["q"], ["aa", "b"], [0.02, 0.01]),
        (["q", "r"], ["aa", "b"], [0.02, 0.01]),
    ],
)
def test_scores_in_order(text_1: Any, text_2: Any, scores: list[float]) -> None:
    async def test(ask: Ask, engine: Lengths) -> None:
        reply = reply_of(await ask("/score", text_1=text_1, text_2=text_2))
        assert reply["data"] == [{"index": at, "object": "score", "score": score} for at, score in enumerate(scores)]
        assert (reply["object"], reply["model"]) == ("list", MODEL)

    served(test)


def test_a_long_document_is_refused_unless_less_of_it_is_asked_for() -> None:
    async def test(ask: Ask, engine: Lengths) -> None:
        body = {"query": "q q", "documents": ["a", "w " * 14]}
        refused = await ask(**body)
        assert (refused.status, refused.error["param"]) == (400, "documents[1]")
        assert "documents[1] has 14 tokens, and 10 fit beside this query" in refused.error["message"]
        for more in ({"truncate": True}, {"truncation": True}, {"max_tokens_per_doc": 10}):
            results = reply_of(await ask(**body, **more))["results"]
            assert [(result["index"], result.get("truncated", False)) for result in results] == [(1, True), (0, False)]
        assert (await ask(**body, max_tokens_per_doc=11)).status == 400
        scored_ = reply_of(await ask("/score", text_1="q", text_2=["w " * 14], truncate=True))["data"]
        assert scored_ == [{"index": 0, "object": "score", "score": 0.21, "truncated": True}]

    served(test)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "query"),
        ({"query": " ", "documents": ["a"]}, "query"),
        ({"query": ["q"], "documents": ["a"]}, "query"),
        ({"query": "q " * 12, "documents": ["a"], "truncate": True}, "query"),
        ({"query": "q"}, "documents"),
        ({"query": "q", "documents": []}, "documents"),
        ({"query": "q", "documents": "a"}, "documents"),
        ({"query": "q", "documents": ["a"] * 10_000}, "documents"),
        ({"query": "q", "documents": ["a", ""]}, "documents[1]"),
        ({"query": "q", "documents": ["a", 3]}, "documents[1]"),
        ({"query": "q", "documents": ["a", {"title": "x"}]}, "documents[1].text"),
        ({"query": "q", "documents": ["a"], "top_n": 0}, "top_n"),
        ({"query": "q", "documents": ["a"], "top_n": True}, "top_n"),
        ({"query": "q", "documents": ["a"], "top_n": 1.5}, "top_n"),
        ({"query": "q", "documents": ["a"], "return_documents": "yes"}, "return_documents"),
        ({"query": "q", "documents": ["a"], "instruction": 3}, "instruction"),
        ({"query": "q", "documents": ["a"], "truncate": 1}, "truncate"),
        ({"query": "q", "documents": ["a"], "max_tokens_per_doc": 0}, "max_tokens_per_doc"),
    ],
)
def test_a_bad_request_names_its_field(body: dict[str, Any], param: str) -> None:
    async def test(ask: Ask, engine: Lengths) -> None:
        refused = await ask(**body)
        assert (refused.status, refused.error["param"]) == (400, param)
        assert param in refused.error["message"]
        assert engine.ran == []

    served(test)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text_2": "a"}, "text_1"),
        ({"text_1": "q", "text_2": []}, "text_2"),
        ({"text_1": "q", "text_2": ["a", None]}, "text_2[1]"),
        ({"text_1": ["q", "r"], "text_2": ["a"]}, "text_1"),
        ({"text_1": ["q", "r"], "text_2": "a"}, "text_1"),
        ({"text_1": ["q", "r " * 12], "text_2": ["a", "b"]}, "text_1[1]"),
        ({"text_1": "q", "text_2": ["a", "w " * 14]}, "text_2[1]"),
    ],
)
def test_a_bad_score_request_names_its_field(body: dict[str, Any], param: str) -> None:
    async def test(ask: Ask, engine: Lengths) -> None:
        refused = await ask("/score", **body)
        assert (refused.status, refused.error["param"]) == (400, param)

    served(test)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff"])
def test_a_body_that_is_no_json_object(raw: bytes) -> None:
    async def test(ask: Ask, engine: Lengths) -> None:
        assert (await ask(raw=raw)).status == 400

    served(test)


@pytest.mark.parametrize("path", ["/rerank", "/score"])
def test_another_model_is_not_here(path: str) -> None:
    async def test(ask: Ask, engine: Lengths) -> None:
        refused = await ask(path, model="gpt", query="q", documents=["a"], text_1="q", text_2="a")
        assert (refused.status, refused.error["code"], refused.error["param"]) == (404, "model_not_found", "model")
        assert MODEL in refused.error["message"]

    served(test)


def test_what_is_no_number_fails_its_own_request_alone() -> None:
    async def test(ask: Ask, engine: Lengths) -> None:
        bad, good = await asyncio.gather(ask(query="q", documents=["a", "nan"]), ask(query="q", documents=["b", "cc"]))
        assert (bad.status, bad.error["code"], bad.error["param"]) == (422, "engine_error", "documents[1]")
        assert "documents[1]" in bad.error["message"]
        assert [result["index"] for result in reply_of(good)["results"]] == [1, 0]

    served(test)


def test_a_client_that_leaves_gives_up_what_waits() -> None:
    async def main() -> None:
        engine = Lengths()
        batching = Batching(engine, BatchSettings(max_items=1), time.monotonic_ns)
        app = RerankService(batching, MODEL, {}).application()
        async with app.router.lifespan_context(app):
            engine.go.clear()
            body = json.dumps({"query": "q", "documents": ["a", "b", "c"]}).encode()
            call = Call(app, body, path="/rerank")
            await asyncio.to_thread(engine.entered.wait, 30)
            call.leave()
            await call.done()
            engine.go.set()
            assert call.status == 499
        assert len(engine.ran) == 1

    asyncio.run(main())


def test_health_and_models() -> None:
    async def test(ask: Ask, engine: Lengths) -> None:
        reply_of(await ask(query="q", documents=["a", "b"]))
        health = reply_of(await ask("/health", method="GET"))
        told = {key: health[key] for key in ("status", "model", "engine", "max_num_seqs", "max_documents")}
        expected = {"status": "ok", "model": MODEL, "engine": "lengths", "max_num_seqs": 8, "max_documents": 1000}
        assert told == expected
        assert health["batching"]["items"] == 2
        listed = reply_of(await ask("/v1/models", method="GET"))
        assert [model["id"] for model in listed["data"]] == [MODEL]
        assert (await ask("/rerank", method="GET")).status == 405
        assert (await ask("/nothing", method="GET")).status == 404

    served(test)


@pytest.mark.parametrize(
    ("document", "other", "truncate", "most", "read"),
    [(8, 4, False, None, 8), (9, 4, True, None, 8), (9, 4, False, 8, 8), (9, 4, True, 3, 3), (2, 4, False, 9, 2)],
)
def test_how_much_is_read(document: int, other: int, truncate: bool, most: int | None, read: int) -> None:
    pair = Pair("q", "d", "query", "documents[0]", truncate=truncate, max_document_tokens=most)
    assert tokens_to_read(pair, document_tokens=document, other_tokens=other, limit_tokens=12) == read


@pytest.mark.parametrize(
    ("document", "other", "truncate", "most", "param"),
    [(9, 4, False, None, "documents[0]"), (20, 4, False, 9, "documents[0]"), (1, 12, True, 1, "query")],
)
def test_what_does_not_fit(document: int, other: int, truncate: bool, most: int | None, param: str) -> None:
    pair = Pair("q", "d", "query", "documents[0]", truncate=truncate, max_document_tokens=most)
    with pytest.raises(BadAskError) as refused:
        tokens_to_read(pair, document_tokens=document, other_tokens=other, limit_tokens=12)
    assert refused.value.param == param


def test_health_says_when_nothing_is_computed_any_more() -> None:
    async def main() -> None:
        batching = Batching(Lengths(), BatchSettings(), time.monotonic_ns)
        app = RerankService(batching, MODEL, {}).application()
        async with app.router.lifespan_context(app):
            assert (await Call(app, path="/health", method="GET").done()).status == 200
            await batching.stop()
            call = await Call(app, path="/health", method="GET").done()
            assert (call.status, json.loads(call.body)["status"]) == (503, "the engine computes no more")

    asyncio.run(main())
