"""llama.cpp as a child process, for real: it starts, talks, tells its figures, and never outlives its parent."""

import http.client
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from loadstone.core.errors import UnreachableError, UsageError
from loadstone.serve.child import running_child
from loadstone.serve.cores import available_cores, pinned_to, split_cores
from loadstone.serve.engines.llamacpp import MODEL_NAME, running_engine
from loadstone.serve.engines.tiny_gguf import TinyShape, cached_model

_OUTPUT_TOKENS = 12


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_model(TinyShape(), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def base_url(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log_path = tmp_path_factory.mktemp("engine") / "engine.log"
    with running_engine(
        model_path, parallel=2, context_tokens=256, cores=available_cores(), log_path=log_path
    ) as base_url:
        yield base_url


def test_a_streamed_reply_has_content_and_the_exact_length(base_url: str) -> None:
    events = _stream(base_url, "hello there")
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    assert len(text) == _OUTPUT_TOKENS
    assert text.isascii()
    assert events[-1]["usage"]["completion_tokens"] == _OUTPUT_TOKENS
    assert events[-1]["model"] == MODEL_NAME


def test_a_prompt_that_was_seen_before_is_computed_again(base_url: str) -> None:
    for _ in range(2):
        usage = _stream(base_url, "the same prompt twice")[-1]["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_its_figures_are_on(base_url: str) -> None:
    text = _get(base_url, "/metrics")
    assert "llamacpp:requests_processing" in text
    assert "llamacpp:requests_deferred" in text


def test_the_engine_is_gone_after_the_block(model_path: Path, tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    with running_engine(
        model_path, parallel=1, context_tokens=256, cores=available_cores(), log_path=tmp_path / "engine.log"
    ):
        (engine,) = set(psutil.Process().children()) - before
        assert engine.is_running()
    assert not engine.is_running()


def test_the_engine_dies_when_its_parent_is_killed(model_path: Path, tmp_path: Path) -> None:
    program = f"""
import pathlib, psutil, signal
from loadstone.serve.cores import available_cores
from loadstone.serve.engines.llamacpp import running_engine
with running_engine(pathlib.Path({str(model_path)!r}), parallel=1, context_tokens=256, cores=available_cores(),
                    log_path=pathlib.Path({str(tmp_path / "engine.log")!r})):
    print(psutil.Process().children()[0].pid, flush=True)
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        engine = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.send_signal(signal.SIGKILL)
            gone, _, _ = select.select([engine], [], [], 20.0)
            assert gone, "the engine outlived its parent"
        finally:
            os.close(engine)


def test_a_file_that_is_no_model_is_told_with_the_end_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"not a model")
    with (
        pytest.raises(UnreachableError, match=r"llama\.cpp ended with status 1 .*end of its log .*Failed to init"),
        running_engine(
            tmp_path / "no.gguf",
            parallel=1,
            context_tokens=256,
            cores=available_cores(),
            log_path=tmp_path / "engine.log",
        ),
    ):
        pass


def test_an_engine_that_does_not_get_ready_is_stopped(tmp_path: Path) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('busy', flush=True); signal.pause()"
    with (
        pytest.raises(UnreachableError, match="sleeper was not ready after 0 s"),
        running_child(
            "sleeper",
            lambda _: [sys.executable, "-c", stubborn],
            tmp_path / "log",
            ready_timeout_s=0.0,
            stop_timeout_s=0.05,
        ),
    ):
        pass


def test_without_xllamacpp_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(UsageError, match=r"needs xllamacpp: pip install 'loadstone\[llamacpp\]'"),
        running_engine(tmp_path, parallel=1, context_tokens=1, cores=frozenset([0]), log_path=tmp_path / "log"),
    ):
        pass


@pytest.mark.parametrize(
    ("available", "generator", "engine"),
    [({0}, {0}, {0}), ({0, 1}, {0}, {1}), ({3, 5, 7}, {3}, {5, 7})],
)
def test_the_engine_gets_all_cores_but_one(available: set[int], generator: set[int], engine: set[int]) -> None:
    assert split_cores(frozenset(available)) == (generator, engine)


def test_pinning_ends_with_the_block() -> None:
    before = available_cores()
    only = frozenset([min(before)])
    with pinned_to(only):
        assert available_cores() == only
    assert available_cores() == before


def _stream(base_url: str, prompt: str) -> list[dict[str, Any]]:
    connection = http.client.HTTPConnection(urlsplit(base_url).netloc, timeout=20)
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": _OUTPUT_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == http.HTTPStatus.OK
    lines = response.read().decode().splitlines()
    connection.close()
    assert "data: [DONE]" in lines
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def _get(base_url: str, path: str) -> str:
    connection = http.client.HTTPConnection(urlsplit(base_url).netloc, timeout=20)
    connection.request("GET", path)
    text = connection.getresponse().read().decode()
    connection.close()
    return text
