"""One replica of the rerank service: ``python -m loadstone.serve.rerank --port PORT --model MODEL …``.

It serves on the loopback until its standard input is closed. With ``--engine vllm`` it runs vLLM as a child of its own.
"""

import argparse
import contextlib
import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from loadstone.core.settings import ServeSettings
from loadstone.serve.app import run, run_replica
from loadstone.serve.batching import Batching, BatchSettings
from loadstone.serve.child import free_port
from loadstone.serve.engines.checkpoint import read_config, read_tokenizer
from loadstone.serve.engines.qwen_prompt import QwenPrompt
from loadstone.serve.engines.vllm import rerank_command
from loadstone.serve.engines.vllm_scores import VllmScores, running_vllm
from loadstone.serve.machine import look_at_machine
from loadstone.serve.pairs import Pair
from loadstone.serve.parent import ParentWatch
from loadstone.serve.rerank_plan import ENGINES, ORIGINAL, architecture_of, in_force, told
from loadstone.serve.rerank_routes import RerankService, Scorer

_DEFAULT = ServeSettings()


def serve(settings: ServeSettings, port: int, parent: ParentWatch) -> None:
    """Load the model and serve it on ``port`` until standard input is closed. Raises UsageError, UnreachableError."""
    machine = look_at_machine(settings.vllm_python)
    config = read_config(settings.model)
    final = in_force(settings, config, machine, BatchSettings())
    original = architecture_of(config) == ORIGINAL
    with scorer(final, original=original, on_cpu=not machine.gpus) as made:
        run(RerankService(made, settings.model, told(final)).application(), port, parent)


@contextlib.contextmanager
def scorer(settings: ServeSettings, *, original: bool, on_cpu: bool) -> Iterator[Scorer]:
    """The model loaded and warm, by settings in force."""
    limit, workers = settings.max_model_len or 0, settings.max_workers or 1
    if settings.engine == "vllm":
        prompt = QwenPrompt(read_tokenizer(settings.model), limit)
        python, port = settings.vllm_python or sys.executable, free_port()
        command = rerank_command(python, settings.model, port, settings, original=original, on_cpu=on_cpu)
        with running_vllm(command, port, settings.ready_timeout_s) as base_url:
            yield VllmScores(base_url, settings.model, prompt, workers)
    else:
        engine = _engine(settings, limit, original=original)
        engine.run([engine.prepare(Pair("warm", "up", "query", "documents[0]"))])
        batch = BatchSettings(
            max_items=settings.max_num_seqs or 1,
            max_tokens=settings.max_num_batched_tokens or 1,
            pads=engine.pads,
            prepare_threads=workers,
        )
        yield Batching(engine, batch, time.monotonic_ns)


def _engine(settings: ServeSettings, limit_tokens: int, *, original: bool) -> Any:
    """Imported here: each engine brings its own heavy library into the process."""
    if settings.engine == "cross-encoder":
        cross_encoder = importlib.import_module("loadstone.serve.engines.cross_encoder")
        return cross_encoder.CrossEncoderReranker(settings.model, limit_tokens)
    prompt = QwenPrompt(read_tokenizer(settings.model), limit_tokens)
    qwen_reranker = importlib.import_module("loadstone.serve.engines.qwen_reranker")
    return qwen_reranker.QwenReranker(settings.model, prompt, original=original)


def parse(words: Sequence[str]) -> tuple[ServeSettings, int]:
    """The settings and the port that a command line gives."""
    parser = argparse.ArgumentParser(prog="python -m loadstone.serve.rerank")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True, help="folder, or name on the hub")
    parser.add_argument("--engine", choices=ENGINES, default=_DEFAULT.engine)
    for flag in ("--max-num-seqs", "--max-num-batched-tokens", "--max-model-len", "--max-workers", "--threads"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--tensor-parallel-size", type=int, default=_DEFAULT.tensor_parallel_size)
    parser.add_argument("--ready-timeout-s", type=float, default=_DEFAULT.ready_timeout_s)
    for flag in ("--quantization", "--vllm-python"):
        parser.add_argument(flag, default="")
    given = vars(parser.parse_args(words))
    port: int = given.pop("port")
    return ServeSettings(**given), port


def main() -> None:
    run_replica(lambda parent: serve(*parse(sys.argv[1:]), parent))


if __name__ == "__main__":
    main()
