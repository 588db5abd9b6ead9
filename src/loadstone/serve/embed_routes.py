"""The embedding service over HTTP: /embed_text, /embed_image, /v1/embeddings, /v1/models, /health.

An input that comes twice in a request is computed once, and one that was computed before not at all.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loadstone.core.refusals import BadAskError
from loadstone.serve.app import error_reply, health_reply, json_object, json_reply, service
from loadstone.serve.batching import Computer
from loadstone.serve.cache import ResultCache, Scope
from loadstone.serve.disconnect import while_connected
from loadstone.serve.embed_asks import (
    MAX_IMAGES,
    MAX_TEXTS,
    ImageItem,
    ImageSource,
    Item,
    image_sources,
    openai_items,
    text_items,
    vector_options,
)
from loadstone.serve.embed_vectors import Embedding, pack, shaped, unpack, written
from loadstone.serve.image_fetch import ImageFetcher
from loadstone.serve.images import ImageBounds, decode_base64

_MS = 1000.0
_UPLOAD = "file"


Embedder = Computer[Item, Embedding]


@dataclass(frozen=True)
class Served:
    """What is served, as the requests and /health know it."""

    name: str
    """What the model is called."""
    identity: str
    """Of the weights, in the keys of the cache."""
    dim: int
    takes_images: bool
    settings: Mapping[str, str | int | float | bool]
    """What changes the vectors, in the keys of the cache too."""
    configuration: Mapping[str, Any]
    """For /health."""


@dataclass(frozen=True)
class Embedded:
    """The embeddings of a request, and what they took."""

    embeddings: list[Embedding]
    timings_ms: dict[str, float]

    @property
    def tail(self) -> dict[str, Any]:
        """What every reply ends with."""
        tokens = sum(embedding.tokens for embedding in self.embeddings)
        truncated = sum(embedding.truncated for embedding in self.embeddings)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"usage": usage, "truncated": truncated, "timings_ms": self.timings_ms}


class EmbedService:
    """The routes over one embedder; closes ``cache`` and ``fetcher`` at its end."""

    def __init__(
        self, embedder: Embedder, cache: ResultCache, fetcher: ImageFetcher, bounds: ImageBounds, served: Served
    ) -> None:
        self._embedder = embedder
        self._cache = cache
        self._fetcher = fetcher
        self._bounds = bounds
        self._served = served
        self._created = int(time.time())

    def application(self) -> Starlette:
        """The Starlette application; the embedder runs as long as it does."""
        posts = {"/embed_text": self._text, "/embed_image": self._image, "/v1/embeddings": self._openai}
        routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()]
        return service([*routes, Route("/v1/models", self._models), Route("/health", self._health)], self._running)

    @contextlib.asynccontextmanager
    async def _running(self, _app: Starlette) -> AsyncIterator[None]:
        await self._embedder.start()
        try:
            yield
        finally:
            await self._embedder.stop()
            await self._fetcher.close()
            await self._cache.close()

    async def _text(self, request: Request) -> Response:
        body = await json_object(request)
        return self._unknown_model(body) or await while_connected(request, self._embed(text_items(body), body))

    async def _openai(self, request: Request) -> Response:
        body = await json_object(request)
        return self._unknown_model(body) or await while_connected(request, self._embed_openai(body))

    async def _image(self, request: Request) -> Response:
        if not self._served.takes_images:
            raise BadAskError(f"{self._served.name} embeds texts only; serve a SigLIP2 model for images", "model")
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            body, images = await self._uploaded(request)
            return self._unknown_model(body) or await while_connected(request, self._embed(images, body))
        body = await json_object(request)
        sources = image_sources(body)
        return self._unknown_model(body) or await while_connected(request, self._embed_images(sources, body))

    async def _embed_images(self, sources: Sequence[ImageSource], body: Mapping[str, Any]) -> Response:
        started_ns = time.monotonic_ns()
        return await self._embed(await self._received(sources), body, started_ns)

    async def _embed(self, items: Sequence[Item], body: Mapping[str, Any], started_ns: int | None = None) -> Response:
        options = vector_options(body, self._served.dim)
        found = await self._embedded(items, started_ns or time.monotonic_ns())
        vectors = shaped(found.embeddings, options)
        head = {"embeddings": written(vectors, options), "dim": vectors.shape[1], "model": self._served.name}
        return json_reply({**head, **found.tail})

    async def _embed_openai(self, body: Mapping[str, Any]) -> Response:
        options = vector_options(body, self._served.dim)
        found = await self._embedded(openai_items(body), time.monotonic_ns())
        data = [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(written(shaped(found.embeddings, options), options))
        ]
        return json_reply({"object": "list", "data": data, "model": self._served.name, **found.tail})

    async def _embedded(self, items: Sequence[Item], started_ns: int) -> Embedded:
        keys = [self._key(item) for item in items]
        different: dict[bytes, Item] = {}
        for key, item in zip(keys, items, strict=True):
            different.setdefault(key, item)
        cached = await self._cache.get_many(list(different))
        found = {key: unpack(data) for key, data in zip(different, cached, strict=True) if data is not None}
        missing = {key: item for key, item in different.items() if key not in found}
        done = await self._embedder.submit(list(missing.values())) if missing else []
        computed = {key: each.result for key, each in zip(missing, done, strict=True)}
        await self._cache.put_many({key: pack(embedding) for key, embedding in computed.items()})
        found |= computed
        timings_ms = {
            "tokenise": max((each.tokenise_s for each in done), default=0.0) * _MS,
            "queue": max((each.queue_s for each in done), default=0.0) * _MS,
            "inference": max((each.inference_s for each in done), default=0.0) * _MS,
            "total": (time.monotonic_ns() - started_ns) / 1e6,
        }
        return Embedded([found[key] for key in keys], timings_ms)

    def _key(self, item: Item) -> bytes:
        settings = self._served.settings
        if isinstance(item, ImageItem):
            return Scope(self._served.identity, "image", settings).key(item.data)
        given = {**settings, "truncate": item.truncate}
        if isinstance(item.content, str):
            return Scope(self._served.identity, "text", given).key(item.content)
        return Scope(self._served.identity, "tokens", given).key(msgspec.json.encode(item.content))

    async def _received(self, sources: Sequence[ImageSource]) -> list[ImageItem]:
        """The bytes of each image; the first that cannot be had ends the fetching of the others."""
        fetches = [asyncio.ensure_future(self._bytes_of(source)) for source in sources]
        try:
            found = await asyncio.gather(*fetches)
        finally:
            for fetch in fetches:
                fetch.cancel()
        return [ImageItem(data, source.param) for data, source in zip(found, sources, strict=True)]

    async def _bytes_of(self, source: ImageSource) -> bytes:
        if source.kind == "url":
            return await self._fetcher.fetch(source.value, source.param)
        return decode_base64(source.value, source.param, self._bounds)

    async def _uploaded(self, request: Request) -> tuple[dict[str, Any], list[ImageItem]]:
        """The other fields of a form, true and false understood, and its files."""
        async with request.form(max_files=MAX_IMAGES) as form:
            files = [file for file in form.getlist(_UPLOAD) if isinstance(file, UploadFile)]
            if not files:
                raise BadAskError(f"the form has no {_UPLOAD}: upload the image under that name", _UPLOAD)
            names = [_UPLOAD] if len(files) == 1 else [f"{_UPLOAD}[{index}]" for index in range(len(files))]
            images = [await self._file(file, name) for file, name in zip(files, names, strict=True)]
            body = {name: value for name, value in form.items() if isinstance(value, str)}
        return {name: {"true": True, "false": False}.get(value, value) for name, value in body.items()}, images

    async def _file(self, file: UploadFile, name: str) -> ImageItem:
        """One byte more than may be is enough for the decoder to refuse it."""
        return ImageItem(await file.read(self._bounds.max_bytes + 1), name)

    def _unknown_model(self, body: Mapping[str, Any]) -> Response | None:
        asked = body.get("model")
        if asked in (None, self._served.name):
            return None
        return error_reply(
            404, f"model {asked!r} is not served here; this is {self._served.name}", "model_not_found", "model"
        )

    async def _models(self, _request: Request) -> Response:
        model = {"id": self._served.name, "object": "model", "created": self._created, "owned_by": "loadstone"}
        return json_reply({"object": "list", "data": [model]})

    async def _health(self, _request: Request) -> Response:
        bounds = {"max_texts": MAX_TEXTS, "max_images": MAX_IMAGES}
        figures = {"batching": self._embedder.figures(), "cache": self._cache.figures()}
        document = {"model": self._served.name, **self._served.configuration, **bounds, **figures}
        return health_reply(self._embedder.alive, document)

    def __repr__(self) -> str:
        return f"<EmbedService {self._served.name} on {self._embedder!r}, {self._cache!r}>"
