"""What the rerank service asks of an engine, what it gets back, and how much of a long document is read. Pure."""

import math
from dataclasses import dataclass

from loadstone.core.engine import EngineError
from loadstone.core.refusals import BadAskError


@dataclass(frozen=True, slots=True)
class Pair:
    """A document to judge against a query."""

    query: str
    document: str
    query_param: str
    """Field of the request that the query came from."""
    document_param: str
    """Field of the request that the document came from, such as ``documents[3]``."""
    instruction: str = ""
    """What makes a document relevant; empty is the model's own default."""
    truncate: bool = False
    """Read the beginning of a document that is too long, rather than refuse it."""
    max_document_tokens: int | None = None
    """Read at most this much of the document."""


@dataclass(frozen=True, slots=True)
class Tokenised:
    """A pair as a model takes it."""

    ids: list[int]
    param: str
    """Field of the request that the document came from."""
    truncated: bool
    """The end of the document was left out."""
    segments: list[int] | None = None
    """For each token whether it belongs to the query or the document, for the models that are told."""


@dataclass(frozen=True, slots=True)
class Score:
    """How well a document answers its query."""

    value: float
    tokens: int
    """Length of what was computed, prompt included."""
    truncated: bool


def scored(value: float, pair: Tokenised) -> Score | EngineError:
    """The score of ``pair``, or an error where ``value`` is none."""
    if math.isfinite(value):
        return Score(value, len(pair.ids), pair.truncated)
    return EngineError(f"{pair.param}: its score is {value}, not a number to rank by", pair.param)


def tokens_to_read(pair: Pair, *, document_tokens: int, other_tokens: int, limit_tokens: int) -> int:
    """How many tokens of the document are read, from its beginning.

    ``other_tokens`` are those of the query and the prompt, of which nothing is ever left out. Raises BadAskError where
    the document does not fit and ``truncate`` is not asked for, and where the query leaves no room for any document.
    """
    room = limit_tokens - other_tokens
    if room < 1:
        raise BadAskError(
            f"{pair.query_param} is too long: with the prompt it has {other_tokens} tokens, which leaves no room for a "
            f"document within {limit_tokens}",
            pair.query_param,
        )
    asked = min(document_tokens, pair.max_document_tokens or document_tokens)
    if asked > room and not pair.truncate:
        raise BadAskError(
            f"{pair.document_param} has {document_tokens} tokens, and {room} fit beside this query (limit "
            f'{limit_tokens}): shorten it, or send "truncate": true to have its beginning read',
            pair.document_param,
        )
    return min(asked, room)
