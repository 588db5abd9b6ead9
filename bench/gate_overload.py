"""The rows with engines behind the gate: more load than they take, and several of them."""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from client import line
from gate_loads import PATH
from gate_run import Bench, Figures, quotient, row
from gate_servers import Server, running_gate, sim

from loadstone.cli.demo import demo_shape
from loadstone.core import limits as limits_file
from loadstone.core.limits import Evidence, Limits
from loadstone.serve.engines.llamacpp import running_engine
from loadstone.serve.engines.tiny_gguf import cached_model
from loadstone.sim.profiles import MODEL

_MULTIPLES = (1, 2, 10)
_BESIDE = (1, 10)
_DEADLINE_S = 10
_PROMPT_S = 0.5
_PROMPT_ANSWERS = 5
_IDLE_WITHIN_S = 120
_SIM = ("--profile", "sharp-knee", "--max-num-seqs", "32")
_SLOTS = 32
_TOKENS = 16


@dataclass(frozen=True)
class _Engine:
    """An engine that runs, and how its line is searched."""

    name: str
    url: str
    core: int
    """Of the load generator that is to leave it alone."""
    find: tuple[str, ...]
    input_tokens: int
    output_tokens: int
    max_ttft_ms: float

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


def sim_overload(bench: Bench) -> None:
    """A simulated engine, which shares a core with the load generator: it computes next to nothing."""
    levels = ("--levels", "1,2,4,8,16,32,64,128", "--min-gain", "0")
    with sim(bench.load_core, *_SIM) as server:
        _overload(bench, _Engine("sim", server.url, bench.load_core, levels, 48, _TOKENS, 300.0))


def llamacpp_overload(bench: Bench) -> None:
    """llama.cpp with the demo's model has the second core to itself; gate and load generator share the first."""
    levels = ("--levels", "1,2,4,8,16,32,64,128", "--max-level-seconds", "8", "--min-gain", "0")
    cores = frozenset([bench.proxy_core])
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "engine.log")
        running = running_engine(cached_model(demo_shape()), parallel=8, context_tokens=512, cores=cores, log_path=log)
        with running as url:
            _overload(bench, _Engine("llama.cpp", url, bench.load_core, levels, 48, 32, 150.0))


def upstreams(bench: Bench) -> None:
    """Always a queue, so that every slot of every upstream is wanted; throughput in tokens, one for each event."""
    runs: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for _ in range(bench.rounds):
        for count, throughputs in runs.items():
            with ExitStack() as stack:
                servers = [stack.enter_context(sim(bench.load_core, *_SIM)) for _ in range(count)]
                flags = ("--max-concurrency", str(_SLOTS), "--max-queue", "1000", "--requests-per-minute", "0")
                ports = [server.port for server in servers]
                gate = stack.enter_context(running_gate(bench.proxy_core, ports, *flags, "--requests-per-hour", "0"))
                load = {"clients": count * (_SLOTS + 8), "model": MODEL, "output_tokens": _TOKENS}
                run = bench.load("tokens", port=gate.port, seconds=bench.seconds(8, 4), **load)
            throughputs.append(run["count"] / run["wall_s"])
    for count, throughputs in runs.items():
        row(f"{count} simulated upstreams, tokens/s", throughputs, 0)
    for count in (2, 4):
        scaled = [share / count for share in quotient(runs[count], runs[1])]
        row(f"{count} simulated upstreams ÷ {count} × one", scaled, 3, "≥ 0.95")


def _overload(bench: Bench, engine: _Engine) -> None:
    with tempfile.TemporaryDirectory() as folder:
        limits, evidence = _find(engine, Path(folder, "run"))
        _say_line(engine, limits, evidence)
        rate = evidence.throughput_rps
        assert rate is not None, "find measures the throughput of what it recommends"
        load = _Load(bench, engine, rate, limits.request_timeout_s or _DEADLINE_S)
        held: dict[int, list[Figures]] = {multiple: [] for multiple in _MULTIPLES}
        alone: dict[int, list[Figures]] = {multiple: [] for multiple in _BESIDE}
        for seed in range(bench.rounds):
            for multiple, runs in held.items():
                with _held(bench, engine, Path(folder, "run", "limits.toml")) as gate:
                    runs.append(load.run(gate.port, multiple, seed))
            for multiple, runs in alone.items():
                runs.append(load.run(engine.port, multiple, seed))
    _say_goodput(engine, held, rate)
    _say_times(engine, held, evidence)
    _say_alone(engine, alone)


