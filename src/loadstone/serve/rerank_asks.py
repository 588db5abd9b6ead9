"""Bodies of /rerank and /score into pairs to judge, and their scores into replies. Pure.

The fields are those of Cohere, Jina and vLLM. A document that is too long is refused unless the request asks for less
of it to be read: ``truncate`` (``truncation`` in Jina's and Voyage's API) or ``max_tokens_per_doc`` (Cohere, vLLM).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from loadstone.core.refusals import BadAskError
from loadstone.serve.pairs import Pair, Score

MAX_DOCUMENTS = 1000
"""Pairs in one request: it is one place in the gate, and holds the engine for as long as all of them take."""


@dataclass(frozen=True)
class RerankAsk:
    """A query and the documents to sort by it."""

    pairs: tuple[Pair, ...]
    top_n: int
    return_documents: bool


class Document(msgspec.Struct):
    text: str


class Result(msgspec.Struct, omit_defaults=True):
    """One document of a reply to /rerank."""

    index: int
    relevance_score: float
    document: Document | None = None
    truncated: bool = False


class ScoreData(msgspec.Struct, omit_defaults=True):
    """One pair of a reply to /score."""

    index: int
    object: str
    score: float
    truncated: bool = False


def rerank_ask(body: Mapping[str, Any]) -> RerankAsk:
    """Raises BadAskError, naming the field."""
    query = _text(body.get("query"), "query")
    documents = _documents(body.get("documents"))
    options = _options(body)
    pairs = tuple(
        Pair(query, document, "query", f"documents[{index}]", **options) for index, document in enumerate(documents)
    )
    top_n = _whole(body, "top_n")
    return RerankAsk(pairs, len(pairs) if top_n is None else top_n, _flag(body, "return_documents"))


def score_ask(body: Mapping[str, Any]) -> tuple[Pair, ...]:
    """One text_1 for all of text_2, or as many of each. Raises BadAskError, naming the field."""
    first, second = _texts(body.get("text_1"), "text_1"), _texts(body.get("text_2"), "text_2")
    if len(first) not in (1, len(second)):
        raise BadAskError(
            f"text_1 has {len(first)} texts and text_2 has {len(second)}: give one text_1, or as many as text_2",
            "text_1",
        )
    options = _options(body)
    queries = first * len(second) if len(first) == 1 else first
    params = ["text_1"] * len(second) if len(first) == 1 else [f"text_1[{index}]" for index in range(len(first))]
    return tuple(
        Pair(query, text, param, f"text_2[{index}]", **options)
        for index, (query, param, text) in enumerate(zip(queries, params, second, strict=True))
    )


def ranked(ask: RerankAsk, scores: Sequence[Score]) -> list[Result]:
    """The best ``top_n``, best first; of equal ones the first in the request."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index].value)
    return [
        Result(
            index,
            scores[index].value,
            Document(ask.pairs[index].document) if ask.return_documents else None,
            scores[index].truncated,
        )
        for index in order[: ask.top_n]
    ]


def _options(body: Mapping[str, Any]) -> dict[str, Any]:
    instruction = body.get("instruction")
    return {
        "instruction": "" if instruction is None else _text(instruction, "instruction"),
        "truncate": _flag(body, "truncate") or _flag(body, "truncation"),
        "max_document_tokens": _whole(body, "max_tokens_per_doc"),
    }


def _documents(value: Any) -> list[str]:
    return [
        _text(each.get("text"), f"documents[{index}].text")
        if isinstance(each, dict)
        else _text(each, f"documents[{index}]")
        for index, each in enumerate(_some(value, "documents"))
    ]


def _texts(value: Any, param: str) -> list[str]:
    if isinstance(value, list):
        return [_text(each, f"{param}[{index}]") for index, each in enumerate(_some(value, param))]
    return [_text(value, param)]


def _some(value: Any, param: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BadAskError(f"{param} must be a list of at least one text", param)
    if len(value) > MAX_DOCUMENTS:
        raise BadAskError(
            f"{param} has {len(value)} entries, and {MAX_DOCUMENTS} are taken at once: send several requests", param
        )
    return value


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadAskError(f"{param} must be a text that is not empty", param)
    return value


def _whole(body: Mapping[str, Any], param: str) -> int | None:
    value = body.get(param)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadAskError(f"{param} must be a whole number of at least 1", param)
    return value


def _flag(body: Mapping[str, Any], param: str) -> bool:
    value = body.get(param)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise BadAskError(f"{param} must be true or false", param)
