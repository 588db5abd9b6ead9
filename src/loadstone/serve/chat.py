"""Chat and plain completions over a text engine, as OpenAI's API, and the process of one replica of it.

``python -m loadstone.serve.chat --port P --model PATH_OR_ID`` serves a checkpoint through transformers' continuous
batching on a port of the loopback until its standard input is closed.
"""

import argparse
import asyncio
import contextlib
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loadstone.core.errors import LoadstoneError
from loadstone.serve.app import error_reply, json_object, json_reply, run, service
from loadstone.serve.chat_asks import Sampling, TextAsk, chat_ask, completion_ask
from loadstone.serve.chat_replies import Usage, Wording
from loadstone.serve.chat_stream import EventStream, Pieces, events
from loadstone.serve.chat_text import Reply
from loadstone.serve.disconnect import while_connected
from loadstone.serve.parent import ParentWatch


class TextEngine(Protocol):
    """A model that continues texts, many at once."""

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its reply may have together."""
        ...

    @property
    def default_sampling(self) -> Sampling:
        """The model's own."""
        ...

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a reply."""
        ...

    def tokens_of(self, prompt: Any, template_options: Mapping[str, Any]) -> list[int]:
        """Tokenise a prompt (text, token ids or messages); called on several threads at once. Raises BadAskError."""
        ...

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, without that of special tokens."""
        ...

    def generate(
        self, prompt: list[int], max_tokens: int, sampling: Sampling, ignore_eos: bool
    ) -> AsyncGenerator[list[int]]:
        """New tokens, as they come, at most ``max_tokens``, the end token included. Closing it frees its place.
        Raises EngineError."""
        ...

    def failure(self) -> str | None:
        """Why nothing can be generated any more, or None."""
        ...

    def health(self) -> dict[str, Any]:
        """The settings in force and the requests under way."""
        ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class ChatService:
    """The endpoints over one engine; ``name`` is what the model is called."""

    def __init__(self, engine: TextEngine, name: str, prepare_threads: int) -> None:
        self._engine = engine
        self._name = name
        self._started_s = int(time.time())
        self._pool = ThreadPoolExecutor(prepare_threads, "prepare")

    def app(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._health),
        ]
        return service(routes, self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        await self._engine.start()
        try:
            yield
        finally:
            await self._engine.stop()
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat_ask, "messages")

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, completion_ask, "prompt")

    async def _answer(
        self, request: Request, read: Callable[[Mapping[str, Any], Sampling], TextAsk], param: str
    ) -> Response:
        ask = read(await json_object(request), self._engine.default_sampling)
        if ask.model not in (None, self._name):
            message = f"there is no model {ask.model!r} here; it is called {self._name!r}"
            return error_reply(404, message, "model_not_found", "model")
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self._pool, self._engine.tokens_of, ask.prompt, ask.template_options)
        room = self._engine.max_model_len - len(prompt)
        if room < 1:
            return error_reply(400, self._too_long(len(prompt), param), "context_length_exceeded", param)
        reply = Reply(
            self._engine.text_of,
            max_tokens=min(ask.max_tokens or room, room),
            stops=ask.stop,
            end_tokens=frozenset() if ask.ignore_eos else self._engine.end_tokens,
        )
        return await self._send(request, ask, prompt, reply)

    async def _send(self, request: Request, ask: TextAsk, prompt: list[int], reply: Reply) -> Response:
        chat = isinstance(ask.prompt, list) and isinstance(ask.prompt[0], dict)
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        wording = Wording(name, int(time.time()), self._name, chat)
        pieces = self._pieces(ask, prompt, reply)
        if ask.stream:
            return EventStream(events(wording, pieces, reply, len(prompt), ask.include_usage))
        return await while_connected(request, _document(wording, pieces, reply, len(prompt)))

    async def _pieces(self, ask: TextAsk, prompt: list[int], reply: Reply) -> Pieces:
        async with aclosing(
            self._engine.generate(prompt, reply.max_tokens, ask.sampling, ask.ignore_eos)
        ) as generation:
            async for tokens in generation:
                if text := reply.extend(tokens):
                    yield text
                if reply.finish_reason is not None:
                    return

    def _too_long(self, tokens: int, param: str) -> str:
        limit = self._engine.max_model_len
        return f"{param}: {tokens} tokens are too long: this model has room for {limit}, the reply included"

    async def _models(self, _request: Request) -> Response:
        model = {"id": self._name, "object": "model", "created": self._started_s, "owned_by": "loadstone"}
        return json_reply({"object": "list", "data": [model | {"max_model_len": self._engine.max_model_len}]})

    async def _health(self, _request: Request) -> Response:
        failure = self._engine.failure()
        if failure is not None:
            return error_reply(503, failure, "engine_error")
        return json_reply({"status": "ok", "model": self._name, **self._engine.health()})

    def __repr__(self) -> str:
        return f"<ChatService {self._name!r} over {self._engine!r}>"


async def _document(wording: Wording, pieces: Pieces, reply: Reply, prompt_tokens: int) -> Response:
    async with aclosing(pieces):
        text = "".join([text async for text in pieces])
    body = wording.whole(text, reply.finish_reason, Usage(prompt_tokens, reply.tokens))
    return Response(body, media_type="application/json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadstone.serve.chat")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True, help="folder of a checkpoint, or its name on the hub")
    parser.add_argument("--served-model-name", help="what clients call it; its --model where none is given")
    parser.add_argument("--quantization", choices=["none", "int8"], default="none")
    parser.add_argument("--threads", type=int, default=2, help="threads that tokenise")
    parser.add_argument("--max-num-seqs", type=int, default=4, help="replies generated at once")
    parser.add_argument("--max-num-batched-tokens", type=int, default=1024, help="tokens of one step")
    parser.add_argument("--max-model-len", type=int, help="tokens of a prompt and its reply together")
    told = parser.parse_args()
    parent = ParentWatch()
    from loadstone.serve.engines.transformers_chat import Room, load_engine

    room = Room(told.max_num_seqs, told.max_num_batched_tokens, told.max_model_len)
    try:
        engine = load_engine(told.model, room, int8=told.quantization == "int8")
    except LoadstoneError as error:
        sys.exit(f"loadstone: {error}")
    run(ChatService(engine, told.served_model_name or told.model, told.threads).app(), told.port, parent)


if __name__ == "__main__":
    main()
