"""The command line and environment of each replica. Pure: what would run is known before anything runs."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadstone.core.settings import ServeSettings
from loadstone.serve.engines import llamacpp, vllm
from loadstone.serve.engines.llamacpp import DEFAULT_CONTEXT_TOKENS, Slots
from loadstone.serve.planning import Kind, Share

_SEQUENCES = {"llamacpp": 8, "transformers": 4}
"""Replies generated at once where nobody says how many."""
_KV_CACHE_GIB = "4"
"""Of vLLM on the CPU, where VLLM_CPU_KVCACHE_SPACE is not set."""

_PREPARATION = ("threads", "max_workers")
_BATCHES = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "quantization")
_VLLM = ("gpu_memory_utilization", "tensor_parallel_size", "vllm_python", "ready_timeout_s")


@dataclass(frozen=True)
class Wanted:
    """What every replica of a service is told."""

    kind: Kind
    engine: str
    model: str
    settings: ServeSettings
    concurrency: int | None = None
    """The most requests that the gate sends to one replica at once; None is no bound."""
    more: tuple[str, ...] = ()
    """Flags of this kind of service alone."""


def command(wanted: Wanted, share: Share, port: int) -> list[str]:
    """What starts one replica on ``port`` of the loopback."""
    if wanted.kind is Kind.CHAT:
        return _chat(wanted, share, port)
    engine = ["--engine", wanted.engine]
    names = (*_PREPARATION, *_BATCHES, *(_VLLM if wanted.engine == "vllm" else ()))
    return [*_own(wanted, wanted.kind, port), *engine, *_flags(wanted.settings, names), *wanted.more]


def _chat(wanted: Wanted, share: Share, port: int) -> list[str]:
    settings = wanted.settings
    if wanted.engine == "vllm":
        python = settings.vllm_python or sys.executable
        return guarded(vllm.chat_command(python, wanted.model, port, settings, on_cpu=not share.gpus))
    sizes = in_force(wanted)
    if wanted.engine == "llamacpp":
        cores = frozenset(share.cores)
        slots = Slots(sizes["max_num_seqs"], sizes["max_model_len"], cores, alias=wanted.model, reuse_prompts=True)
        return llamacpp.command(Path(wanted.model), port, slots)
    threads = settings.max_workers or settings.threads
    return [
        *_own(wanted, "chat", port),
        *(("--threads", str(threads)) if threads else ()),
        *("--max-num-seqs", str(sizes["max_num_seqs"])),
        *_flags(settings, ("max_num_batched_tokens", "max_model_len", "quantization")),
    ]


def in_force(wanted: Wanted) -> dict[str, int]:
    """Values of settings that were not given, for chat engines that we start: they generate at least as many replies
    at once as the gate sends them requests."""
    if wanted.kind is not Kind.CHAT or wanted.engine not in _SEQUENCES:
        return {}
    settings = wanted.settings
    sizes = {"max_num_seqs": settings.max_num_seqs or max(_SEQUENCES[wanted.engine], wanted.concurrency or 0)}
    if wanted.engine == "llamacpp":
        sizes["max_model_len"] = settings.max_model_len or DEFAULT_CONTEXT_TOKENS
    return sizes


def _own(wanted: Wanted, module: str, port: int) -> list[str]:
    return [sys.executable, "-m", f"loadstone.serve.{module}", "--port", str(port), "--model", wanted.model]


def guarded(foreign: Sequence[str]) -> list[str]:
    """A command that does not watch its standard input, under the guard that does."""
    return [sys.executable, "-m", "loadstone.serve.guard", "--", *foreign]


def _flags(settings: ServeSettings, names: Sequence[str]) -> list[str]:
    given = {name: getattr(settings, name) for name in names}
    return [text for name, value in given.items() if value for text in (f"--{name.replace('_', '-')}", f"{value}")]


def environment(share: Share, inherited: Mapping[str, str]) -> dict[str, str]:
    """What a replica's environment says beyond ``inherited``: its GPUs, or how many cores it computes on."""
    if share.gpus:
        return {"CUDA_VISIBLE_DEVICES": ",".join(share.gpus)}
    cores = ",".join(map(str, share.cores))
    ours = {
        "OMP_NUM_THREADS": str(len(share.cores)),
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_KVCACHE_SPACE": _KV_CACHE_GIB,
    }
    return {key: value for key, value in ours.items() if key == "OMP_NUM_THREADS" or key not in inherited}
