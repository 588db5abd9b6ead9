"""Transformers' continuous batching behind the conformance suite of the chat engines, on a tiny random Qwen3."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import processes
from check_engine import (
    CHAT,
    CHECKS,
    COMPLETIONS,
    TOKENS,
    Engine,
    ask,
    check_a_stream_says_what_a_document_says,
    refused,
    stream,
    text_of,
)
from gates import until
from loadstone.core.errors import UsageError
from loadstone.serve.chat_asks import Sampling
from loadstone.serve.child import free_port, running_child
from loadstone.serve.engines.transformers_chat import Room, load_engine
from processes import fetch

SLOTS, CONTEXT_TOKENS = 3, 4096
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n", "é", "你"]
START, END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'pirate' %}{{ raise_exception('no pirates') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{% if shout %}LOUD{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token for each character; the tokens that end a reply are never likely."""
    folder = tmp_path_factory.mktemp("qwen3")
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(CHARACTERS)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, chat_template=CHAT_TEMPLATE)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    end = len(CHARACTERS) + 1
    config = Qwen3Config(
        vocab_size=end + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.3,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = end
    model.save_pretrained(folder)
    return folder


def command(checkpoint: Path, port: int, *more: str) -> list[str]:
    told = ["--model", str(checkpoint), "--served-model-name", "tiny", "--max-num-seqs", str(SLOTS)]
    offline = ["env", "HF_HUB_OFFLINE=1", "OMP_NUM_THREADS=1", sys.executable, "-m", "loadstone.serve.chat"]
    return [*offline, "--port", str(port), *told, "--max-num-batched-tokens", "256", *more]


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    log = tmp_path_factory.mktemp("log") / "log"
    with running_child("transformers", lambda port: command(checkpoint, port), log, ready_timeout_s=120) as base_url:
        yield Engine(
            *(base_url, "tiny", SLOTS, CONTEXT_TOKENS),
            running=lambda: _figure(base_url, "requests"),
            generated=lambda: _figure(base_url, "generated_tokens"),
        )
    assert "Traceback" not in log.read_text()


def _figure(base_url: str, name: str) -> float:
    return float(fetch(base_url, "/health").document[name])


def _answers(base_url: str) -> bool:
    try:
        return fetch(base_url, "/health").status == 200
    except ConnectionError:
        return False


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check: Callable[[Engine], None], engine: Engine) -> None:
    check(engine)


def test_a_stream_is_what_transformers_generates(engine: Engine, checkpoint: Path) -> None:
    """Greedy, token for token; and neither what is asked beside it nor its own sampling changes that."""
    model, tokenizer = Qwen3ForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    asks = {"hello": 0.0, "what is a lodestone?": 0.0, "x": 1.0, "yes": 2.0}
    with ThreadPoolExecutor(len(asks)) as pool:
        told = pool.map(lambda ask: stream(engine, COMPLETIONS, prompt=ask[0], temperature=ask[1]), asks.items())
        said = dict(zip(asks, told, strict=True))
    for prompt in [prompt for prompt, temperature in asks.items() if temperature == 0.0]:
        given = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**given, max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
        assert said[prompt].text == tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


def test_each_request_is_drawn_as_it_asks(engine: Engine) -> None:
    draws = {stream(engine, temperature=1.5).text for _ in range(6)}
    assert len(draws) > 1
    # The likeliest token alone makes up a nucleus this small.
    assert stream(engine, temperature=1.5, top_p=1e-6).text == stream(engine).text


def test_a_reply_ends_with_its_end_token(engine: Engine) -> None:
    """At a high temperature one of some hundred tokens is soon drawn."""
    document = ask(engine, temperature=2, max_tokens=4000, ignore_eos=False)
    assert document["choices"][0]["finish_reason"] == "stop"
    # A token is a character: all but the end token are seen (and the token that opens a turn is not).
    assert document["usage"]["completion_tokens"] > len(text_of(document))


