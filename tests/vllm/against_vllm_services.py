"""``serve chat`` and ``serve rerank`` on real vLLM on the CPU, as a user has them: run by ``make test-vllm``.

The file is not named ``test_…``, so that ``make test`` leaves it alone.
"""

import json
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pids import all_gone
from processes import CHAT, NO_QUOTAS, Answer, Running, chat, engine_figure, fetch, open_reply, running, until
from tiny_reranker import INSTRUCTION

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-vllm" / "bin" / "python"
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
PATIENCE_S = 300.0
"""vLLM takes half a minute to start, where the machine has nothing else to do."""
QUERY = "what is the capital of China?"
DOCUMENTS = ["Paris is in France.", "The capital of China is Beijing.", "no", "A long one, " * 20]


def serving(kind: str, model: str, *words: object) -> Any:
    engine = ("--engine", "vllm", "--vllm-python", PYTHON)
    return running("serve", kind, "--model", model, "--port", 0, *engine, *words, patience_s=PATIENCE_S, **ENVIRONMENT)


def posted(service: Running, path: str, body: dict[str, Any]) -> Answer:
    """With patience: vLLM on the CPU of a busy machine is slow."""
    return fetch(service.url, path, body, patience_s=PATIENCE_S)


def most_until_done(replies: Sequence[Future[Answer]], count: Callable[[], float]) -> float:
    """The largest that ``count`` gives while the replies come."""
    seen: list[float] = []

    def done() -> bool:
        seen.append(count())
        return all(reply.done() for reply in replies)

    until(done, PATIENCE_S)
    return max(seen)


def engine_of(service: Running) -> dict[str, Any]:
    """What the supervisor says of the only one."""
    (engine,) = fetch(service.url, "/health").document["engines"]
    found: dict[str, Any] = engine
    return found


def below(pid: int) -> list[psutil.Process]:
    """All processes under ``pid``."""
    return psutil.Process(pid).children(recursive=True)


def check_nothing_is_left(service: Running) -> None:
    """Kill the service at once, which then can tidy nothing up."""
    pids = [process.pid for process in below(service.process.pid)]
    assert len(pids) >= 3  # the guard, vLLM's server, vLLM's engine
    service.kill()
    service.process.wait()
    assert all_gone(pids)


# -- chat


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    """(service, model)."""
    folder = tmp_path_factory.mktemp("chat")
    model = str(folder / "model")
    subprocess.run([PYTHON, HERE / "make_model.py", model], check=True)
    limits = ("--max-concurrency", 2, "--max-queue", 8, "--max-output-tokens", 0, *NO_QUOTAS)
    with serving("chat", model, "--max-num-seqs", 4, "--max-model-len", 2048, *limits) as service:
        yield service, model


def ask(model: str, tokens: int, **more: Any) -> dict[str, Any]:
    return chat(tokens, model=model, ignore_eos=True, **more)


def test_chat_is_answered_whole_and_streamed(chatting: tuple[Running, str]) -> None:
    service, model = chatting
    health = fetch(service.url, "/health").document
    assert (health["engine"], health["max_num_seqs"], health["capacity"]) == ("vllm", 4, 2)
    assert [one["id"] for one in fetch(service.url, "/v1/models").document["data"]] == [model]
    assert posted(service, CHAT, ask(model, 16)).document["usage"]["completion_tokens"] == 16
    events = posted(service, CHAT, ask(model, 16, stream=True)).body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert service.outcomes() == {"ok": 3}


def test_no_more_than_the_limit_are_in_vllm_and_one_that_leaves_frees_it(chatting: tuple[Running, str]) -> None:
    service, model = chatting
    vllm = engine_of(service)["url"]

    def inside() -> float:
        return engine_figure(vllm, "vllm:num_requests_running", "vllm:num_requests_waiting")

    with open_reply(service.url, CHAT, ask(model, 1900, stream=True)) as leaving:
        assert leaving.readline().startswith(b"data: ")
        until(lambda: inside() == 1)
    until(lambda: inside() == 0)
    with ThreadPoolExecutor(8) as clients:
        replies = [clients.submit(posted, service, CHAT, ask(model, 60)) for _ in range(8)]
        assert most_until_done(replies, inside) == 2
    assert [reply.result().status for reply in replies] == [200] * 8


def test_an_engine_that_is_killed_is_started_again_with_one_clear_line(chatting: tuple[Running, str]) -> None:
    service, model = chatting
    before = engine_of(service)
    (core,) = [process for process in below(before["pid"]) if "EngineCore" in process.name()]
    core.send_signal(signal.SIGKILL)
    until(lambda: engine_of(service)["state"] != "up")
    assert posted(service, CHAT, ask(model, 4)).status in (502, 503)
    until(lambda: engine_of(service)["state"] == "up", PATIENCE_S)
    after = engine_of(service)
    assert (after["restarts"], after["url"]) == (1, before["url"])
    assert after["pid"] != before["pid"]
    assert "an inner process of the engine died" in after["last_error"]
    assert "--max-concurrency" in after["last_error"]
    assert "\n" not in after["last_error"]
    until(lambda: posted(service, CHAT, ask(model, 4)).status == 200)


def test_chat_leaves_nothing_behind(chatting: tuple[Running, str]) -> None:
    """Last of these: it ends the service."""
    check_nothing_is_left(chatting[0])


# -- rerank


@dataclass(frozen=True)
class Reranking:
    service: Running
    official: list[float]


@pytest.fixture(scope="module")
def reranking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reranking]:
    folder = tmp_path_factory.mktemp("rerank")
    model = str(folder / "model")
    pairs = json.dumps([[INSTRUCTION, QUERY, document] for document in DOCUMENTS])
    make = [PYTHON, HERE.parent / "tiny_reranker.py", model]
    made = subprocess.run(make, input=pairs, stdout=subprocess.PIPE, text=True, check=True).stdout
    official = json.loads(made.splitlines()[-1])
    limits = ("--max-concurrency", 1, "--max-queue", 2)
    with serving("rerank", model, "--max-num-seqs", 8, "--max-workers", 4, *limits) as service:
        yield Reranking(service, official)


def test_rerank_is_answered_with_the_authors_scores(reranking: Reranking) -> None:
    service = reranking.service
    health = fetch(service.url, "/health").document
    told = [health[key] for key in ("engine", "max_num_seqs", "tensor_parallel_size", "max_workers", "capacity")]
    assert told == ["vllm", 8, 1, 4, 1]
    answer = posted(service, "/v1/rerank", {"query": QUERY, "documents": DOCUMENTS})
    scores = {result["index"]: result["relevance_score"] for result in answer.document["results"]}
    assert [scores[index] for index in range(len(DOCUMENTS))] == pytest.approx(reranking.official, abs=1e-4)


def test_rerank_holds_its_limits(reranking: Reranking) -> None:
    service = reranking.service
    body = {"query": QUERY, "documents": [f"{document} {at}" for document in DOCUMENTS for at in range(20)]}
    with ThreadPoolExecutor(8) as clients:
        replies = [clients.submit(posted, service, "/rerank", body) for _ in range(8)]
        assert most_until_done(replies, lambda: service.stats()["in_flight"]) == 1
    statuses = [reply.result().status for reply in replies]
    assert set(statuses) == {200, 503}
    assert service.outcomes()["queue_full"] == statuses.count(503)


def test_rerank_leaves_nothing_behind(reranking: Reranking) -> None:
    """Last of these: it ends the service."""
    check_nothing_is_left(reranking.service)
