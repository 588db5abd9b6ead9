"""The chat service without a model: bodies in, text that is never taken back, events out, places freed."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_calls import Call
from gates import until
from loadstone.core.engine import EngineError
from loadstone.core.errors import UsageError
from loadstone.core.refusals import BadAskError
from loadstone.core.settings import ServeSettings
from loadstone.serve.chat import ChatService
from loadstone.serve.chat_asks import MAX_STOPS, Sampling, chat_ask, completion_ask
from loadstone.serve.chat_text import Detokeniser, Reply, StopFinder
from loadstone.serve.engines.vllm import chat_command, check_int8

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def utf8(tokens: Sequence[int]) -> str:
    """A vocabulary of bytes; 256 is a special token, which has no text."""
    return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


# Bodies


@pytest.mark.parametrize(
    ("keys", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"content": "hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"model": 5}, "model"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1, "max_tokens": 5}, "max_completion_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"stop": 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"stop": ["a"] * (MAX_STOPS + 1)}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": True}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"seed": "x", "temperature": 0}, "seed"),
        ({"seed": 7}, "seed"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(keys: dict[str, Any], param: str) -> None:
    with pytest.raises(BadAskError) as refused:
        chat_ask(HELLO | keys, Sampling())
    assert refused.value.param == param
    assert param.partition("[")[0] in str(refused.value)


def test_what_asks_for_nothing_is_let_through() -> None:
    ask = chat_ask(
        HELLO
        | {"n": 1, "logprobs": False, "tools": [], "frequency_penalty": 0.0, "seed": 7, "temperature": 0, "user": "me"},
        Sampling(0.6, 0.95),
    )
    assert ask.sampling == Sampling(0.0, 0.95)
    assert (ask.max_tokens, ask.stop, ask.stream, ask.include_usage) == (None, (), False, False)


def test_a_chat_is_read() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    ask = chat_ask(
        {
            "model": "m",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}],
            "max_tokens": 9,
            "max_completion_tokens": 7,
            "stop": "END",
            "stream": True,
            "stream_options": {"include_usage": True},
            "chat_template_kwargs": {"enable_thinking": False},
        },
        Sampling(),
    )
    assert ask.prompt == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one\ntwo"}]
    assert (ask.max_tokens, ask.stop, ask.stream, ask.include_usage) == (7, ("END",), True, True)
    assert ask.template_options == {"enable_thinking": False}


@pytest.mark.parametrize("prompt", ["hello", [1, 2, 3], ["hello"], [[1, 2, 3]]])
def test_a_prompt_is_text_or_tokens(prompt: object) -> None:
    assert completion_ask({"prompt": prompt}, Sampling()).prompt in ("hello", [1, 2, 3])


@pytest.mark.parametrize("prompt", [None, "", [], [""], ["a", "b"], [[1], [2]], [1, "a"], [True], 5, {"a": 1}])
def test_a_prompt_that_is_none(prompt: object) -> None:
    with pytest.raises(BadAskError, match="prompt") as refused:
        completion_ask({"prompt": prompt}, Sampling())
    assert refused.value.param == "prompt"


# Tokens to text


def spoken(detokeniser: Detokeniser, tokens: Sequence[int]) -> list[str]:
    return [*(detokeniser.push(token) for token in tokens), detokeniser.flush()]


@given(st.text(), st.lists(st.integers(0, 40), max_size=4))
def test_pieces_make_up_the_text_and_none_holds_half_a_character(text: str, specials: list[int]) -> None:
    tokens = list(text.encode())
    for place in specials:
        tokens.insert(place, 256)
    pieces = spoken(Detokeniser(utf8), tokens)
    assert "".join(pieces) == utf8(tokens).rstrip("\ufffd")
    assert text.count("\ufffd") >= "".join(pieces).count("\ufffd")


@given(st.lists(st.integers(0, 255), max_size=60))
def test_bytes_that_are_no_text_hold_nothing_back_for_ever(tokens: list[int]) -> None:
    detokeniser = Detokeniser(utf8)
    pieces = [detokeniser.push(token) for token in [*tokens, *b"well"]]
    assert "".join(pieces).endswith("well")
    assert len("".join(pieces)) >= len(bytes(tokens).decode("utf-8", errors="ignore")) + 4


def test_a_piece_is_decoded_with_the_one_before_it() -> None:
    """As SentencePiece does: the blank before a word is left out at the beginning of a text."""
    words = ["\u2581the", "\u2581quick", "fox"]

    def decode(tokens: Sequence[int]) -> str:
        return "".join(words[token] for token in tokens).replace("\u2581", " ").removeprefix(" ")

    assert spoken(Detokeniser(decode), [0, 1, 2, 1]) == ["the", " quick", "fox", " quick", ""]


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=3), max_size=12),
)
def test_a_stop_string_is_found_whatever_the_pieces(stops: list[str], pieces: list[str]) -> None:
    finder = StopFinder(stops)
    whole, told = "", ""
    for piece in pieces:
        if finder.found:
            break
        whole += piece
        told += finder.push(piece)
        assert whole.startswith(told)
        assert not any(stop in told for stop in stops)
        assert finder.found == any(stop in whole for stop in stops)
    told += finder.flush()
    first = min((place for stop in stops if (place := whole.find(stop)) >= 0), default=len(whole))
    assert told == whole[:first]


@pytest.mark.parametrize(
    ("text", "stops", "max_tokens", "said", "reason", "tokens"),
    [
        ("hello", [], 3, "hel", "length", 3),
        ("hel\0lo", [], 9, "hel", "stop", 4),
        ("one\ntwo", ["\ntw"], 20, "one", "stop", 6),
        ("one\ntwo", ["\nx"], 4, "one\n", "length", 4),
        ("one\ntwo", ["\n"], 4, "one", "stop", 4),
        ("ab\0", ["bc"], 9, "ab", "stop", 3),
        ("é你", [], 4, "é", "length", 4),
        ("é你", [], 5, "é你", "length", 5),
    ],
)
def test_a_reply_ends_once(text: str, stops: list[str], max_tokens: int, said: str, reason: str, tokens: int) -> None:
    for size in (1, 2, 100):
        reply = Reply(utf8, max_tokens=max_tokens, stops=stops, end_tokens={0})
        generated = list(text.encode())
        pieces = [reply.extend(generated[at : at + size]) for at in range(0, len(generated), size)]
        assert ("".join(pieces), reply.finish_reason, reply.tokens) == (said, reason, tokens)
        assert reply.extend([65, 66]) == ""


# The service


class Echo:
    """Says the prompt again, a byte at a time, until it is told to fail or the client leaves."""

    max_model_len = 32
    default_sampling = Sampling()
    end_tokens = frozenset({0})

    def __init__(self, fails_after: int | None = None, endless: bool = False) -> None:
        self.open = 0
        self.broken: str | None = None
        self._fails_after = fails_after
        self._endless = endless

    def tokens_of(self, prompt: Any, template_options: Mapping[str, Any]) -> list[int]:
        return list((prompt if isinstance(prompt, str) else prompt[-1]["content"]).encode())

    def text_of(self, tokens: Sequence[int]) -> str:
        return utf8(tokens)

    async def generate(
        self, prompt: list[int], max_tokens: int, sampling: Sampling, ignore_eos: bool
    ) -> AsyncGenerator[list[int]]:
        self.open += 1
        try:
            for said, token in enumerate([*prompt, 0]):
                await asyncio.sleep(0)
                if said == self._fails_after:
                    raise EngineError("out of memory")
                yield [token]
                if self._endless:
                    await asyncio.Event().wait()
        finally:
            self.open -= 1

    def failure(self) -> str | None:
        return self.broken

    def health(self) -> dict[str, Any]:
        return {"engine": "echo"}

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass


def call(engine: Echo, body: object, path: str = "/v1/chat/completions", method: str = "POST") -> Call:
    return Call(ChatService(engine, "echo", 1).app(), json.dumps(body).encode(), path=path, method=method)


def answered(engine: Echo, body: object, path: str = "/v1/chat/completions", method: str = "POST") -> Call:
    async def main() -> Call:
        return await call(engine, body, path, method).done()

    return asyncio.run(main())


def chunks(done: Call) -> list[Any]:
    lines = done.body.decode().split("\n\n")[:-1]
    return [json.loads(data) if (data := line.removeprefix("data: ")) != "[DONE]" else "DONE" for line in lines]


def test_a_document() -> None:
    done = answered(Echo(), HELLO | {"model": "echo"})
    document = json.loads(done.body)
    assert (done.status, document["object"], document["model"]) == (200, "chat.completion", "echo")
    assert document["choices"][0]["message"] == {"role": "assistant", "content": "hello"}
    assert document["choices"][0]["finish_reason"] == "stop"
    assert document["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    plain = json.loads(answered(Echo(), {"prompt": "hello", "max_tokens": 2}, "/v1/completions").body)
    assert (plain["object"], plain["choices"][0]["text"]) == ("text_completion", "he")
    assert plain["choices"][0]["finish_reason"] == "length"


def test_a_stream() -> None:
    done = answered(Echo(), HELLO | {"stream": True, "stream_options": {"include_usage": True}, "stop": "lo"})
    first, *pieces, last, usage, end = chunks(done)
    assert done.headers["content-type"].startswith("text/event-stream")
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [piece["choices"][0]["delta"] for piece in pieces] == [{"content": said} for said in ("h", "e", "l")]
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert (usage["choices"], usage["usage"]["completion_tokens"], end) == ([], 5, "DONE")
    assert len({chunk["id"] for chunk in (first, *pieces, last, usage)}) == 1


def test_a_stream_of_nothing_has_its_role_and_its_end() -> None:
    first, last, end = chunks(answered(Echo(), {"messages": [{"role": "user", "content": "\0"}], "stream": True}))
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert (last["choices"][0]["finish_reason"], end) == ("stop", "DONE")


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/v1/chat/completions", HELLO | {"model": "other"}, 404, "model_not_found", "model"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x" * 32}]},
            400,
            "context_length_exceeded",
            "messages",
        ),
        ("/v1/completions", {"prompt": "x" * 32, "stream": True}, 400, "context_length_exceeded", "prompt"),
        ("/v1/chat/completions", [], 400, "bad_request", None),
        ("/v1/completions", HELLO, 400, "bad_request", "prompt"),
    ],
)
def test_refusals(path: str, body: object, status: int, code: str, param: str | None) -> None:
    done = answered(Echo(), body, path)
    assert (done.status, done.error["code"], done.error["param"]) == (status, code, param)


def test_the_reply_ends_where_the_room_ends() -> None:
    done = answered(Echo(), {"prompt": "x" * 30, "max_tokens": 100}, "/v1/completions")
    assert json.loads(done.body)["usage"] == {"prompt_tokens": 30, "completion_tokens": 2, "total_tokens": 32}


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_word_is_a_status(stream: bool) -> None:
    done = answered(Echo(fails_after=0), HELLO | {"stream": stream})
    assert (done.status, done.error["code"]) == (500, "engine_error")
    assert "out of memory" in done.error["message"]


def test_a_failure_later_is_the_last_event() -> None:
    done = answered(Echo(fails_after=2), HELLO | {"stream": True})
    assert done.status == 200
    assert done.complete
    assert chunks(done)[-1]["error"]["message"] == "the model failed: out of memory"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(stream: bool) -> None:
    async def main() -> None:
        engine = Echo(endless=True)
        under_way = call(engine, HELLO | {"stream": stream})
        await until(lambda: engine.open and (under_way.sent or not stream))
        under_way.leave()
        await under_way.done()
        await until(lambda: not engine.open)

    asyncio.run(main())


def test_health_and_models() -> None:
    engine = Echo()
    health = answered(engine, {}, "/health", "GET")
    assert json.loads(health.body) == {"status": "ok", "model": "echo", "engine": "echo"}
    models = json.loads(answered(engine, {}, "/v1/models", "GET").body)
    assert [(model["id"], model["max_model_len"]) for model in models["data"]] == [("echo", 32)]
    engine.broken = "the thread has ended"
    assert answered(engine, {}, "/health", "GET").status == 503


# vLLM


def test_the_command_line_of_vllm() -> None:
    settings = ServeSettings(max_num_seqs=8, max_model_len=4096, gpu_memory_utilization=0.85, quantization="int8")
    assert chat_command("python3", "Qwen/Qwen3-8B", 8001, settings) == [
        *("python3", "-m", "vllm.entrypoints.openai.api_server", "--model", "Qwen/Qwen3-8B"),
        *("--host", "127.0.0.1", "--port", "8001", "--max-num-seqs", "8", "--max-model-len", "4096"),
        *("--gpu-memory-utilization", "0.85", "--tensor-parallel-size", "1"),
    ]
    assert "awq" in chat_command("python3", "m", 1, ServeSettings(quantization="awq"))
    assert "--enforce-eager" in chat_command("python3", "m", 1, ServeSettings(), on_cpu=True)


def compressed(bits: int) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int"}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(
    "quantization", [compressed(8), {"quant_method": "gptq", "bits": 8}, {"quant_method": "x", "load_in_8bit": True}]
)
def test_a_checkpoint_that_is_int8(quantization: dict[str, Any]) -> None:
    check_int8("m", {"quantization_config": quantization})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "is not quantised.*W8A8 or GPTQ-Int8.*--engine transformers"),
        ({"quantization_config": compressed(4)}, "by compressed-tensors, not to INT8"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "by awq, not to INT8"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "not to INT8"),
    ],
)
def test_a_checkpoint_that_is_not(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_int8("m", config)
