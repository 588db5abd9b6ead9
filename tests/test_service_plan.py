"""The documents' command lines and environments: what would run on a machine, under which limits, and what is said."""

import shlex
from collections.abc import Mapping
from typing import Any

import pytest

from loadstone.cli.main import build_app
from loadstone.cli.service import Service, ServicePlan, plan
from loadstone.core.errors import UsageError
from loadstone.core.limits import PerClient
from loadstone.core.settings import EmbedGateSettings, LimitSettings, ServeSettings, ServiceGateSettings
from loadstone.serve.commands import command, environment, in_force
from loadstone.serve.planning import Kind, Machine
from rerank_guide import ENVIRONMENT, FAST, PRODUCTION, SCARCE

CPU = Machine(cores=(0, 1))
GPU = Machine(cores=(0, 1, 2, 3), gpus=("0",), gpu_memory_bytes=24_000_000_000, vllm=True)
EIGHT = Machine(cores=tuple(range(16)), gpus=tuple("01234567"), gpu_memory_bytes=80_000_000_000, vllm=True)


def planned(typed: str, machine: Machine, variables: Mapping[str, str] | None = None) -> ServicePlan:
    """What ``loadstone serve TYPED`` would run with these variables set."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (variables or {}).items():
            patch.setenv(name, value)
        words = ["serve", *shlex.split(typed)]
        app = build_app(" ".join(words[:2]))
        _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    given: dict[str, Any] = dict(bound.arguments)
    kind = Kind(words[1])
    gate = EmbedGateSettings() if kind is Kind.EMBED else ServiceGateSettings()
    defaults = {"serve": ServeSettings(), "limits": LimitSettings(), "gate": gate}
    more = {Kind.RERANK: {"model_size": "0.6B"}, Kind.EMBED: {"cache_size": 10_000}}.get(kind, {})
    return plan(Service(**({"kind": kind} | defaults | more | given)), machine)


def lines(found: ServicePlan) -> list[str]:
    return [" ".join(command(found.wanted, share, 9999)[1:]) for share in found.placement.shares]


def flags(line: str) -> dict[str, str]:
    words = line.split()
    return {word: words[at + 1] for at, word in enumerate(words[:-1]) if word.startswith("--")}


# -- chat: three scenarios, by their environment


@pytest.mark.parametrize(
    ("variables", "concurrency"),
    [
        ({"MAX_CONCURRENT": "2", "WORKERS": "1", "THREADS": "2"}, 2),
        ({"MAX_CONCURRENT": "3", "WORKERS": "1", "THREADS": "4"}, 3),
        ({"MAX_CONCURRENT": "4", "WORKERS": "1", "THREADS": "4"}, 4),
    ],
)
def test_the_scenarios_of_the_chat_guide(variables: dict[str, str], concurrency: int) -> None:
    found = planned("chat", GPU, variables)
    limits = found.gate.limits_in_force()
    assert (limits.max_concurrency, limits.max_queue, limits.request_timeout_s) == (concurrency, 10, 120.0)
    assert (limits.max_output_tokens, limits.default_output_tokens) == (512, 100)
    assert limits.per_client == PerClient(requests_per_minute=10, requests_per_hour=100)
    assert found.wanted.engine == "vllm"
    assert found.wanted.model == "Qwen/Qwen3-8B"
    assert len(found.placement.shares) == 1
    threads = variables["THREADS"]
    assert found.notes == (
        f"--threads {threads} has no effect on vllm: the engine prepares requests itself; --workers adds replicas",
    )


def test_the_guard_watches_over_an_engine_that_is_not_ours() -> None:
    (line,) = lines(planned("chat --vllm-python venv/bin/python --max-num-seqs 16 --max-model-len 4096", GPU))
    ours, _, theirs = line.partition(" -- ")
    assert ours == "-m loadstone.serve.guard"
    assert theirs.startswith("venv/bin/python -m vllm.entrypoints.openai.api_server --model Qwen/Qwen3-8B")
    assert flags(theirs).items() >= {"--port": "9999", "--max-num-seqs": "16", "--max-model-len": "4096"}.items()


def test_llama_cpp_has_as_many_slots_as_the_gate_sends_it(tmp_path: Any) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    found = planned(f"chat --model {gguf} --workers 2 --max-concurrency 30", CPU)
    assert [flags(line)["--parallel"] for line in lines(found)] == ["15", "15"]
    assert [flags(line)["--cores"] for line in lines(found)] == ["0", "1"]
    assert in_force(found.wanted) == {"max_num_seqs": 15, "max_model_len": 4096}
    (line,) = lines(planned(f"chat --model {gguf} --max-num-seqs 2", CPU))
    assert flags(line)["--parallel"] == "2"


def test_transformers_on_cores() -> None:
    (line,) = lines(planned("chat --model ./m --threads 3 --quantization int8", CPU))
    assert line == "-m loadstone.serve.chat --port 9999 --model ./m --threads 3 --max-num-seqs 4 --quantization int8"


# -- rerank: three recommended configurations, and the environment block


@pytest.mark.parametrize(
    ("typed", "model", "seqs", "replicas"),
    [(PRODUCTION, "4B", 1024, 1), (SCARCE, "0.6B", 256, 1)],
)
def test_the_configurations_of_the_rerank_guide_on_one_gpu(typed: str, model: str, seqs: int, replicas: int) -> None:
    found = planned(f"rerank {typed}", GPU)
    assert len(found.placement.shares) == replicas
    asked = {word: value for word, value in flags(typed).items() if word not in ("--workers", "--model-size")}
    assert flags(lines(found)[0]).items() >= (asked | {"--engine": "vllm"}).items()
    assert found.wanted.model == f"Qwen/Qwen3-Reranker-{model}"
    limits = found.gate.limits_in_force()
    assert (limits.max_concurrency, limits.max_queue, limits.per_client) == (seqs, 4 * seqs, PerClient())
    crowded = "--workers 2 becomes 1: a replica takes 1 GPU of 1 GPU; 2 would ask for 1.8 × their memory"
    assert found.notes == ((crowded,) if typed is PRODUCTION else ())


def test_the_configuration_for_several_gpus() -> None:
    found = planned(f"rerank {FAST}", EIGHT)
    assert [share.gpus for share in found.placement.shares] == [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7")]
    assert [environment(share, {}) for share in found.placement.shares][3] == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert flags(lines(found)[0])["--tensor-parallel-size"] == "2"
    assert [note.partition(" is ")[0] for note in found.notes] == ["--gpu-memory-utilization 0.95"]
    with pytest.raises(UsageError, match="--tensor-parallel-size 2: this machine has 1 GPU; lower it"):
        planned(f"rerank {FAST}", GPU)


def test_the_environment_block_of_the_rerank_guide() -> None:
    by_environment = planned("rerank", GPU, ENVIRONMENT)
    by_flags = planned(f"rerank {PRODUCTION.replace('4B', '0.6B')}", GPU)
    assert by_environment == by_flags
    docker = {key: value for key, value in ENVIRONMENT.items() if key not in ("MAX_NUM_BATCHED_TOKENS",)}
    assert planned("rerank", GPU, docker).placement == by_flags.placement


@pytest.mark.parametrize("typed", [PRODUCTION, SCARCE, FAST])
def test_the_same_configurations_start_without_a_gpu(typed: str) -> None:
    found = planned(f"rerank {typed}", CPU)
    assert len(found.placement.shares) == int(flags(typed)["--workers"])
    for line in lines(found):
        assert flags(line)["--engine"] == "auto"
        assert "--gpu-memory-utilization" not in line
    assert any("--gpu-memory-utilization" in note and "no effect" in note for note in found.notes)


def test_a_size_that_there_is_not() -> None:
    with pytest.raises(UsageError, match=r"--model-size 3B: there are 0\.6B, 4B, 8B"):
        planned("rerank --model-size 3B", CPU)


# -- embed


def test_the_containers_of_the_embedding_guide() -> None:
    found = planned("embed", Machine(cores=(0, 1, 2, 3)), {"WORKERS": "4", "THREADS": "2"})
    assert [share.cores for share in found.placement.shares] == [(0,), (1,), (2,), (3,)]
    assert [environment(share, {})["OMP_NUM_THREADS"] for share in found.placement.shares] == ["1"] * 4
    assert flags(lines(found)[0])["--threads"] == "2"
    assert flags(lines(found)[0])["--model"] == "google/siglip2-so400m-patch16-naflex"
    limits = found.gate.limits_in_force()
    assert (limits.max_concurrency, limits.max_queue) == (1024, 4096)


def test_results_are_kept_in_redis_where_one_is_given() -> None:
    kept = planned("embed --redis redis://r:6379/1 --image-url-allow cdn.local --image-url-allow 10.0.0.0/8", CPU)
    line = lines(kept)[0]
    assert line.endswith(
        "--cache-size 10000 --redis redis://r:6379/1 --image-url-allow cdn.local --image-url-allow 10.0.0.0/8"
    )
    assert "--redis" not in lines(planned("embed --redis redis://r:6379/1 --cache-size 0", CPU))[0]


def test_variables_that_somebody_has_set_stay() -> None:
    share = planned("chat", CPU).placement.shares[0]
    assert environment(share, {}) == {
        "OMP_NUM_THREADS": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "0,1",
        "VLLM_CPU_KVCACHE_SPACE": "4",
    }
    assert environment(share, {"VLLM_CPU_KVCACHE_SPACE": "1"})["OMP_NUM_THREADS"] == "2"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(share, {"VLLM_CPU_KVCACHE_SPACE": "1"})
