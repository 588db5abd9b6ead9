"""The documents' scripts over ``loadstone bench``, for real: every line and JSON key that they read is found."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from servers import MODEL, Asked, Peer, breaks, serving

EXAMPLES = Path(__file__).parent.parent / "examples"
ANALYSED = (1, 5, 10, 20, 50, 100, 200)
"""The levels whose files the analysis opens."""
CLIMBED = ANALYSED[:3]
QUICK = {"LOADSTONE_MAX_LEVEL_SECONDS": "0.4"}
NUMBER = re.compile(r"\d+(\.\d+)?")


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    """A simulated server as a process of its own, fast enough for all levels of the documents."""
    command = [sys.executable, "-m", "loadstone", "sim", "--profile", "wide"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sim:
        try:
            assert sim.stdout is not None
            yield sim.stdout.readline().split()[4]
        finally:
            sim.terminate()


def run(name: str, folder: Path, base_url: str, *arguments: str, **variables: str) -> str:
    """Run an example in ``folder`` with ``variables`` set; returns what it printed. Its exit status must be 0."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LOADSTONE_")}
    path = os.pathsep.join((str(Path(sys.executable).parent), clean["PATH"]))
    sizes = {"MODEL_PATH": "loadstone-sim", "INPUT_LEN": "8", "OUTPUT_LEN": "2"}
    environment = clean | sizes | {"PATH": path, "LOADSTONE_BASE_URL": base_url, "MPLBACKEND": "Agg"} | variables
    interpreter = sys.executable if name.endswith(".py") else shutil.which("bash")
    assert interpreter is not None
    command = [interpreter, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def climbed(base_url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder with the results, what the first script printed)."""
    folder = tmp_path_factory.mktemp("progressive")
    levels = " ".join(map(str, CLIMBED))
    return folder / "concurrency_results", run("concurrency_test.sh", folder, base_url, LEVELS=levels)


def test_the_progressive_script_reads_its_three_figures_at_every_level(climbed: tuple[Path, str]) -> None:
    _, printed = climbed
    lines = re.findall(r"并发度 (\d+): 成功率 (.*)%, 吞吐量 (.*) req/s, TTFT (.*)ms", printed)
    assert [int(line[0]) for line in lines] == list(CLIMBED)
    assert all(NUMBER.fullmatch(figure) for line in lines for figure in line)
    assert all(line[1] == "100" for line in lines)


def test_the_log_holds_the_lines_that_scripts_grep(climbed: tuple[Path, str]) -> None:
    results, _ = climbed
    log = (results / "concurrency_5.log").read_text()
    for label in ("Successful requests:", "Request throughput (req/s):", "Mean TTFT (ms):"):
        assert len([line for line in log.splitlines() if line.startswith(label)]) == 1


def test_the_analysis_runs_unchanged_on_the_files_of_the_script(climbed: tuple[Path, str], base_url: str) -> None:
    results, _ = climbed
    for c in ANALYSED[len(CLIMBED) :]:
        shutil.copy(results / f"concurrency_{CLIMBED[-1]}.json", results / f"concurrency_{c}.json")
    printed = run("analyze_concurrency.py", results, base_url)
    throughputs = {
        c: json.loads((results / f"concurrency_{c}.json").read_text())["request_throughput"] for c in ANALYSED
    }
    best = max(ANALYSED, key=lambda c: throughputs[c] / c)
    assert f"最优并发度: {best}" in printed
    assert f"最大吞吐量: {max(throughputs.values()):.2f} req/s" in printed
    assert (results / "concurrency_analysis.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def bare_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with what the scripts need and nothing else: no bc."""
    folder = tmp_path_factory.mktemp("bin")
    for tool in ("awk", "grep", "mkdir", "tail", "tee"):
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    (folder / "loadstone").symlink_to(Path(sys.executable).parent / "loadstone")
    return str(folder)


@pytest.mark.parametrize(("target_qps", "levels"), [(1_000, "5 10"), (50, "10")])
def test_the_rate_script_reads_the_rate_of_each_level_and_compares_it_without_bc(
    target_qps: int, levels: str, base_url: str, bare_path: str, tmp_path: Path
) -> None:
    variables = {"LEVELS": levels, "TARGET_QPS": str(target_qps), "NUM_PROMPTS": "50", "PATH": bare_path}
    printed = run("qps_concurrency_test.sh", tmp_path, base_url, **variables)
    rates = re.findall(r"实际QPS: (.*)", printed)
    assert all(NUMBER.fullmatch(rate) for rate in rates)
    assert len(rates) == len(list(tmp_path.glob("*.log"))) == len(list(tmp_path.glob("*.json"))) == len(levels.split())
    assert ("达到目标QPS" in printed) == (float(rates[-1]) >= 0.95 * target_qps)


def test_the_progressive_script_stops_at_the_first_level_that_fails(
    base_url: str, bare_path: str, tmp_path: Path
) -> None:
    with serving(breaks, good=20, every=2) as server:
        variables = {"MODEL_PATH": MODEL, "LEVELS": "10 20", "PATH": bare_path}
        printed = run("concurrency_test.sh", tmp_path, server.url, **variables)
    assert re.findall(r"测试并发度: (\d+)", printed) == ["10"]
    assert "成功率低于95%" in printed
    assert "建议最大并发数: 5" in printed


@pytest.mark.parametrize(("script", "answer"), [("concurrency_find.sh", "verdict.json"), ("qps_rate.sh", "rate.json")])
def test_the_command_that_replaces_a_script_runs(script: str, answer: str, base_url: str, tmp_path: Path) -> None:
    sizes = {"LEVELS": "1", "TARGET_QPS": "20", "NUM_PROMPTS": "20"}
    run(script, tmp_path, base_url, **QUICK, **sizes)
    assert len(list(tmp_path.glob(f"runs/*/{answer}"))) == 1


async def embeds(asked: Asked, peer: Peer) -> None:
    await asyncio.sleep(0.01)
    texts = asked.body["input"]
    tokens = sum(len(text.split()) for text in texts) if isinstance(texts, list) else len(texts.split())
    data = [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}]
    await peer.reply(200, json.dumps({"data": data, "usage": {"prompt_tokens": tokens}}).encode())


def test_the_benchmark_of_the_embedding_document_prints_its_row(tmp_path: Path) -> None:
    with serving(embeds) as server:
        flags = ("--url", server.url, "--concurrency", "5", "--requests", "50")
        printed = run("benchmark.py", tmp_path, server.url, *flags)
    header, _, row = printed.splitlines()
    assert header == "| 并发数 | RPS | 平均延迟 | P95延迟 | P99延迟 | 错误率 |"
    assert re.fullmatch(r"\| 5 \| \d+ \| \d+ms \| \d+ms \| \d+ms \| 0% \|", row)
    assert len([asked for asked in server.asked if asked.path == "/v1/embeddings"]) >= 50


def test_the_command_that_replaces_the_benchmark_runs(tmp_path: Path) -> None:
    with serving(embeds) as server:
        run("benchmark_find.sh", tmp_path, server.url, **QUICK, LEVELS="1", EMBEDDING_URL=server.url)
    assert len(list(tmp_path.glob("runs/*/limits.toml"))) == 1