class _Load:
    """The open loop, at multiples of the throughput that was measured at the limit."""

    def __init__(self, bench: Bench, engine: _Engine, rate: float, timeout_s: float) -> None:
        self._bench = bench
        self._engine = engine
        self._rate = rate
        self._timeout_s = timeout_s
        self._body = _body(engine)
        self._probe = _ask(_model(engine), 1, 1, stream=False)

    def run(self, port: int, multiple: int, seed: int) -> Figures:
        self._await_idle()
        return self._bench.load(
            "open_loop",
            core=self._engine.core,
            port=port,
            body=self._body,
            rate=multiple * self._rate,
            warm_s=2.0,
            seconds=self._bench.seconds(10, 6),
            timeout_s=self._timeout_s,
            max_ttft_s=self._engine.max_ttft_ms / 1e3,
            seed=seed,
        )

    def _await_idle(self) -> None:
        """Until the engine has got over the load before: a backlog would be counted against the next run."""
        until_s = time.monotonic() + _IDLE_WITHIN_S
        prompt = 0
        while prompt < _PROMPT_ANSWERS:
            began_s = time.monotonic()
            if began_s > until_s:
                raise RuntimeError(f"{self._engine.name} was still busy {_IDLE_WITHIN_S} s after its load had ended")
            with contextlib.suppress(TimeoutError, urllib.error.URLError):
                _prompt_tokens(self._engine, self._probe, timeout_s=5)
                prompt = prompt + 1 if time.monotonic() - began_s < _PROMPT_S else 0


@contextlib.contextmanager
def _held(bench: Bench, engine: _Engine, limits: Path) -> Iterator[Server]:
    """The gate with the limits as ``find`` wrote them, on a core that the engine does not compute on."""
    core = bench.proxy_core if engine.name == "sim" else bench.load_core
    with running_gate(core, [engine.url], "--limits", str(limits)) as server:
        yield server


def _find(engine: _Engine, folder: Path) -> tuple[Limits, Evidence]:
    command = [sys.executable, "-m", "loadstone", "find", "--base-url", engine.url, "--out", str(folder), "--quiet"]
    command += ["--random-input-len", str(engine.input_tokens), "--random-output-len", str(engine.output_tokens)]
    command += ["--max-ttft-ms", str(engine.max_ttft_ms), "--request-timeout-s", str(_DEADLINE_S), *engine.find]
    subprocess.run(["taskset", "-c", str(engine.core), *command], check=True, cwd=folder.parent)
    path = folder / "limits.toml"
    file = limits_file.loads(path.read_text(encoding="utf-8"), str(path))
    assert file.evidence is not None, "find writes its evidence"
    return file.limits, file.evidence


def _body(engine: _Engine) -> str:
    """A request of the search's lengths. Two probes tell what a word costs and what the template adds."""
    model = _model(engine)
    one, five = (_prompt_tokens(engine, _ask(model, words, 1, stream=False)) for words in (1, 5))
    each = (five - one) / 4
    words = max(1, round((engine.input_tokens - one) / each) + 1)
    return _ask(model, words, engine.output_tokens, stream=True)


def _model(engine: _Engine) -> str:
    with urllib.request.urlopen(f"{engine.url}/v1/models", timeout=10) as reply:
        return str(json.loads(reply.read())["data"][0]["id"])


def _ask(model: str, words: int, output_tokens: int, *, stream: bool) -> str:
    content = " ".join("a" * words)
    return json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "stream": stream,
        }
    )


