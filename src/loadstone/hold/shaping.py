"""What a request asks for: its cost in tokens, and its output held to the limits.

The body is forwarded byte for byte where nothing was changed. Prompt tokens are estimated, four bytes of JSON for one
(Chinese: three bytes a character, some 0.7 tokens); ``usage`` in the reply settles the account.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import msgspec

from loadstone.core.limits import Limits
from loadstone.core.refusals import BadAskError
from loadstone.hold.bodies import ABSENT, Ask, decode_ask

_BYTES_PER_TOKEN = 4
_AFFINITY_BYTES = 1024
_GENERATES = ("/chat/completions", "/completions", "/responses", "/completion", "/messages")
_DEFAULT_KEYS = {"/responses": "max_output_tokens", "/completion": "n_predict"}
_JSON_ONLY = (*_GENERATES, "/embeddings", "/rerank", "/score", "/embed_text")
_OUTPUT_KEYS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")


class Shaped:
    """A request as it goes upstream."""

    __slots__ = ("body", "prompt", "tokens")

    def __init__(self, body: bytes, tokens: int, prompt: msgspec.Raw = ABSENT) -> None:
        self.body = body
        self.tokens = tokens
        """Prompt, estimated, and the most output that it may generate."""
        self.prompt = prompt
        """As JSON, where it has one."""

    @property
    def affinity(self) -> int | None:
        """Hash of the start of the prompt: requests that share it may share an upstream's prefix cache."""
        prefix = bytes(self.prompt)[:_AFFINITY_BYTES]
        return zlib.crc32(prefix) if prefix else None


class Kind:
    """What a path and a content type say about the body behind them."""

    __slots__ = ("content_type", "generates", "is_json", "output_key")

    def __init__(self, is_json: bool, generates: bool, output_key: str, content_type: bytes | None) -> None:
        self.is_json = is_json
        self.generates = generates
        self.output_key = output_key
        """Where the most output is told if the request names none."""
        self.content_type = content_type
        """One that is wrong for JSON."""


def kind_of(path: str, content_type: bytes | None) -> Kind:
    """The same for all requests under one head."""
    output_key = _DEFAULT_KEYS.get(path[path.rfind("/") :], "max_tokens")
    wrong = content_type is not None and b"json" not in content_type.lower()
    return Kind(path.endswith(_JSON_ONLY), path.endswith(_GENERATES), output_key, content_type if wrong else None)


def shape(path: str, content_type: bytes | None, body: bytes, limits: Limits) -> Shaped:
    """Read and bound one request. Raises BadAskError for JSON that is none, or asks for impossible amounts."""
    return shape_kind(kind_of(path, content_type), body, limits)


def shape_kind(kind: Kind, body: bytes, limits: Limits) -> Shaped:
    """As ``shape``."""
    if not kind.is_json:
        return Shaped(body, _prompt_tokens(body))
    if kind.content_type is not None:
        said = kind.content_type.decode("latin-1")
        raise BadAskError(f"Content-Type is {said!r}; send the JSON as application/json")
    try:
        ask = decode_ask(body)
        if not kind.generates:
            return Shaped(body, _prompt_tokens(body))
        # What the parser skipped above may turn out to be no JSON when all of it is read.
        return _generation(kind, ask, body, limits)
    except msgspec.ValidationError as error:
        raise _wrong_value(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadAskError(f"the body is not a JSON object: {error}") from None


def _wrong_value(message: str) -> BadAskError:
    """The parser's words, ``Expected `int` >= 0 - at `$.max_tokens```, with the key in front."""
    what, _, where = message.partition(" - at `$.")
    key = where.rstrip("`")
    if not key:
        return BadAskError(f"the body is not a JSON object: {what}")
    return BadAskError(f"{key}: {what.replace('`', '')}", key)


def _generation(kind: Kind, ask: Ask, body: bytes, limits: Limits) -> Shaped:
    asked = (ask.max_tokens, ask.max_completion_tokens, ask.max_output_tokens, ask.n_predict)
    highest = max([-1 if value is None else value for value in asked])
    most = limits.max_output_tokens
    changes: dict[str, int] | None = None
    if highest < 0:
        default = limits.default_output_tokens or most
        if default is not None:
            highest = default if most is None else min(default, most)
            changes = {kind.output_key: highest}
    elif most is not None and highest > most:
        highest = most
        changes = {
            key: most for key, value in zip(_OUTPUT_KEYS, asked, strict=True) if value is not None and value > most
        }
    tokens = -(-len(body) // _BYTES_PER_TOKEN)
    if ask.prompt is not ABSENT or ask.n is not None or ask.best_of is not None:
        tokens += max(highest, 0) * _replies(ask)
    elif highest > 0:
        tokens += highest
    if changes:
        if ask.min_tokens is not None and ask.min_tokens > highest:
            changes["min_tokens"] = highest
        body = msgspec.json.encode(msgspec.json.decode(body) | changes)
    return Shaped(body, tokens, ask.prompt if ask.messages is ABSENT else ask.messages)


def _replies(ask: Ask) -> int:
    """How many outputs are generated."""
    replies = ask.n or 1
    if ask.best_of is not None and ask.best_of > replies:
        replies = ask.best_of
    if ask.prompt is ABSENT:
        return replies
    prompt = bytes(ask.prompt)
    return replies * _prompts(prompt) if prompt.startswith(b"[") else replies


def _prompts(prompt: bytes) -> int:
    """How many prompts a list holds: one where it is the token ids of one, else its texts or lists of token ids."""
    parts: Sequence[Any] = msgspec.json.decode(prompt)
    return max(1, sum(1 for part in parts if not isinstance(part, int)))


def _prompt_tokens(body: bytes) -> int:
    return -(-len(body) // _BYTES_PER_TOKEN)
