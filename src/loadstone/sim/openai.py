"""The OpenAI shapes the simulator reads and writes: request bodies in, JSON and server-sent events out.

A token is one whitespace-separated word, of prompts and replies alike; chat templates add nothing.
"""

import msgspec

from loadstone.sim.profiles import MODEL
from loadstone.sim.service import Fate

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"


class _Message(msgspec.Struct):
    content: str | list[dict[str, object]] | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Body(msgspec.Struct):
    """What matters of a chat or completions body; ``ignore_eos`` and the rest are accepted and ignored."""

    model: str | None = None
    messages: list[_Message] | None = None
    prompt: str | list[int] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class Ask(msgspec.Struct, frozen=True):
    """One parsed request."""

    prompt_tokens: int
    output_tokens: int
    """The most that the reply may have."""
    stream: bool
    include_usage: bool


class BadRequestError(Exception):
    """A request that is answered with an error: HTTP status and the OpenAI error body."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(status, message)


_DECODER = msgspec.json.Decoder(_Body)


def parse_ask(path: str, body: bytes, default_output_tokens: int, prompt_tokens: int | None = None) -> Ask:
    """Read a request body; ``prompt_tokens``, where known, saves counting the words. Raises BadRequestError."""
    try:
        parsed = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequestError(400, f"the body is not a valid request: {error}") from error
    if parsed.model is not None and parsed.model != MODEL:
        raise BadRequestError(404, f"The model `{parsed.model}` does not exist; this server has `{MODEL}`.")
    chat = path == CHAT_PATH
    if (parsed.messages if chat else parsed.prompt) is None:
        raise BadRequestError(400, f"`{'messages' if chat else 'prompt'}` is missing")
    output_tokens = parsed.max_completion_tokens if parsed.max_completion_tokens is not None else parsed.max_tokens
    if output_tokens is not None and output_tokens < 1:
        raise BadRequestError(400, f"max_tokens must be at least 1, not {output_tokens}")
    return Ask(
        prompt_tokens=_count_prompt(parsed) if prompt_tokens is None else prompt_tokens,
        output_tokens=default_output_tokens if output_tokens is None else output_tokens,
        stream=bool(parsed.stream),
        include_usage=parsed.stream_options is not None and parsed.stream_options.include_usage,
    )


def _count_prompt(body: _Body) -> int:
    if body.messages is not None:
        return sum(_count_words(message.content) for message in body.messages)
    return len(body.prompt) if isinstance(body.prompt, list) else _count_words(body.prompt)


def _count_words(content: str | list[dict[str, object]] | None) -> int:
    if isinstance(content, list):
        return sum(len(str(part["text"]).split()) for part in content if "text" in part)
    return len(content.split()) if content else 0


_KINDS = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError", 503: "ServiceUnavailableError"}


def error_body(status: int, message: str) -> bytes:
    """An OpenAI error object."""
    return msgspec.json.encode(
        {"error": {"message": message, "type": _KINDS.get(status, "BadRequestError"), "param": None, "code": status}}
    )


REFUSALS: dict[Fate, tuple[int, bytes]] = {
    Fate.REFUSED: (503, error_body(503, "The server is full: too many requests in flight.")),
    Fate.ERROR: (500, error_body(500, "The simulated engine made a stray error.")),
    Fate.TOO_LONG: (400, error_body(400, "Prompt and reply together exceed the whole KV cache.")),
}
"""Status and body of each fate that ends a request at once."""


class Replies:
    """The reply bytes of one endpoint; chunks of one size are built once."""

    def __init__(self, path: str) -> None:
        self._chat = path == CHAT_PATH
        kind = "chat.completion" if self._chat else "text_completion"
        self._prefix = f'{{"id":"sim","object":"{kind}","created":0,"model":"{MODEL}",'
        chunk_kind = "chat.completion.chunk" if self._chat else "text_completion"
        self._chunk_prefix = f'data: {{"id":"sim","object":"{chunk_kind}","created":0,"model":"{MODEL}",'
        self._chunks: dict[tuple[int, str], bytes] = {}
        role = '"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]'
        self._role = f"{self._chunk_prefix}{role}}}\n\n".encode() if self._chat else b""

    def chunk(self, ask: Ask, sent_tokens: int, tokens: int, finished: bool) -> bytes:
        """The events that carry a stream from ``sent_tokens`` to ``tokens``, to its end where ``finished``."""
        key = (tokens - sent_tokens, _finish_reason(ask, tokens) if finished else "null")
        data = self._chunks.get(key)
        if data is None:
            data = self._chunks[key] = self._content(*key)
        if sent_tokens == 0:
            data = self._role + data
        if finished:
            data += self._ending(ask, tokens)
        return data

    def whole(self, ask: Ask, tokens: int) -> bytes:
        """The JSON reply where nothing is streamed."""
        text = _words(tokens)
        choice = f'"message":{{"role":"assistant","content":"{text}"}}' if self._chat else f'"text":"{text}"'
        choice += f',"finish_reason":{_finish_reason(ask, tokens)}'
        return f'{self._prefix}"choices":[{{"index":0,{choice}}}],{_usage(ask, tokens)}}}'.encode()

    def _content(self, tokens: int, reason: str) -> bytes:
        text = _words(tokens)
        piece = f'"delta":{{"content":"{text}"}}' if self._chat else f'"text":"{text}"'
        return f'{self._chunk_prefix}"choices":[{{"index":0,{piece},"finish_reason":{reason}}}]}}\n\n'.encode()

    def _ending(self, ask: Ask, tokens: int) -> bytes:
        usage = f'{self._chunk_prefix}"choices":[],{_usage(ask, tokens)}}}\n\n' if ask.include_usage else ""
        return f"{usage}data: [DONE]\n\n".encode()


def _finish_reason(ask: Ask, tokens: int) -> str:
    return '"length"' if tokens == ask.output_tokens else '"stop"'


def _words(tokens: int) -> str:
    return " lode" * tokens


def _usage(ask: Ask, tokens: int) -> str:
    total = ask.prompt_tokens + tokens
    return f'"usage":{{"prompt_tokens":{ask.prompt_tokens},"total_tokens":{total},"completion_tokens":{tokens}}}'
