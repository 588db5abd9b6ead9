"""The rerank service over HTTP: /rerank (also /v1 and /v2), /score, /v1/models, /health.

A document that comes twice in a request is computed, and counted in ``usage``, once.
"""

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loadstone.serve.app import error_reply, health_reply, json_object, json_reply, service
from loadstone.serve.batching import Computer
from loadstone.serve.disconnect import while_connected
from loadstone.serve.pairs import Pair, Score
from loadstone.serve.rerank_asks import MAX_DOCUMENTS, ScoreData, ranked, rerank_ask, score_ask

_MS = 1000.0


Scorer = Computer[Pair, Score]


@dataclass(frozen=True)
class Scored:
    """The scores of a request, and what they took."""

    scores: list[Score]
    tokens: int
    timings_ms: dict[str, float]

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.tokens, "total_tokens": self.tokens}


class RerankService:
    """The routes over one scorer. ``name`` is what the model is called; ``configuration`` is what /health tells beside
    the scorer's figures."""

    def __init__(self, scorer: Scorer, name: str, configuration: Mapping[str, Any]) -> None:
        self._scorer = scorer
        self._name = name
        self._configuration = dict(configuration)
        self._created = int(time.time())

    def application(self) -> Starlette:
        """The Starlette application; the scorer runs as long as it does."""
        paths = {"/rerank": self._rerank, "/v1/rerank": self._rerank, "/v2/rerank": self._rerank, "/score": self._score}
        routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in paths.items()]
        return service([*routes, Route("/v1/models", self._models), Route("/health", self._health)], self._running)

    @contextlib.asynccontextmanager
    async def _running(self, _app: Starlette) -> AsyncIterator[None]:
        await self._scorer.start()
        try:
            yield
        finally:
            await self._scorer.stop()

    async def _rerank(self, request: Request) -> Response:
        body = await json_object(request)
        return self._unknown_model(body) or await while_connected(request, self._ranking(body))

    async def _score(self, request: Request) -> Response:
        body = await json_object(request)
        return self._unknown_model(body) or await while_connected(request, self._scoring(body))

    async def _ranking(self, body: Mapping[str, Any]) -> Response:
        ask = rerank_ask(body)
        done = await self._scored(ask.pairs)
        head = {"id": f"rerank-{uuid.uuid4().hex}", "model": self._name}
        tail = {"usage": done.usage, "timings_ms": done.timings_ms}
        return json_reply({**head, "results": ranked(ask, done.scores), **tail})

    async def _scoring(self, body: Mapping[str, Any]) -> Response:
        done = await self._scored(score_ask(body))
        data = [ScoreData(index, "score", score.value, score.truncated) for index, score in enumerate(done.scores)]
        head = {"id": f"score-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        tail = {"usage": done.usage, "timings_ms": done.timings_ms}
        return json_reply({**head, "model": self._name, "data": data, **tail})

    async def _scored(self, pairs: Sequence[Pair]) -> Scored:
        started_ns = time.monotonic_ns()
        different: dict[tuple[str, str], Pair] = {}
        for pair in pairs:
            different.setdefault((pair.query, pair.document), pair)
        done = await self._scorer.submit(list(different.values()))
        scores = {key: each.result for key, each in zip(different, done, strict=True)}
        timings_ms = {
            "tokenise": max(each.tokenise_s for each in done) * _MS,
            "queue": max(each.queue_s for each in done) * _MS,
            "inference": max(each.inference_s for each in done) * _MS,
            "total": (time.monotonic_ns() - started_ns) / 1e6,
        }
        tokens = sum(each.result.tokens for each in done)
        return Scored([scores[pair.query, pair.document] for pair in pairs], tokens, timings_ms)

    def _unknown_model(self, body: Mapping[str, Any]) -> Response | None:
        asked = body.get("model")
        if asked in (None, self._name):
            return None
        return error_reply(404, f"model {asked!r} is not served here; this is {self._name}", "model_not_found", "model")

    async def _models(self, _request: Request) -> Response:
        model = {"id": self._name, "object": "model", "created": self._created, "owned_by": "loadstone"}
        return json_reply({"object": "list", "data": [model]})

    async def _health(self, _request: Request) -> Response:
        bounds = {"max_documents": MAX_DOCUMENTS, "batching": self._scorer.figures()}
        return health_reply(self._scorer.alive, {"model": self._name, **self._configuration, **bounds})

    def __repr__(self) -> str:
        return f"<RerankService {self._name} on {self._scorer!r}>"
