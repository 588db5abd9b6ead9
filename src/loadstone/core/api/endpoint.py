"""What the endpoint families have in common: what goes into a body, and the shapes that come back.

One set of structs reads all of them. Fields that nobody needs are skipped unparsed, so a chunk costs about a
microsecond and an embedding's vectors cost nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

JsonObject = dict[str, Any]

OPTIONAL_FIELDS = ("stream_options", "ignore_eos", "min_tokens")
"""Fields that some servers reject with 400 or 422; a server is measured without those it rejects."""


class Prompt(msgspec.Struct, frozen=True):
    """What is asked. chat and completions: one text; embeddings: one or more, images in base64
    among them; rerank: the query, then the documents."""

    texts: tuple[str, ...] = ()
    messages: list[JsonObject] | None = None
    """A whole chat instead of a text."""


@dataclass(frozen=True)
class BodyOptions:
    """What every body of a run has in common."""

    model: str
    stream: bool = True
    ignore_eos: bool = False
    """Generate exactly the tokens asked for, whatever the model wants."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Merged last, over everything else (``--extra-body`` and sampling parameters)."""
    dropped: frozenset[str] = frozenset()
    """Of :data:`OPTIONAL_FIELDS`: those that the server rejects."""


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None


class Message(msgspec.Struct):
    """A chat chunk's ``delta`` or a whole reply's ``message``."""

    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: list[msgspec.Raw] | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Message | None = None
    message: Message | None = None
    finish_reason: str | None = None


class Document(msgspec.Struct):
    """One JSON document of any endpoint: a chunk of a stream or a whole reply."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None
    data: list[msgspec.Raw] | None = None
    results: list[msgspec.Raw] | None = None
    embeddings: list[msgspec.Raw] | None = None


@dataclass(frozen=True)
class Endpoint:
    """One endpoint family."""

    name: str
    path: str
    """Where OpenAI's and vLLM's servers have it, below the base URL."""
    streams: bool
    body: Callable[[Prompt, int | None, BodyOptions], JsonObject]
    """(prompt, tokens to generate, options) → the fields of a request; options are merged in by :meth:`build`."""
    text_of: Callable[[Choice], str]
    """Text that a choice carries: content and reasoning."""
    carries_content: Callable[[Choice], bool]
    """Whether a choice carries content, reasoning or a tool call (a role or an empty string is none of them)."""
    answered: Callable[[Document], bool]
    """Whether a whole reply is an answer of this endpoint."""
    names_model: bool = True
    """A request says which model it is for."""

    def build(self, prompt: Prompt, output_tokens: int | None, options: BodyOptions) -> bytes:
        """The JSON body of one request."""
        body = self.body(prompt, output_tokens, options)
        if self.streams:
            if options.stream:
                body["stream"] = True
                body["stream_options"] = {"include_usage": True}
            if options.ignore_eos:
                body["ignore_eos"] = True
        body.update(options.extra)
        for name in options.dropped:
            body.pop(name, None)
        return msgspec.json.encode(body)


def without_choices(choice: Choice) -> str:
    """``text_of`` where an answer has no choices."""
    return ""


def never(choice: Choice) -> bool:
    """``carries_content`` where nothing streams."""
    return False
