"""One replica of the embedding service: ``python -m loadstone.serve.embed --port PORT --model MODEL …``.

It serves on the loopback until its standard input is closed.
"""

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loadstone.core.engine import Engine
from loadstone.core.errors import UsageError
from loadstone.serve.addresses import parse_opened
from loadstone.serve.app import run, run_replica
from loadstone.serve.batching import Batching, BatchSettings
from loadstone.serve.cache import LruCache, ResultCache, model_fingerprint
from loadstone.serve.embed_asks import Item
from loadstone.serve.embed_routes import EmbedService, Served
from loadstone.serve.embed_vectors import Embedding, packed_size
from loadstone.serve.engines.checkpoint import read_config
from loadstone.serve.image_fetch import FetchSettings, ImageFetcher
from loadstone.serve.images import ImageBounds
from loadstone.serve.parent import ParentWatch

ENGINES = ("auto", "sentence", "siglip")
_BATCH = BatchSettings()


@dataclass(frozen=True)
class EmbedSettings:
    """What one replica is told."""

    model: str
    """Folder of the model, or its name on the hub."""
    engine: str = "auto"
    quantization: str = "none"
    threads: int | None = None
    """Threads that prepare texts and images."""
    max_workers: int | None = None
    """The same; beats it."""
    max_num_seqs: int = _BATCH.max_items
    max_num_batched_tokens: int = _BATCH.max_tokens
    max_model_len: int | None = None
    cache_size: int = 10_000
    """Results kept in this process; 0 keeps none."""
    redis: str = ""
    """Keep them in this Redis instead."""
    image_url_allow: tuple[str, ...] = ()

    @property
    def prepare_threads(self) -> int:
        return self.max_workers or self.threads or _BATCH.prepare_threads


class EmbedEngine(Engine[Item, Any, Embedding], Protocol):
    """An engine of this service, loaded and warm."""

    dim: int
    max_tokens: int | None
    """Longest text; None is no limit."""
    takes_images: bool
    pads: bool
    """Items of a batch are padded to its longest; else it costs no more than the tokens in it."""


def serve(settings: EmbedSettings, port: int, parent: ParentWatch) -> None:
    """Load the model and serve it on ``port`` until standard input is closed. Raises UsageError."""
    kind = choose_engine(settings)
    bounds = ImageBounds()
    fetcher = ImageFetcher(FetchSettings(max_bytes=bounds.max_bytes, opened=parse_opened(settings.image_url_allow)))
    engine = _load(settings, kind, bounds)
    batch = BatchSettings(
        max_items=settings.max_num_seqs,
        max_tokens=settings.max_num_batched_tokens,
        pads=engine.pads,
        prepare_threads=settings.prepare_threads,
    )
    batching = Batching(engine, batch, time.monotonic_ns)
    service = EmbedService(batching, _cache(settings, engine.dim), fetcher, bounds, _served(settings, kind, engine))
    run(service.application(), port, parent)


def choose_engine(settings: EmbedSettings) -> str:
    """The engine that ``--engine`` names, or the one that the model's files call for. Raises UsageError."""
    if settings.engine != "auto":
        return settings.engine
    if (Path(settings.model) / "modules.json").is_file():
        return "sentence"
    return "siglip" if read_config(settings.model).get("model_type") == "siglip2" else "sentence"


def _load(settings: EmbedSettings, kind: str, bounds: ImageBounds) -> EmbedEngine:
    """Imported here: each engine brings its own heavy library into the process."""
    options = {"quantization": settings.quantization, "max_model_len": settings.max_model_len}
    module = importlib.import_module(f"loadstone.serve.engines.{kind}")
    engine: EmbedEngine = (
        module.SiglipEngine(settings.model, bounds, **options)
        if kind == "siglip"
        else module.SentenceEngine(settings.model, **options)
    )
    return engine


def _served(settings: EmbedSettings, kind: str, engine: EmbedEngine) -> Served:
    folder = Path(settings.model)
    # A shared cache outlives this process, and other weights may come under the same name.
    identity = model_fingerprint(folder) if settings.redis and folder.is_dir() else settings.model
    changing: dict[str, str | int] = {
        "engine": kind,
        "quantization": settings.quantization,
        "max_model_len": engine.max_tokens or 0,
    }
    configuration = {
        "engine": kind,
        "dim": engine.dim,
        "max_model_len": engine.max_tokens,
        "quantization": settings.quantization,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "tensor_parallel_size": 1,
        "max_workers": settings.prepare_threads,
        "images": engine.takes_images,
    }
    return Served(settings.model, identity, engine.dim, engine.takes_images, changing, configuration)


def _cache(settings: EmbedSettings, dim: int) -> ResultCache:
    if not settings.redis:
        return LruCache(settings.cache_size)
    redis_cache = importlib.import_module("loadstone.serve.redis_cache")
    cache: ResultCache = redis_cache.RedisCache(settings.redis, packed_size(dim), logging.getLogger(__name__).warning)
    return cache


def parse(words: Sequence[str]) -> tuple[EmbedSettings, int]:
    """The settings and the port that a command line gives. Raises UsageError."""
    parser = argparse.ArgumentParser(prog="python -m loadstone.serve.embed")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True, help="folder, or name on the hub")
    parser.add_argument("--engine", choices=ENGINES, default=EmbedSettings.engine)
    parser.add_argument("--quantization", default=EmbedSettings.quantization, help="none or int8")
    for flag in ("--threads", "--max-workers", "--max-model-len"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--max-num-seqs", type=int, default=EmbedSettings.max_num_seqs)
    parser.add_argument("--max-num-batched-tokens", type=int, default=EmbedSettings.max_num_batched_tokens)
    parser.add_argument("--cache-size", type=int, default=EmbedSettings.cache_size)
    parser.add_argument("--redis", default=EmbedSettings.redis)
    parser.add_argument("--image-url-allow", action="append", default=[])
    given = vars(parser.parse_args(words))
    port: int = given.pop("port")
    allowed = tuple(given.pop("image_url_allow"))
    settings = EmbedSettings(image_url_allow=allowed, **given)
    for name in ("threads", "max_workers", "max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be at least 1")
    return settings, port


def main() -> None:
    run_replica(lambda parent: serve(*parse(sys.argv[1:]), parent))


if __name__ == "__main__":
    main()
