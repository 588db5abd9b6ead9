"""What a chat engine answers: the OpenAI documents and chunks of both endpoints. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Usage:
    """Tokens that one reply took."""

    prompt_tokens: int
    completion_tokens: int

    def document(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True)
class Wording:
    """The shape of one answer: of a chat, or of a plain completion."""

    id: str
    created: int
    """Unix seconds."""
    model: str
    chat: bool

    def whole(self, text: str, finish_reason: str | None, usage: Usage) -> bytes:
        """The answer in one document."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return msgspec.json.encode(self._document(kind, [_choice(said, finish_reason)], {"usage": usage.document()}))

    def first(self) -> bytes:
        """The event that opens a stream: the role, before any content. A plain completion has none."""
        return self._event([_choice({"delta": {"role": "assistant", "content": ""}})]) if self.chat else b""

    def piece(self, text: str) -> bytes:
        """An event that carries ``text``."""
        return self._event([_choice({"delta": {"content": text}} if self.chat else {"text": text})])

    def last(self, finish_reason: str | None) -> bytes:
        """The event that says why the reply ended."""
        return self._event([_choice({"delta": {}} if self.chat else {"text": ""}, finish_reason)])

    def usage(self, usage: Usage) -> bytes:
        """The event with the figures: no choice in it, after all others."""
        return self._event([], {"usage": usage.document()})

    def _event(self, choices: list[dict[str, Any]], more: Mapping[str, Any] | None = None) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event(msgspec.json.encode(self._document(kind, choices, more or {})))

    def _document(self, kind: str, choices: list[dict[str, Any]], more: Mapping[str, Any]) -> dict[str, Any]:
        document = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return document | dict(more)


def event(data: bytes) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % data


def _choice(said: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
