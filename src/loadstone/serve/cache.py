"""Vectors that were computed before: in this process, or in a Redis that replicas and machines share.

A cache may forget, and may be away, but is never wrong and never the reason that a request fails. Its key is a hash of
all that the vector depends on (``Scope``), inputs framed so that no two can run together.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

_KEY_BYTES = 24
_ENTRY_BYTES = 200
"""What an entry costs beside its vector: key, two objects, a place in the dictionary (measured)."""


@dataclass(frozen=True)
class CacheFigures:
    """What became of the look-ups; ``entries`` and ``bytes`` are None where they are another process's."""

    kind: str
    hits: int
    misses: int
    entries: int | None = None
    bytes: int | None = None
    failures: int = 0


class ResultCache(Protocol):
    """Vectors as float32 bytes under keys made by ``Scope.key``."""

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """In the order of ``keys``, None for each that is not known. Never raises."""
        ...

    async def put_many(self, results: Mapping[bytes, bytes]) -> None:
        """Remember these, as long as there is room. Never raises."""
        ...

    def figures(self) -> CacheFigures: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Scope:
    """All that a vector depends on beside its input; one for each kind of input of a service."""

    model: str
    """Its identity: ``model_fingerprint`` where the cache is shared, any name where it ends with the process."""
    kind: str
    """text or image."""
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """What changes the vector: quantisation, truncation, normalisation."""

    def key(self, item: str | bytes) -> bytes:
        """The key of one input: a text as it is sent to the model, or an image's bytes as received."""
        data = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item
        head = json.dumps([self.model, self.kind, sorted(self.settings.items())])
        hashed = hashlib.blake2b(head.encode(), digest_size=_KEY_BYTES)
        hashed.update(b"\0")
        hashed.update(data)
        return hashed.digest()


def model_fingerprint(folder: Path) -> str:
    """A hash of every file of a model but hidden ones, so that other weights under the same name are another model.

    Reads them all, about a second for a GB. Raises OSError.
    """
    hashed = hashlib.blake2b(digest_size=_KEY_BYTES)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "blake2b").hexdigest()
            hashed.update(json.dumps([str(name), digest]).encode())
    return hashed.hexdigest()


class LruCache:
    """``ResultCache`` in this process: what was not asked for longest goes first. ``max_entries`` 0 keeps nothing."""

    def __init__(self, max_entries: int, max_bytes: int = 256 * 2**20) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._vectors: OrderedDict[bytes, bytes] = OrderedDict()
        self._bytes = self._hits = self._misses = 0

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See ``ResultCache``."""
        found = [self._vectors.get(key) for key in keys]
        for key, vector in zip(keys, found, strict=True):
            if vector is not None:
                self._vectors.move_to_end(key)
        hits = len(keys) - found.count(None)
        self._hits += hits
        self._misses += len(keys) - hits
        return found

    async def put_many(self, results: Mapping[bytes, bytes]) -> None:
        """See ``ResultCache``."""
        for key, vector in results.items():
            self._forget(key)
            self._vectors[key] = vector
            self._bytes += _cost(vector)
        while self._vectors and (len(self._vectors) > self._max_entries or self._bytes > self._max_bytes):
            self._forget(next(iter(self._vectors)))

    def _forget(self, key: bytes) -> None:
        vector = self._vectors.pop(key, None)
        if vector is not None:
            self._bytes -= _cost(vector)

    def figures(self) -> CacheFigures:
        """See ``ResultCache``; bytes include what the entries cost beside their vectors."""
        return CacheFigures("memory", self._hits, self._misses, len(self._vectors), self._bytes)

    async def close(self) -> None:
        """Nothing to close."""

    def __repr__(self) -> str:
        return f"<LruCache {len(self._vectors)} of {self._max_entries} vectors, {self._bytes / 2**20:.1f} MiB>"


def _cost(vector: bytes) -> int:
    return len(vector) + _ENTRY_BYTES
