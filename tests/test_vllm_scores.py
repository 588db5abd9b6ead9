"""Scores from a pretended vLLM: what is sent to it, and what becomes of its failures."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable

import pytest

from loadstone.core.engine import EngineError
from loadstone.core.errors import UnreachableError
from loadstone.core.refusals import BadAskError
from loadstone.serve.child import free_port
from loadstone.serve.engines.qwen_prompt import QwenPrompt
from loadstone.serve.engines.vllm_scores import VllmScores, running_vllm
from loadstone.serve.pairs import Pair
from servers import Asked, Behaviour, Peer, closes_at_once, serving
from tiny_reranker import tokenizer

PAIRS = [Pair("q", document, "query", f"documents[{at}]") for at, document in enumerate(("a", "bb", "cc"))]


def with_vllm(behave: Behaviour, test: Callable[[VllmScores], Awaitable[None]]) -> list[Asked]:
    """Run ``test`` on a vLLM that does ``behave``; gives what it was asked."""

    async def main(url: str) -> None:
        scores = VllmScores(url, "model", QwenPrompt(tokenizer(), 500), threads=1)
        await scores.start()
        try:
            await test(scores)
        finally:
            await scores.stop()

    with serving(behave) as server:
        asyncio.run(main(server.url))
        return server.asked


async def lengths(asked: Asked, peer: Peer) -> None:
    data = [{"index": at, "probs": [len(ids) / 1000], "num_classes": 1} for at, ids in enumerate(asked.body["input"])]
    await peer.reply(200, json.dumps({"object": "list", "data": data}).encode())


def test_one_request_carries_all_the_tokens() -> None:
    async def test(scores: VllmScores) -> None:
        done = await scores.submit(PAIRS)
        assert [each.result.value * 1000 for each in done] == [each.result.tokens for each in done]
        assert all(each.tokenise_s > 0 and each.inference_s > 0 for each in done)
        assert scores.figures() == {"running": 0, "items": 3}

    (asked,) = with_vllm(lengths, test)
    prompt = QwenPrompt(tokenizer(), 500)
    assert (asked.path, asked.body["model"]) == ("/classify", "model")
    assert asked.body["input"] == [prompt.tokenise(pair).ids for pair in PAIRS]


def test_what_is_too_long_never_gets_there() -> None:
    async def test(scores: VllmScores) -> None:
        with pytest.raises(BadAskError, match=r"documents\[9\]"):
            await scores.submit([*PAIRS, Pair("q", "x" * 600, "query", "documents[9]")])

    assert with_vllm(lengths, test) == []


def answers(status: int, body: bytes) -> Behaviour:
    async def behave(asked: Asked, peer: Peer) -> None:
        await peer.reply(status, body)

    return behave


@pytest.mark.parametrize(
    ("behave", "says"),
    [
        (answers(500, b'{"error": "EngineDeadError"}'), "vLLM answered 500: .*EngineDeadError"),
        (answers(200, b'{"data": [{"probs": [NaN]}, {"probs": [0.1]}, {"probs": [0.1]}]}'), "cannot be read"),
        (
            answers(200, b'{"data": [{"probs": [1e999]}, {"probs": [0.1]}, {"probs": [0.1]}]}'),
            "cannot be read|to rank by",
        ),
        (answers(200, b'{"data": [{"probs": [0.1]}]}'), "1 scores for 3"),
        (answers(200, b"[]"), "cannot be read"),
        (closes_at_once, "vLLM gave no answer"),
    ],
)
def test_a_failure_of_vllm(behave: Behaviour, says: str) -> None:
    async def test(scores: VllmScores) -> None:
        with pytest.raises(EngineError, match=says):
            await scores.submit(PAIRS)
        assert scores.figures() == {"running": 0, "items": 0}

    with_vllm(behave, test)


def test_a_client_that_leaves_hangs_up_on_vllm() -> None:
    there = threading.Event()

    async def test(scores: VllmScores) -> None:
        task = asyncio.ensure_future(scores.submit(PAIRS))
        await asyncio.to_thread(there.wait)
        assert scores.figures()["running"] == 3
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert scores.figures()["running"] == 0

    async def never(asked: Asked, peer: Peer) -> None:
        there.set()
        await asyncio.Event().wait()

    with_vllm(never, test)


def test_a_vllm_that_cannot_start_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    command = ["sh", "-c", "echo 'torch.OutOfMemoryError: CUDA out of memory'; exit 3"]
    with (
        pytest.raises(UnreachableError, match="vLLM ended with status 3 before it was ready"),
        running_vllm(command, free_port(), ready_timeout_s=30.0),
    ):
        pass
    assert "CUDA out of memory" in capfd.readouterr().out


def test_a_vllm_that_does_not_get_ready_is_ended() -> None:
    with (
        pytest.raises(UnreachableError, match="not ready after 0 s"),
        running_vllm(["sleep", "60"], free_port(), ready_timeout_s=0.0),
    ):
        pass
