"""The rows in which the gate stands beside its peers: requests, chunks, latency, memory."""

import re
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from client import CONNECTIONS, line
from gate_loads import PATH, chat_body
from gate_run import Bench, Figures, quotient, row
from gate_servers import Launch, Server, aiohttp_proxy, gate, nginx, streaming_nginx
from mock_server import running_mock

_STREAMS = 256
_CHUNK_US = 10_000
_FEW_STREAMS = 8
_FEW_CHUNK_US = 20_000
_FEW_CHUNKS = 25
_HELD_STREAMS = 1_000
_HELD_CHUNK_US = 100_000
_IDLE = 9_000

Runs = dict[str, list[Figures]]


def short_replies(bench: Bench) -> None:
    """JSON of some 300 bytes there, 250 back."""
    seconds = int(bench.seconds(4, 2))
    runs: Runs = {}
    with ExitStack() as stack:
        mock = stack.enter_context(running_mock(bench.load_core, sleeps=True))
        direct = Server("direct", mock.port)
        servers = [direct, *_started(stack, bench, mock.port, (gate, nginx, aiohttp_proxy))]
        for server in servers:
            _wrk(bench, server, 1)
        for _ in range(bench.rounds):
            for server in servers:
                runs.setdefault(server.name, []).append(_wrk(bench, server, seconds))
    rps = {name: [run["count"] / run["wall_s"] for run in of_one] for name, of_one in runs.items()}
    for name, values in rps.items():
        row(f"short JSON, {CONNECTIONS} connections: {name}, requests/s", values, 0)
    for name in list(rps)[1:]:
        row(f"short JSON: {name}, CPU µs per request", _per_item_us(runs[name]), 1)
        row(f"short JSON: {name}, share of its core", [run["cpu_s"] / run["wall_s"] for run in runs[name]])
    row("short JSON: loadstone ÷ nginx, requests/s", quotient(rps["loadstone"], rps["nginx"]), 2, "≥ 0.5")
    row("short JSON: loadstone ÷ aiohttp, requests/s", quotient(rps["loadstone"], rps["aiohttp"]), 1, "≥ 5")


def chunks(bench: Bench) -> None:
    """CPU of each relayed chunk, all streams at the same pace."""
    seconds = bench.seconds(6, 3)
    count = int((seconds + 0.3) * 1e6 / _CHUNK_US)
    runs: Runs = {}
    with ExitStack() as stack:
        mock = stack.enter_context(running_mock(bench.load_core, sleeps=True))
        servers = _started(stack, bench, mock.port, (gate, streaming_nginx, aiohttp_proxy))
        for _ in range(bench.rounds):
            for server in servers:
                load = {"streams": _STREAMS, "chunks": count, "period_us": _CHUNK_US, "seconds": seconds}
                run = bench.load("paced", port=server.port, pids=server.pids, **load)
                runs.setdefault(server.name, []).append(run)
    for name, of_one in runs.items():
        row(f"{_STREAMS} streams at 10 ms: {name}, CPU µs per chunk", _per_item_us(of_one), 1)
        row(f"{_STREAMS} streams: {name}, chunks/s", [run["count"] / run["wall_s"] for run in of_one], 0)
    costs = {name: _per_item_us(of_one) for name, of_one in runs.items()}
    for peer, goal in (("nginx", "≤ 1.5"), ("aiohttp", "")):
        ratios = quotient(costs["loadstone"], costs[peer])
        row(f"{_STREAMS} streams: CPU per chunk, loadstone ÷ {peer}", ratios, 2, goal)


def added_latency(bench: Bench) -> None:
    """From the mock's write to the receipt, less the same without a proxy; and the way of the request added to it."""
    load = {"streams": _FEW_STREAMS, "chunks": _FEW_CHUNKS, "period_us": _FEW_CHUNK_US}
    runs: Runs = {}
    with ExitStack() as stack:
        mock = stack.enter_context(running_mock(bench.load_core, sleeps=True))
        direct = Server("direct", mock.port)
        servers = [direct, *_started(stack, bench, mock.port, (gate, streaming_nginx))]
        for _ in range(bench.rounds):
            for server in servers:
                run = bench.load("paced", port=server.port, seconds=bench.seconds(10, 4), **load)
                runs.setdefault(server.name, []).append(run)
    for figure, what in (("chunk", "a chunk"), ("ttft", "a first token")):
        for quantile, goal in (("p50", "≤ 0.2"), ("p99", "≤ 1")):
            key = f"{figure}_{quantile}_ms"
            row(f"{_FEW_STREAMS} streams: {what}, direct, {quantile}, ms", [run[key] for run in runs["direct"]], 3)
            for name in ("nginx", "loadstone"):
                added = [run[key] - base[key] for run, base in zip(runs[name], runs["direct"], strict=True)]
                what_is_added = f"{_FEW_STREAMS} streams: added to {what} by {name}, {quantile}, ms"
                row(what_is_added, added, 3, goal if name == "loadstone" else "")


def memory(bench: Bench) -> None:
    """Resident memory with many streams, and with many connections that do nothing; a fresh gate for each."""
    loads = {
        f"{_HELD_STREAMS:,} streams": ("streams_held", {"count": _HELD_STREAMS, "period_us": _HELD_CHUNK_US}),
        f"{_IDLE:,} idle connections": ("idle_held", {"count": _IDLE}),
    }
    for what, (load, options) in loads.items():
        with running_mock(bench.load_core, sleeps=True) as mock, gate(bench.proxy_core, mock.port) as server:
            before_mb = server.rss_mb()
            with bench.held(load, port=server.port, **options) as held:
                time.sleep(bench.seconds(10, 3))
                rss_mb = server.rss_mb()
            stood = f"{held['standing']:,} stood, {held['standing_at_end']:,} to the end"
            line(f"memory: {what}, MB ({before_mb:.0f} before; {stood})", f"{rss_mb:.0f}", "≤ 120")


def _started(stack: ExitStack, bench: Bench, port: int, launches: tuple[Launch, ...]) -> list[Server]:
    return [stack.enter_context(launch(bench.proxy_core, port)) for launch in launches]


def _wrk(bench: Bench, server: Server, seconds: int) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "post.lua")
        script.write_text(
            'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
            f"wrk.body = '{chat_body(stream=False).decode()}'\n",
            encoding="utf-8",
        )
        command = f"taskset -c {bench.load_core} wrk -t1 -c{CONNECTIONS} -d{seconds}s -s {script} {server.url}{PATH}"
        before_s = server.cpu_s()
        output = subprocess.run(command.split(), check=True, stdout=subprocess.PIPE, text=True).stdout
        cpu_s = server.cpu_s() - before_s
    done = re.search(r"(\d+) requests in ([\d.]+)s", output)
    if done is None or "Non-2xx" in output or "Socket errors" in output:
        raise RuntimeError(f"wrk against {server.name}: {output}")
    return {"count": int(done[1]), "wall_s": float(done[2]), "cpu_s": cpu_s}


def _per_item_us(runs: list[Figures]) -> list[float]:
    return [1e6 * run["cpu_s"] / run["count"] for run in runs]
