"""The rerank service on real vLLM on the CPU: run by ``make test-vllm``, which makes its environment.

The file is not named ``test_…``, so that ``make test`` leaves it alone.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from loadstone.serve.child import running_child
from processes import fetch, until
from tiny_reranker import INSTRUCTION

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-vllm" / "bin" / "python"
MAKE = HERE.parent / "tiny_reranker.py"

QUERY = "what is the capital of China?"
DOCUMENTS = ["Paris is in France.", "The capital of China is Beijing.", "no", "A long one, " * 20, "北京 " * 7]
TASK = "Find the document that names a city"


@dataclass(frozen=True)
class Service:
    url: str
    folder: str
    official: dict[str, list[float]]
    """By instruction, what the model's authors' own computation gives for each document."""

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        answer = fetch(self.url, path, body)
        assert answer.status == 200, answer.body
        reply: dict[str, Any] = json.loads(answer.body)
        return reply


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("rerank")
    model = str(folder / "model")
    pairs = [[task, QUERY, document] for task in (INSTRUCTION, TASK) for document in DOCUMENTS]
    made = subprocess.run(
        [PYTHON, MAKE, model], input=json.dumps(pairs), stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    scores = json.loads(made.splitlines()[-1])
    official = {INSTRUCTION: scores[: len(DOCUMENTS)], TASK: scores[len(DOCUMENTS) :]}

    def command(port: int) -> list[str]:
        told = ["env", "VLLM_CPU_KVCACHE_SPACE=1", "HF_HUB_OFFLINE=1", "VLLM_CPU_OMP_THREADS_BIND=nobind"]
        replica = [sys.executable, "-m", "loadstone.serve.rerank", "--port", str(port), "--model", model]
        return [*told, *replica, "--engine", "vllm", "--vllm-python", str(PYTHON), "--max-num-seqs", "8"]

    with running_child("rerank", command, folder / "log", ready_timeout_s=300.0, stop_timeout_s=30.0) as url:
        yield Service(url, model, official)


@pytest.mark.parametrize("task", [INSTRUCTION, TASK])
def test_scores_are_those_of_the_authors(service: Service, task: str) -> None:
    named = {} if task == INSTRUCTION else {"instruction": task}
    reply = service.ask("/v1/rerank", query=QUERY, documents=DOCUMENTS, **named)
    scores = {result["index"]: result["relevance_score"] for result in reply["results"]}
    assert [scores[index] for index in range(len(DOCUMENTS))] == pytest.approx(service.official[task], abs=1e-4)
    assert len(set(scores.values())) == len(DOCUMENTS)


def test_vllm_asked_directly_has_the_same_prompt(service: Service) -> None:
    vllm = f"http://127.0.0.1:{_engine_port()}"
    for task, official in service.official.items():
        body = {"model": service.folder, "query": QUERY, "documents": DOCUMENTS, "instruction": task}
        results = json.loads(fetch(vllm, "/rerank", body).body)["results"]
        scores = {result["index"]: result["relevance_score"] for result in results}
        assert [scores[index] for index in range(len(DOCUMENTS))] == pytest.approx(official, abs=1e-4)


def test_a_long_document_is_cut_only_when_asked(service: Service) -> None:
    body = {"query": QUERY, "documents": [DOCUMENTS[0], "word " * 2000]}
    refused = fetch(service.url, "/rerank", body)
    assert refused.status == 400
    assert json.loads(refused.body)["error"]["param"] == "documents[1]"
    reply = service.ask("/rerank", **body, truncate=True)
    assert {result["index"]: result.get("truncated", False) for result in reply["results"]} == {0: False, 1: True}


def test_health_tells_what_is_in_force(service: Service) -> None:
    health = json.loads(fetch(service.url, "/health").body)
    told = {key: health[key] for key in ("status", "engine", "max_num_seqs", "tensor_parallel_size", "max_workers")}
    assert told == {
        "status": "ok",
        "engine": "vllm",
        "max_num_seqs": 8,
        "tensor_parallel_size": 1,
        "max_workers": 2,
    }


def test_the_replica_ends_with_its_engine(service: Service) -> None:
    """Last: it ends the service."""
    replica = next(
        child for child in psutil.Process(os.getpid()).children() if "loadstone.serve.rerank" in _line(child)
    )
    for process in replica.children(recursive=True):
        if "vllm.entrypoints" in _line(process) and "guard" not in _line(process):
            process.kill()
    until(lambda: not replica.is_running() or replica.status() == psutil.STATUS_ZOMBIE)


def _engine_port() -> int:
    """Where the vLLM of the service listens."""
    ours = psutil.Process(os.getpid()).children(recursive=True)
    line = next(child.cmdline() for child in ours if "vllm.entrypoints" in _line(child))
    return int(line[line.index("--port") + 1])


def _line(process: psutil.Process) -> str:
    return " ".join(process.cmdline())
