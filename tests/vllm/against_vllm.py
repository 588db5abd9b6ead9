"""``bench``, ``find`` and ``gate`` with real vLLM on the CPU: run by ``make test-vllm``, which makes its environment.

The file is not named ``test_…``, so that ``make test`` leaves it alone.
"""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadstone.core.verdict import LevelKind, RunVerdict, Verdict
from loadstone.serve.child import running_child
from loadstone.serve.cores import available_cores, pinned_to, split_cores
from processes import CHAT, NO_QUOTAS, chat, engine_figure, fetch, gate_before, open_reply, until

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-vllm" / "bin" / "python"
LOADSTONE = Path(sys.executable).parent / "loadstone"

MODEL = "tiny"
PROMPTS, CONCURRENCY, INPUT_TOKENS, OUTPUT_TOKENS = 40, 4, 64, 16
GENERATOR_CORES, ENGINE_CORES = split_cores(available_cores())

# vLLM does not read its standard input, which is how a child of Loadstone's is told to stop: a reader in the
# background does, and ends the shell's process, which by then is vLLM.
STOP_AT_END_OF_INPUT = 'exec 3<&0; (cat <&3 >/dev/null; kill $$) & exec "$@"'

ENDPOINTS = {"chat": ("openai-chat", "/v1/chat/completions"), "completions": ("openai", "/v1/completions")}


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("vllm")
    subprocess.run([PYTHON, HERE / "make_model.py", folder / "model"], check=True)

    def command(port: int) -> list[str]:
        server = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
        options = ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
        sizes = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4", "--max-model-len", "1024"]
        told = ["env", "VLLM_CPU_KVCACHE_SPACE=1", "HF_HUB_OFFLINE=1", "VLLM_CPU_OMP_THREADS_BIND=nobind"]
        return ["sh", "-c", STOP_AT_END_OF_INPUT, "sh", *told, *server, *options, *sizes]

    # Pinned before it starts: the engine inherits its cores.
    with (
        pinned_to(ENGINE_CORES),
        running_child("vLLM", command, folder / "vllm.log", ready_timeout_s=300.0, stop_timeout_s=30.0) as base_url,
        pinned_to(GENERATOR_CORES),
    ):
        yield base_url


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_bench_counts_what_vllm_counts(endpoint: str, base_url: str, tmp_path: Path) -> None:
    backend, path = ENDPOINTS[endpoint]
    printed = _loadstone(
        *("bench", "--backend", backend, "--base-url", base_url, "--endpoint", path, "--model", MODEL),
        *("--dataset-name", "random", "--num-prompts", PROMPTS, "--max-concurrency", CONCURRENCY),
        *("--random-input-len", INPUT_TOKENS, "--random-output-len", OUTPUT_TOKENS),
        *("--save-result", "--save-detailed", "--result-filename", tmp_path / "result.json"),
    )
    assert f"{'Successful requests:':<40} {PROMPTS:<10}" in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"], result["num_prompts"]) == (PROMPTS, 0, PROMPTS)
    assert result["output_lens"] == [OUTPUT_TOKENS] * PROMPTS
    assert result["input_lens"] == [INPUT_TOKENS] * PROMPTS
    assert result["total_input_tokens"] == INPUT_TOKENS * PROMPTS
    assert result["max_concurrent_requests"] == CONCURRENCY
    assert result["mean_ttft_ms"] > 0


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_find_leaves_a_verdict_limits_and_every_level(endpoint: str, base_url: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    printed = _loadstone(
        *("find", "--base-url", base_url, "--endpoint", endpoint, "--out", run, "--json", "--levels", "1,2,4,8"),
        *("--random-input-len", INPUT_TOKENS, "--random-output-len", OUTPUT_TOKENS, "--max-level-seconds", 6),
    )
    verdict = msgspec.json.decode((run / "verdict.json").read_bytes(), type=RunVerdict)
    assert json.loads(printed.splitlines()[-1])["measured_max_concurrency"] == verdict.measured_max_concurrency
    assert verdict.measured_max_concurrency is not None

    limits = tomllib.loads((run / "limits.toml").read_text())
    assert limits["schema"] == 1
    assert limits["limits"]["max_concurrency"] == verdict.recommended_concurrency
    assert limits["evidence"]["model"] == MODEL
    assert limits["evidence"]["measured_max_concurrency"] == verdict.measured_max_concurrency

    assert [level.concurrency for level in verdict.levels if level.kind is LevelKind.LADDER][:2] == [1, 2]
    first = verdict.levels[0]
    assert (first.verdict, first.success_rate, first.no_content) == (Verdict.PASS, 1.0, 0)
    # The engine renews its figures once a second, and the first level lasts two.
    assert max(level.server["running"] for level in verdict.levels) >= 1.0
    results = [_json(path) for path in sorted(run.glob("levels/*/result.json"))]
    assert len(results) == len(verdict.levels)
    assert results[0]["total_input_tokens"] == results[0]["completed"] * INPUT_TOKENS
    assert results[0]["total_output_tokens"] == results[0]["completed"] * OUTPUT_TOKENS


def test_the_gate_holds_it_to_two_at_once_and_a_client_that_leaves_frees_it(base_url: str) -> None:
    def body(tokens: int) -> dict[str, Any]:
        options = {"include_usage": True}
        return chat(tokens, model=MODEL, ignore_eos=True, stream=True, stream_options=options)

    def in_engine() -> float:
        return engine_figure(base_url, "vllm:num_requests_running", "vllm:num_requests_waiting")

    limits = ("--max-concurrency", 2, "--max-queue", 8, "--max-output-tokens", 0)
    with gate_before(base_url, options=(*NO_QUOTAS, *limits)) as gate, ThreadPoolExecutor(8) as clients:
        with open_reply(gate.url, CHAT, body(900)) as leaving:
            assert leaving.readline().startswith(b"data: ")
            until(lambda: in_engine() == 1)
            assert gate.stats()["in_flight"] == 1
        until(lambda: gate.outcomes() == {"client_gone": 1})
        until(lambda: in_engine() == 0)

        replies = [clients.submit(fetch, gate.url, CHAT, body(OUTPUT_TOKENS)) for _ in range(8)]
        most = 0.0
        while not all(reply.done() for reply in replies):
            most = max(most, in_engine())
        assert most == 2
        for reply in replies:
            events = reply.result().body.decode().split("\n\n")
            assert events[-2:] == ["data: [DONE]", ""]
            usage = json.loads(events[-3].removeprefix("data: "))["usage"]
            assert usage["completion_tokens"] == OUTPUT_TOKENS
        assert gate.outcomes() == {"client_gone": 1, "ok": 8}
        assert gate.stats()["upstreams"][0]["output_tokens"] >= 8 * OUTPUT_TOKENS


def _loadstone(*words: object) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(LOADSTONE), *map(str, words)], stdout=subprocess.PIPE, text=True, check=False, env=_environment()
    )
    assert done.returncode == 0, f"exit status {done.returncode}"
    return done.stdout


def _environment() -> dict[str, str]:
    """Without settings of the caller's that would change what is measured."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LOADSTONE_")}


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content
