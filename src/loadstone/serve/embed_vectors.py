"""Vectors between the model, the cache and the reply. Pure.

What is computed and cached is the vector as the model gives it; normalising and cutting it is the reply's affair, so
that one cached vector serves every request for its text.
"""

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from loadstone.core.engine import EngineError
from loadstone.serve.embed_asks import VectorOptions

Floats = npt.NDArray[np.float32]

_HEAD = struct.Struct("<I?3x")
_DIGITS = 8
"""float32 has seven and a bit."""
_LEAST_NORM = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """What the model makes of one text or image."""

    vector: Floats
    """(dim,), finite, not normalised unless the model does that itself."""
    tokens: int
    """Read by the model: tokens of the text without padding, patches of the image."""
    truncated: bool = False
    """The end of the text was left out."""


class Measured(Protocol):
    """A prepared item, as far as its result repeats it; ``param`` is the field of the request that it came from."""

    @property
    def param(self) -> str: ...

    @property
    def tokens(self) -> int: ...

    @property
    def truncated(self) -> bool: ...


def embeddings(vectors: Floats, batch: Sequence[Measured]) -> list[Embedding | EngineError]:
    """The rows of ``vectors``, (len(batch), dim); an EngineError in the place of one that is not finite."""
    return [
        Embedding(row, item.tokens, item.truncated)
        if np.isfinite(row).all()
        else EngineError(f"{item.param}: its vector has NaN or infinity in it", item.param)
        for row, item in zip(vectors, batch, strict=True)
    ]


def packed_size(dim: int) -> int:
    """Bytes of a packed embedding of ``dim`` dimensions."""
    return _HEAD.size + 4 * dim


def pack(embedding: Embedding) -> bytes:
    """For the cache."""
    return _HEAD.pack(embedding.tokens, embedding.truncated) + embedding.vector.astype("<f4", copy=False).tobytes()


def unpack(data: bytes) -> Embedding:
    """What ``pack`` made."""
    tokens, truncated = _HEAD.unpack_from(data)
    return Embedding(np.frombuffer(data, "<f4", offset=_HEAD.size), tokens, truncated)


def shaped(found: Sequence[Embedding], options: VectorOptions) -> Floats:
    """(len(found), dimensions): cut, then normalised, as Matryoshka models are meant to be used."""
    whole = np.stack([embedding.vector for embedding in found])
    vectors = whole[:, : options.dimensions]
    if not options.normalize:
        return vectors
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    normalised: Floats = vectors / np.maximum(norms, _LEAST_NORM)
    return normalised


def written(vectors: Floats, options: VectorOptions) -> list[list[float]] | list[str]:
    """The rows as JSON takes them.

    Numbers are rounded to what float32 holds of the largest: its exact digits, as a double's, would take twice the
    space in the reply and say nothing. base64 is exact.
    """
    if options.base64:
        return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
    peak = float(np.abs(vectors).max())
    decimals = _DIGITS - math.ceil(math.log10(peak)) if peak > 0.0 else 0
    rounded: list[list[float]] = np.round(vectors.astype(np.float64), decimals).tolist()
    return rounded