def test_the_chat_template_has_a_say(engine: Engine) -> None:
    assert refused(engine, 400, messages=[{"role": "pirate", "content": "arr"}])["param"] == "messages"
    longer = ask(engine, chat_template_kwargs={"shout": True})["usage"]["prompt_tokens"]
    assert longer == ask(engine)["usage"]["prompt_tokens"] + len("LOUD")
    assert refused(engine, 400, COMPLETIONS, prompt=[5, 10_000])["param"] == "prompt"


def test_int8_halves_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    def int8(port: int) -> list[str]:
        return command(checkpoint, port, "--quantization", "int8")

    with running_child("transformers", int8, tmp_path / "log", ready_timeout_s=120) as base_url:
        health = fetch(base_url, "/health").document
        assert (health["quantization"], health["engine"], health["max_num_seqs"]) == ("torchao", "transformers", SLOTS)
        engine = Engine(base_url, "tiny", SLOTS, CONTEXT_TOKENS, running=lambda: 0.0, generated=lambda: 0.0)
        check_a_stream_says_what_a_document_says(engine)


def test_leaving_frees_the_place_and_the_cache_inside_the_manager(checkpoint: Path) -> None:
    engine = load_engine(str(checkpoint), Room(max_num_seqs=2, max_model_len=512), int8=False)
    scheduler = engine._manager.batch_processor.scheduler
    pool = scheduler.cache.pool

    async def first_piece(generation: AsyncIterator[str], begun: asyncio.Event) -> str:
        begun.set()
        return await anext(generation)

    async def main() -> None:
        await engine.start()
        try:
            for _ in range(3):
                generations = [engine.generate([1, 2, 3], 500, Sampling(), True) for _ in range(4)]
                assert await anext(generations[0])
                begun = asyncio.Event()
                started = asyncio.create_task(first_piece(generations[3], begun))
                await begun.wait()
                started.cancel()
                await asyncio.gather(started, return_exceptions=True)
                for generation in generations:
                    await generation.aclose()
                await until(lambda: not scheduler.has_pending_requests())
            assert engine.health()["requests"] == 0
        finally:
            await engine.stop()
        assert engine.failure() is not None

    asyncio.run(main())
    pool.try_to_free_sectors()
    assert pool.num_free_sectors == scheduler.cache.num_sectors


@pytest.mark.parametrize(
    ("room", "says"),
    [
        (Room(max_model_len=100_000), "--max-model-len 100000: this model was made for 4096 tokens"),
        (Room(max_num_seqs=10_000_000), "do not fit into the memory; lower --max-num-seqs or --max-model-len"),
    ],
)
def test_what_does_not_fit_is_said_with_the_remedy(room: Room, says: str, checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=says):
        load_engine(str(checkpoint), room, int8=False)


def test_a_model_that_is_not_there_is_said_in_one_line(checkpoint: Path) -> None:
    words = command(checkpoint, 1, "--model", "/no/such")
    # Its input is held open: at its end a replica takes its parent for gone.
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait() == 1
    assert "loadstone: --model /no/such cannot be loaded" in said.splitlines()[-1]


def test_a_generation_thread_that_dies_takes_the_process_with_it(checkpoint: Path, tmp_path: Path) -> None:
    """Its supervisor starts another: a replica that answers nothing any more must not look alive."""
    program = f"""
import sys
from loadstone.serve.chat import ChatService, run
from loadstone.serve.engines.transformers_chat import Room, load_engine
from loadstone.serve.parent import ParentWatch
engine = load_engine({str(checkpoint)!r}, Room(), int8=False)
def fail(*args): raise RuntimeError("CUDA out of memory")
engine._manager.batch_processor._generation_step = fail
run(ChatService(engine, "tiny", 1).app(), int(sys.argv[1]), ParentWatch())
"""
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-c", program, str(port)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        url = f"http://127.0.0.1:{port}"
        processes.until(lambda: _answers(url), patience_s=120.0)
        answer = fetch(url, CHAT, {"messages": [{"role": "user", "content": "hi"}]})
        assert (answer.status, "CUDA out of memory" in answer.document["error"]["message"]) == (500, True)
        assert process.wait(60) != 0
        assert process.stderr is not None
        log = process.stderr.read()
    assert "the thread that generates has ended" in log
