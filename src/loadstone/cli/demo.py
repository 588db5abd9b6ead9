"""``loadstone demo``: a real engine, a search, a report, a gate that holds the line, and what to type next."""

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from loadstone.cli.command import CommandLine

if TYPE_CHECKING:
    from loadstone.measure.find import FindSettings
    from loadstone.serve.engines.tiny_gguf import TinyShape

PARALLEL = 8
CONTEXT_TOKENS = 512
INPUT_TOKENS = 48
OUTPUT_TOKENS = 32
MAX_TTFT_MS = 150.0
LEVELS = "1,2,4,8,16,32,64,128"
MAX_LEVEL_SECONDS = 8.0

_INTRO = (
    "A real engine (llama.cpp) starts on {engine_cores} of {cores} cores with a tiny random model: {parameters:.1f} "
    "million weights in Qwen3's shape. Random weights don't talk, the replies are noise; they compute like any others, "
    "and that is what is measured.",
    "It decodes {parallel} requests together; what comes beyond them waits inside the engine. So the line to be found "
    "is where the wait begins to show: mean time to first token above {max_ttft_ms:.0f} ms, or fewer than 95 % "
    "successes. Requests are {input_tokens} tokens in, {output_tokens} out. The rule on throughput gain is off: on one "
    "core a tiny model gains little from batching. Its knee is shown beside the line.",
)

_NEXT = """
Now your own server:
    loadstone find --base-url http://127.0.0.1:8000 --out runs/mine
    loadstone gate --upstream http://127.0.0.1:8000 --limits runs/mine/limits.toml
The report of this run again, with the table of levels:
    loadstone report {run} --text"""


def demo(*, out: Path | None = None, command: CommandLine = "") -> int:
    """Start a small engine on this machine, find its line, write a report, and hold it to the line under overload.

    About a minute, nothing to set up.

    Parameters
    ----------
    out
        Folder of the run; runs/TIME-demo where none is given. Must be empty or not exist.
    """
    from datetime import datetime

    from loadstone.cli.searching import Secrets, conclude, search
    from loadstone.core.errors import EXIT_INTERRUPTED
    from loadstone.measure.runs import LIMITS_FILE, check_out, create_run
    from loadstone.serve.cores import available_cores, pinned_to, split_cores
    from loadstone.serve.engines.llamacpp import running_engine
    from loadstone.serve.engines.tiny_gguf import cached_model

    shape = demo_shape()
    cores = available_cores()
    generator_cores, engine_cores = split_cores(cores)
    _introduce(
        cores=len(cores),
        engine_cores=len(engine_cores),
        parameters=shape.parameters() / 1e6,
        parallel=PARALLEL,
        max_ttft_ms=MAX_TTFT_MS,
        input_tokens=INPUT_TOKENS,
        output_tokens=OUTPUT_TOKENS,
    )
    model_path = cached_model(shape)
    check_out("" if out is None else str(out))
    folder = create_run("" if out is None else str(out), "demo", datetime.now().astimezone())
    with ExitStack() as running:
        base_url = running.enter_context(
            running_engine(
                model_path,
                parallel=PARALLEL,
                context_tokens=CONTEXT_TOKENS,
                cores=engine_cores,
                log_path=folder.path / "engine.log",
            )
        )
        running.enter_context(pinned_to(generator_cores))
        settings = demo_settings(base_url)
        searched = search(settings, lambda model: folder, Secrets(), command, quiet=False)
        if searched.verdict is None:
            # The engine is gone: there is nothing to resume against.
            print(f"loadstone: interrupted; what was measured lies in {folder.path}", file=sys.stderr)
            return EXIT_INTERRUPTED
        status = conclude(searched, quiet=False, json=False)
        if searched.verdict.recommended_throughput_rps:
            _hold(settings, searched.verdict.recommended_throughput_rps, folder.path / LIMITS_FILE)
    print(_NEXT.format(run=shlex.quote(str(folder.path))))
    return status


def _hold(settings: "FindSettings", rate_rps: float, limits_path: Path) -> None:
    """Close the loop: the limits just measured, enforced under overload."""
    from loadstone.cli.demo_hold import hold, show
    from loadstone.core.limits import loads

    limits = loads(limits_path.read_text("utf-8"), str(limits_path)).limits
    straight, through = hold(settings, limits_path, rate_rps)
    show(straight, through, settings.rules.max_ttft_ms, limits.max_concurrency or 0, limits.max_queue or 0)


def _introduce(**figures: float) -> None:
    """Wrapped to the terminal."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    for paragraph in _INTRO:
        console.print(f"{paragraph.format(**figures)}\n", soft_wrap=not console.is_terminal)


def demo_shape() -> "TinyShape":
    """Wide and shallow, 44 MB: more than a core's caches hold, so that a step costs mostly the reading of the weights
    and eight requests decoded together cost less than eight alone."""
    from loadstone.serve.engines.tiny_gguf import TinyShape

    return TinyShape(layers=1, width=1024, heads=8, kv_heads=2, head_width=64, ffn_width=3072)


def demo_settings(base_url: str) -> "FindSettings":
    """The search that the demo runs."""
    from loadstone.core.settings import DataSettings, LadderSettings, RuleSettings, ServerSettings
    from loadstone.measure.find import FindSettings

    return FindSettings(
        server=ServerSettings(base_url=base_url),
        data=DataSettings(random_input_len=INPUT_TOKENS, random_output_len=OUTPUT_TOKENS),
        rules=RuleSettings(max_ttft_ms=MAX_TTFT_MS, min_gain=0.0),
        ladder=LadderSettings(levels=LEVELS, max_level_seconds=MAX_LEVEL_SECONDS),
    )
