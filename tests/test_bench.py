"""``loadstone bench`` end to end: real sockets, the printed block, the file, the exit status."""

import asyncio
import json
import math
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from loadstone.cli.bench import bench
from loadstone.cli.bench_files import prepare_folder, result_file
from loadstone.cli.bench_settings import BenchSettings
from loadstone.cli.bench_setup import setup_of
from loadstone.core.errors import RefusedError, UnreachableError, UsageError
from loadstone.measure import bench as level_of_bench

NOW = datetime(2026, 11, 20, 10, 0, tzinfo=UTC)


class OpenAiServer:
    """A small server on a real port: streams ``max_tokens`` words, embeds, and fails every n-th request if told to."""

    def __init__(self) -> None:
        self.port = 0
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.fail_every = 0
        self.fail_after = 10**9
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._started.wait()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        async with server:
            await self._stop.wait()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1]) if length else 0)
                writer.write(self._reply(head, json.loads(body) if body else {}))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

    def _reply(self, head: str, body: dict[str, Any]) -> bytes:
        self.heads.append(head)
        if head.startswith("GET /v1/models"):
            return _json(200, {"data": [{"id": "tiny"}]})
        self.bodies.append(body)
        if len(self.bodies) > self.fail_after or (self.fail_every and len(self.bodies) % self.fail_every == 0):
            return _json(500, {"error": {"message": "boom"}})
        if "input" in body:
            texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
            usage = {"prompt_tokens": sum(len(text.split()) for text in texts)}
            return _json(200, {"data": [{}] * len(texts), "usage": usage})
        usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": body["max_tokens"]}
        if not body.get("stream"):
            return _json(200, {"choices": [{"text": "x"}], "usage": usage})
        events = [{"choices": [{"text": f"w{i} "}]} for i in range(body["max_tokens"] - 1)]
        events += [{"choices": [{"text": "end", "finish_reason": "length"}]}, {"choices": [], "usage": usage}]
        stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return _response(200, "text/event-stream", stream)


def _json(status: int, value: Any) -> bytes:
    return _response(status, "application/json", json.dumps(value))


def _response(status: int, content_type: str, text: str) -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nContent-Length: {len(text)}\r\n\r\n"
    return (head + text).encode()


@pytest.fixture
def server() -> Iterator[OpenAiServer]:
    server = OpenAiServer()
    yield server
    server.close()


def settings(server: OpenAiServer, **fields: Any) -> BenchSettings:
    chosen = {"port": server.port, "num_prompts": 20, "random_input_len": 32, "random_output_len": 5}
    return BenchSettings(**(chosen | fields))


