"""``loadstone serve chat`` as a user has it: llama.cpp for real, behind the gate, in one command."""

import os
import signal
import socket
from pathlib import Path

import pytest

from loadstone.serve.engines.tiny_gguf import TinyShape, cached_model
from pids import all_gone
from processes import CHAT, NO_QUOTAS, chat, fetch, loadstone, running, until


@pytest.fixture(scope="module")
def model() -> str:
    """A tiny model with random weights."""
    return str(cached_model(TinyShape()))


def serving(model: str, *words: object, **environment: str):  # type: ignore[no-untyped-def]
    return running("serve", "chat", "--model", model, "--port", 0, *words, **environment)


def test_one_command_one_port_limits_on(model: str, tmp_path: Path) -> None:
    with serving(model, "--log-dir", tmp_path / "logs", THREADS="4", MAX_CONCURRENT="2") as service:
        answers = [fetch(service.url, CHAT, chat(model=model)) for _ in range(11)]
        assert [answer.status for answer in answers] == [200] * 10 + [429]
        health = fetch(service.url, "/health").document
        shown = {key: health[key] for key in ("service", "engine", "model", "workers", "max_num_seqs", "max_model_len")}
        assert shown == {
            "service": "chat",
            "engine": "llamacpp",
            "model": model,
            "workers": 1,
            "max_num_seqs": 8,
            "max_model_len": 4096,
        }
        assert (health["capacity"], health["limits"]["max_queue"]) == (2, 10)
        assert [engine["state"] for engine in health["engines"]] == ["up"]
        assert (tmp_path / "logs" / "chat-1.log").is_file()
        assert [one["id"] for one in fetch(service.url, "/v1/models").document["data"]] == [model]
        assert service.outcomes() == {"ok": 11, "rate_limited": 1}  # the list of models costs no quota


def test_replicas_share_one_limit_and_a_crash_is_made_good(model: str) -> None:
    with serving(model, "--workers", 2, "--max-concurrency", 3, *NO_QUOTAS) as service:

        def engines() -> list[dict[str, object]]:
            document = fetch(service.url, "/health").document
            assert sum(upstream["configured_limit"] for upstream in document["upstreams"]) == 3
            found: list[dict[str, object]] = document["engines"]
            return found

        until(lambda: all(engine["state"] == "up" for engine in engines()))
        until(lambda: all(one["up"] for one in fetch(service.url, "/health").document["upstreams"]))
        crashed = engines()[0]
        os.kill(int(str(crashed["pid"])), signal.SIGKILL)
        statuses = [fetch(service.url, CHAT, chat(model=model)).status for _ in range(8)]
        assert statuses == [200] * 8
        until(lambda: engines()[0]["restarts"] == 1 and engines()[0]["state"] == "up")
        assert "ended" in str(engines()[0]["last_error"]) or "killed" in str(engines()[0]["last_error"])
        assert engines()[0]["url"] == crashed["url"]


def test_engines_go_with_their_parent_even_by_kill_9(model: str) -> None:
    with serving(model, "--workers", 2) as service:
        pids = [engine["pid"] for engine in fetch(service.url, "/health").document["engines"]]
        service.kill()
    assert len(pids) == 2
    assert all_gone(pids)


def test_a_port_that_is_taken_is_found_out_before_the_model_is_loaded(model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = loadstone("serve", "chat", "--model", model, "--port", port)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "starting" not in done.stderr


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--model", "./nothing.gguf"], 2, "--model ./nothing.gguf: no such file or folder"),
        (["--model", "README.md", "--engine", "llamacpp"], 3, "before it was ready"),
        (["--vllm-python", "/nowhere/python"], 2, "--vllm-python /nowhere/python is no interpreter"),
    ],
)
def test_what_cannot_be_served_is_one_line(words: list[str], status: int, says: str) -> None:
    done = loadstone("serve", "chat", "--port", 0, *words)
    assert done.returncode == status
    assert says in done.stderr.splitlines()[-1]


def test_show_starts_nothing(model: str) -> None:
    done = loadstone("serve", "chat", "--model", model, "--workers", 2, "--show")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(f"-m loadstone.serve.engines.llamacpp --model {model} --port" in line for line in lines)