def _prompt_tokens(engine: _Engine, body: str, timeout_s: float = 30) -> int:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(engine.url + PATH, body.encode(), headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as reply:
        return int(json.loads(reply.read())["usage"]["prompt_tokens"])


def _say_line(engine: _Engine, limits: Limits, evidence: Evidence) -> None:
    found = f"{evidence.measured_max_concurrency} at once ({evidence.binding})"
    kept = f"{limits.max_concurrency} at once, queue {limits.max_queue}, {limits.queue_timeout_s} s"
    line(f"overload, {engine.name}: line that find measured · limits", f"{found} · {kept}")
    line(f"overload, {engine.name}: throughput at the limit (1 ×), requests/s", f"{evidence.throughput_rps:.1f}")


def _say_goodput(engine: _Engine, held: dict[int, list[Figures]], measured_rps: float) -> None:
    name = f"overload, {engine.name}"
    for multiple, runs in held.items():
        row(f"{name}, {multiple} ×: offered, requests/s", [run["offered_rps"] for run in runs], 1)
        row(f"{name}, {multiple} ×: complete by the deadline, requests/s", [run["whole_rps"] for run in runs], 1)
        within = f"and first byte within {engine.max_ttft_ms:.0f} ms"
        row(f"{name}, {multiple} ×: {within} (goodput)", [run["good_rps"] for run in runs], 1)
    for key, what, least_peak in (("whole_rps", "complete", measured_rps), ("good_rps", "goodput", 0.0)):
        peaks = [
            max(*(run[key] for run in of_one_round), least_peak) for of_one_round in zip(*held.values(), strict=True)
        ]
        values = [run[key] for run in held[10]]
        row(f"{name}: {what} at 10 × ÷ its peak", quotient(values, peaks), 2, "≥ 0.95")


def _say_times(engine: _Engine, held: dict[int, list[Figures]], evidence: Evidence) -> None:
    name = f"overload, {engine.name}"
    p99_ms = {multiple: [run["ttft_p99_ms"] for run in runs] for multiple, runs in held.items()}
    for multiple, values in p99_ms.items():
        row(f"{name}, {multiple} ×: admitted requests' p99 TTFT, ms", values, 0)
    row(f"{name}: p99 TTFT at 10 × ÷ at 1 ×", quotient(p99_ms[10], p99_ms[1]), 2, "≤ 1.25")
    at_line = [level for level in evidence.levels if level.concurrency == evidence.measured_max_concurrency]
    if at_line and at_line[0].ttft_p99_ms:
        line_ms = at_line[0].ttft_p99_ms
        ratios = [value / line_ms for value in p99_ms[10]]
        row(f"{name}: p99 TTFT at 10 × ÷ find's {line_ms:.0f} ms at the line", ratios, 2, "≤ 1.25")
    share = [value / engine.max_ttft_ms for value in p99_ms[10]]
    row(f"{name}: p99 TTFT at 10 × ÷ the rule's {engine.max_ttft_ms:.0f} ms", share)
    refused = [run["refusal_p99_ms"] for run in held[10]]
    row(f"{name}, 10 ×: refusals answered in, p99 ms", refused, 2, "≤ 5")
    row(f"{name}, 10 ×: the load generator's own delay, p99 ms", [run["late_p99_ms"] for run in held[10]], 2)
    line(f"{name}, 10 ×: ends", _ends(held[10]))


def _say_alone(engine: _Engine, alone: dict[int, list[Figures]]) -> None:
    for multiple, runs in alone.items():
        name = f"overload, {engine.name} without the gate, {multiple} ×"
        row(f"{name}: complete by the deadline, requests/s", [run["whole_rps"] for run in runs], 1)
        row(f"{name}: goodput, requests/s", [run["good_rps"] for run in runs], 1)
        known = [run["ttft_p99_ms"] for run in runs if run["ttft_p99_ms"] is not None]
        if known:
            row(f"{name}: p99 TTFT, ms", known, 0)
        line(f"{name}: ends", _ends(runs))


def _ends(runs: list[Figures]) -> str:
    """How the requests of the last run ended."""
    return ", ".join(f"{count:,} × {how}" for how, count in sorted(runs[-1]["ends"].items()))