def test_one_level(server: OpenAiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "level.json"
    chosen = settings(
        server, max_concurrency=4, result_filename=str(file), metadata=("tp=1",), num_warmups=3, json=True
    )
    assert bench(chosen) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "============ Serving Benchmark Result ============"
    assert out[1] == "Successful requests:                     20        "
    result = json.loads(file.read_text())
    assert json.loads(out[-1]) == result
    assert (result["completed"], result["model_id"], result["tp"]) == (20, "tiny", "1")
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (20 * 32, 20 * 5)
    assert 1 <= result["max_concurrent_requests"] <= 4
    assert result["mean_ttft_ms"] > 0
    assert list(result)[-1] == "loadstone"
    assert result["loadstone"]["output_tokens_from"] == "usage"
    assert "ttfts" not in result
    measured = server.bodies[-20:]
    assert all(body["stream"] and body["ignore_eos"] and body["model"] == "tiny" for body in measured)
    assert len({body["prompt"] for body in server.bodies}) == len(server.bodies)


def test_requests_built_when_they_are_due_are_the_same(server: OpenAiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def prompts() -> list[str]:
        assert bench(settings(server, model="tiny", max_concurrency=1)) == 0
        return [body["prompt"] for body in server.bodies[-20:]]

    before = prompts()
    monkeypatch.setattr(level_of_bench, "_BUILT_BEFORE", 5)
    assert prompts() == before


def test_failures_are_data_and_said(server: OpenAiServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.fail_every = 5
    assert bench(settings(server, model="tiny", save_detailed=True, json=True, quiet=True)) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["completed"], result["failed"]) == (16, 4)
    assert sorted(set(result["errors"])) == ["", "HTTP 500: boom"]
    assert len(result["generated_texts"]) == 20
    assert not captured.err
    assert bench(settings(server, model="tiny")) == 0
    assert "loadstone: 4 × http_error: HTTP 500: boom" in capsys.readouterr().err


def test_all_failing_is_exit_status_one(server: OpenAiServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.fail_after = 4  # the probe and three requests that calibrate the lengths
    assert bench(settings(server, model="tiny")) == 1
    assert "Failed requests:                         20" in capsys.readouterr().out
    with pytest.raises(RefusedError, match="boom"):
        bench(settings(server, model="tiny"))


def test_embeddings(server: OpenAiServer, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = settings(server, backend="openai-embeddings", random_batch_size=3, json=True, header=("X-A=b",))
    assert bench(chosen) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert (result["total_input_sequences"], result["total_input_tokens"]) == (60, 20 * 3 * 32)
    assert "Input throughput (inputs/s):" in out
    assert "Mean E2EL (ms):" in out
    assert "TTFT" not in out
    assert "X-A: b" in server.heads[-1]


def test_append(server: OpenAiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        chosen = settings(
            server, num_prompts=2, append_result=True, result_dir=str(tmp_path), result_filename="all.jsonl"
        )
        assert bench(chosen) == 0
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    assert [json.loads(line)["completed"] for line in lines] == [2, 2]
    capsys.readouterr()


def test_few_prompts_draw_a_warning(server: OpenAiServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(settings(server, max_concurrency=10)) == 0
    assert "20 prompts are few for 10 at once" in capsys.readouterr().err


def test_nobody_there(unused_port: int) -> None:
    with pytest.raises(UnreachableError, match="cannot be reached"):
        bench(BenchSettings(port=unused_port, model="m"))


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"num_prompts": 0}, "--num-prompts"),
        ({"max_concurrency": 0}, "--max-concurrency"),
        ({"num_warmups": -1}, "--num-warmups"),
        ({"request_timeout_s": 0.0}, "--request-timeout-s"),
        ({"backend": "tgi"}, "choose of vllm, openai"),
        ({"endpoint": "v1"}, "--endpoint v1"),
        ({"dataset_name": "sonnet"}, "random or custom"),
        ({"random_range_ratio": "much"}, "--random-range-ratio"),
        ({"random_range_ratio": '{"input": 1}'}, "--random-range-ratio"),
        ({"header": ("x",)}, "--header x: expected KEY=VALUE"),
        ({"metadata": ("=x",)}, "--metadata"),
        ({"extra_body": "{"}, "--extra-body is not JSON"),
        ({"extra_body": "[]"}, "--extra-body must be a JSON object"),
        ({"request_rate": 0.0}, "--request-rate"),
        ({"percentile_metrics": "x"}, "--percentile-metrics"),
        ({"tokenizer": "./absent"}, "--tokenizer ./absent"),
    ],
)
def test_bad_flags_are_named(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text) if "choose" not in text else text):
        setup_of(BenchSettings(**wrong), NOW)


@pytest.mark.parametrize(
    ("backend", "endpoint", "family", "path"),
    [
        ("vllm", None, "completions", "/v1/completions"),
        ("openai-chat", None, "chat", "/v1/chat/completions"),
        ("openai-chat", "/v1/chat/completions", "chat", "/v1/chat/completions"),
        ("openai", "/v1/chat/completions", "chat", "/v1/chat/completions"),
        ("openai", "chat", "chat", "/v1/chat/completions"),
        ("vllm-pooling", None, "embeddings", "/pooling"),
        ("vllm-rerank", "/rerank", "rerank", "/rerank"),
        ("infinity-embeddings", None, "embeddings", "/embeddings"),
        ("openai-embeddings", "/embed/all", "embeddings", "/embed/all"),
    ],
)
def test_backends_and_endpoints(backend: str, endpoint: str | None, family: str, path: str) -> None:
    setup = setup_of(BenchSettings(backend=backend, endpoint=endpoint), NOW)
    assert (setup.endpoint.name, setup.path) == (family, path)


def test_flags_become_a_plan() -> None:
    setup = setup_of(
        BenchSettings(
            host="::1",
            input_len=7,
            output_len=9,
            random_range_ratio='{"input": 0.3, "output": 0.5}',
            dataset_name="random-rerank",
            temperature=0.0,
            top_k=3,
            extra_body='{"top_k": 5}',
            ramp_up_strategy="linear",
            ramp_up_start_rps=1,
            ramp_up_end_rps=5,
            goodput=("ttft:100",),
            trust_remote_code=True,
        ),
        NOW,
    )
    assert setup.base_url == "http://[::1]:8000"
    assert (setup.workload.input_len, setup.workload.output_len, setup.workload.custom_output_len) == (7, 9, 9)
    assert (setup.workload.input_range_ratio, setup.workload.output_range_ratio) == (0.3, 0.5)
    assert setup.extra == {"temperature": 0.0, "top_k": 5}
    assert setup.result.ramp["ramp_up_end_rps"] == 5
    assert setup.plan.arrivals.rate_rps == math.inf
    assert setup.notes == ("--trust-remote-code has no effect here",)
    assert setup.ignore_eos


def test_file_names(tmp_path: Path) -> None:
    def name(**fields: Any) -> str | None:
        chosen = BenchSettings(**fields)
        file = result_file(chosen, setup_of(chosen, NOW).result)
        return None if file is None else str(file)

    assert name() is None
    assert name(save_result=True, model="a/b", max_concurrency=5) == "openai-infqps-concurrency5-b-20261120-100000.json"
    assert name(result_filename="x.json", result_dir="d") == "d/x.json"
    assert name(save_result=True, label="l", request_rate=2.0, model="b") == "l-2.0qps-b-20261120-100000.json"


def test_a_file_that_cannot_be_written_is_named_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "x.json"):
        with pytest.raises(UsageError, match="cannot be written"):
            prepare_folder(place)
    prepare_folder(tmp_path / "a" / "b.json")
    assert not (tmp_path / "a" / "b.json").exists()
