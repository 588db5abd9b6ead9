"""The figures of the measuring client: ``python bench/client.py [--rounds N] [--quick]``.

Client on one core, mock on another; each figure is the median of several runs with its spread, and what is compared
runs in turn in the same session, because only the ratios carry over to another machine. Needs gcc, ``wrk`` (Debian's
package) and ``pip install -r bench/requirements.txt``.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from mock_server import Mock, running_mock

CONNECTIONS = 64
STREAMS = 1024
PERIOD_US = 20_000
CHUNKS = 50
WRK_BODY = '{"model": "mock", "prompt": "' + "word " * 32 + '", "max_tokens": 128, "stream": true}'

Figures = dict[str, float]


def load(name: str, core: int, mock: Mock, *numbers: int) -> Figures:
    """Run one load of ``loads.py``; its figures, with the mock's busy seconds in the meantime."""
    before_s = mock.busy_s()
    command = [sys.executable, Path(__file__).with_name("loads.py"), name, *map(str, (core, mock.port, *numbers))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: Figures = json.loads(output)
    return figures | {"mock_s": mock.busy_s() - before_s}


def wrk(core: int, mock: Mock, seconds: int) -> Figures:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(
            f"wrk.method = 'POST'\nwrk.headers['Content-Type'] = 'application/json'\nwrk.body = '{WRK_BODY}'\n"
        )
        script.flush()
        before_s = mock.busy_s()
        command = f"taskset -c {core} wrk -t1 -c{CONNECTIONS} -d{seconds}s -s {script.name} {mock.url}/short"
        output = subprocess.run(command.split(), check=True, stdout=subprocess.PIPE, text=True).stdout
    done = re.search(r"(\d+) requests in ([\d.]+)s", output)
    assert done is not None, output
    count = int(done[1])
    return {"count": count, "total": count, "wall_s": float(done[2]), "mock_s": mock.busy_s() - before_s}


def spread(values: list[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{statistics.median(values):,.{digits}f} [{min(values):,.{digits}f} … {max(values):,.{digits}f}]"


def line(what: str, figure: str, goal: str = "") -> None:
    print(f"| {what} | {figure} | {goal} |", flush=True)


def short_replies(core: int, mock: Mock, rounds: int, seconds: int) -> None:
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(load("short", core, mock, CONNECTIONS, seconds))
        theirs.append(wrk(core, mock, seconds))
    ratios = [rate(a) / rate(b) for a, b in zip(ours, theirs, strict=True)]
    line("short replies: loadstone, requests/s", spread([rate(run) for run in ours], 0))
    line("short replies: wrk -t1, requests/s", spread([rate(run) for run in theirs], 0))
    line("short replies: loadstone ÷ wrk", spread(ratios), "≥ 0.6")
    line("short replies: loadstone, CPU of a core", spread([cpu(run) for run in ours]))
    line("short replies: the mock's ceiling beside loadstone, requests/s", ceiling(ours))
    line("short replies: the mock's ceiling beside wrk, requests/s", ceiling(theirs))


def streams(core: int, mock: Mock, rounds: int, seconds: int) -> None:
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(load("stream", core, mock, STREAMS, CHUNKS, PERIOD_US, seconds))
        theirs.append(load("vllm", core, mock, STREAMS, CHUNKS, PERIOD_US, seconds))
    for name, runs, goals in (("loadstone", ours, ("≤ 1", "≤ 0.1", "≤ 0.60")), ("vLLM's logic", theirs, ("",) * 3)):
        line(f"streams: {name}, TTFT error p99, ms", spread([run["ttft_error_p99_ms"] for run in runs], 3), goals[0])
        line(f"streams: {name}, ITL error p99, ms", spread([run["itl_error_p99_ms"] for run in runs], 3), goals[1])
        line(f"streams: {name}, CPU of a core", spread([cpu(run) for run in runs]), goals[2])
        line(f"streams: {name}, chunks/s", spread([rate(run) for run in runs], 0))
        line(f"streams: {name}, CPU µs per chunk", spread([1e6 * cpu(run) / rate(run) for run in runs], 1))
    line("streams: loadstone, chunks that shared a read", spread([1 - run["reads"] / run["total"] for run in ours], 4))
    line("streams: loadstone, kernel stamps", "yes" if all(run["kernel_stamps"] for run in ours) else "no")
    line(f"streams: CPU per chunk, loadstone ÷ vLLM's logic, {STREAMS:,} streams", per_chunk(ours, theirs), "≤ 0.33")
    line("streams: the mock's ceiling, chunks/s", ceiling(ours))


def half_the_streams(core: int, mock: Mock, rounds: int, seconds: int) -> None:
    """Beyond some 600 streams vLLM's logic falls behind and reads several chunks at once, which is cheaper for it."""
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(load("stream", core, mock, STREAMS // 2, CHUNKS, PERIOD_US, seconds))
        theirs.append(load("vllm", core, mock, STREAMS // 2, CHUNKS, PERIOD_US, seconds))
    line(f"streams: CPU per chunk, loadstone ÷ vLLM's logic, {STREAMS // 2} streams", per_chunk(ours, theirs), "≤ 0.33")


def memory(core: int, mock: Mock) -> None:
    for count, chunks, period_us in ((STREAMS, 1000, PERIOD_US), (8, 125_000, 200)):
        figures = load("stream", core, mock, count, chunks, period_us, 2)
        line(f"memory: {count:,} streams × {chunks:,} chunks, peak MB", f"{figures['peak_mb']:,.0f}", "≤ 300")


def rate(run: Figures) -> float:
    """Requests or chunks per second in the window."""
    return run["count"] / run["wall_s"]


def cpu(run: Figures) -> float:
    """Share of its core that the client used in the window."""
    return run["cpu_s"] / run["wall_s"]


def per_chunk(ours: list[Figures], theirs: list[Figures]) -> str:
    return spread([cpu(a) / rate(a) / (cpu(b) / rate(b)) for a, b in zip(ours, theirs, strict=True)])


def ceiling(runs: list[Figures]) -> str:
    """What the mock could have served had it been busy all the time."""
    return spread([run["total"] / run["mock_s"] for run in runs], 0)


def machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    packages = ", ".join(f"{name} {version(name)}" for name in ("uvloop", "httptools", "aiohttp"))
    model = cpu[1] if cpu else platform.machine()
    return (
        f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, {packages}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The figures of the measuring client.")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each figure")
    parser.add_argument("--quick", action="store_true", help="short runs, no memory figures: indicative only")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    missing = [tool for tool in ("gcc", "wrk", "taskset") if shutil.which(tool) is None]
    if missing or len(cores) < 2:
        parser.error(f"needs two cores, and on the PATH: {', '.join(missing) or 'nothing more'}")
    print(f"{machine()}; median [min … max] of {options.rounds}\n\n| what | figure | goal |\n| --- | --- | --- |")
    with running_mock(cores[1]) as mock:
        short_replies(cores[0], mock, options.rounds, seconds=1 if options.quick else 3)
        streams(cores[0], mock, options.rounds, seconds=3 if options.quick else 6)
        half_the_streams(cores[0], mock, options.rounds, seconds=3 if options.quick else 6)
        if not options.quick:
            memory(cores[0], mock)


if __name__ == "__main__":
    main()
