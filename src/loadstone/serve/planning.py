"""Which engine runs a model, how many replicas of it, and what each of them gets of the machine. Pure.

Replicas stand behind one gate, so a limit is one limit, however many there are. On GPUs a replica has its GPUs to
itself: an engine that allocates 0.9 of a GPU's memory beforehand leaves no room for a second one. Without GPUs the
replicas share the cores.
"""

import enum
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loadstone.core.errors import UsageError
from loadstone.core.settings import ServeSettings


class Kind(enum.StrEnum):
    """What is served."""

    CHAT = "chat"
    RERANK = "rerank"
    EMBED = "embed"


ENGINES: Mapping[Kind, tuple[str, ...]] = {
    Kind.CHAT: ("vllm", "llamacpp", "transformers"),
    Kind.RERANK: ("vllm", "transformers", "cross-encoder"),
    Kind.EMBED: ("sentence", "siglip"),
}

DEFAULT_MODEL = {Kind.CHAT: "Qwen/Qwen3-8B", Kind.EMBED: "google/siglip2-so400m-patch16-naflex"}

_OWN_BATCHES = "no memory is allocated beforehand"
_ONE_PROCESS = "a replica computes on one device; --workers adds replicas"
_NO_POOL = "the engine prepares requests itself; --workers adds replicas"
WITHOUT_EFFECT: Mapping[str, Mapping[str, str]] = {
    "vllm": {},
    "vllm chat": {"threads": _NO_POOL, "max_workers": _NO_POOL},
    "llamacpp": {
        "threads": _NO_POOL,
        "max_workers": _NO_POOL,
        "max_num_batched_tokens": "llama.cpp takes as many as it has room for",
        "quantization": "a GGUF file is served as it was quantised; for INT8 give a Q8_0 file",
        "gpu_memory_utilization": "the memory is that of --max-num-seqs × --max-model-len tokens",
        "tensor_parallel_size": _ONE_PROCESS,
    },
    "transformers": {"gpu_memory_utilization": _OWN_BATCHES, "tensor_parallel_size": _ONE_PROCESS},
    "cross-encoder": {"gpu_memory_utilization": _OWN_BATCHES, "tensor_parallel_size": _ONE_PROCESS},
    "auto": {"gpu_memory_utilization": _OWN_BATCHES, "tensor_parallel_size": _ONE_PROCESS},
    "sentence": {"gpu_memory_utilization": _OWN_BATCHES, "tensor_parallel_size": _ONE_PROCESS},
    "siglip": {"gpu_memory_utilization": _OWN_BATCHES, "tensor_parallel_size": _ONE_PROCESS},
}
"""Settings that mean nothing to an engine, and why: said in one line each, never passed over in silence."""

_UTILIZATION = 0.9
"""vLLM's own, where none is given."""


@dataclass(frozen=True)
class Machine:
    """What engines can be put on."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them."""
    gpu_memory_bytes: int | None = None
    """Of the smallest."""
    vllm: bool = False
    """An interpreter with vLLM is at hand."""


@dataclass(frozen=True)
class Share:
    """What one replica gets: GPUs to itself, or some of the cores."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placement:
    """A share for each replica, and what has to be said about it."""

    shares: tuple[Share, ...]
    notes: tuple[str, ...] = ()


def choose_engine(kind: Kind, settings: ServeSettings, machine: Machine, *, gguf: bool) -> str:
    """The engine that ``--engine`` names, or the best for the model and the machine; "auto" where the model's own
    configuration decides, which is read when it is loaded. ``gguf``: the model is a GGUF file. Raises UsageError."""
    asked = settings.engine
    if asked != "auto":
        if asked not in ENGINES[kind]:
            raise UsageError(f"--engine {asked}: serve {kind} has {', '.join(ENGINES[kind])} and auto")
        if gguf and asked != "llamacpp":
            raise UsageError(f"--engine {asked} cannot run a GGUF file: take --engine llamacpp, or a checkpoint folder")
        if asked == "vllm" and not machine.vllm:
            raise UsageError("--engine vllm: this interpreter has no vLLM; name one that has with --vllm-python")
        return asked
    if kind is Kind.EMBED:
        return "auto"
    if gguf and kind is Kind.CHAT:
        return "llamacpp"
    if gguf:
        raise UsageError("serve rerank cannot run a GGUF file: give a checkpoint folder")
    if machine.gpus and machine.vllm:
        return "vllm"
    return "transformers" if kind is Kind.CHAT else "auto"


def place(settings: ServeSettings, machine: Machine, engine: str) -> Placement:
    """Divide the machine among ``--workers`` replicas. Raises UsageError for what no machine or not this one can do."""
    if settings.workers < 1:
        raise UsageError(f"--workers {settings.workers} must be at least 1")
    if settings.tensor_parallel_size < 1:
        raise UsageError(f"--tensor-parallel-size {settings.tensor_parallel_size} must be at least 1")
    return _on_gpus(settings, machine, engine) if machine.gpus else _on_cores(settings, machine, engine)


def _on_gpus(settings: ServeSettings, machine: Machine, engine: str) -> Placement:
    gpus = machine.gpus
    each = settings.tensor_parallel_size if engine == "vllm" else 1
    if each > len(gpus):
        raise UsageError(f"--tensor-parallel-size {each}: this machine has {_count(len(gpus), 'GPU')}; lower it")
    room = len(gpus) // each
    replicas = min(settings.workers, room)
    notes = []
    if settings.workers > room:
        asked = settings.workers / room * (settings.gpu_memory_utilization or _UTILIZATION)
        why = f"; {settings.workers} would ask for {asked:.1f} × their memory" if engine == "vllm" else ""
        notes.append(
            f"--workers {settings.workers} becomes {room}: a replica takes {_count(each, 'GPU')} of "
            f"{_count(len(gpus), 'GPU')}{why}"
        )
    shares = [Share(machine.cores, gpus[i * each : (i + 1) * each]) for i in range(replicas)]
    return Placement(tuple(shares), tuple(notes))


def _on_cores(settings: ServeSettings, machine: Machine, engine: str) -> Placement:
    notes = []
    if engine == "vllm" and settings.tensor_parallel_size > 1:
        notes.append(f"--tensor-parallel-size {settings.tensor_parallel_size} has no effect: no GPU is to be seen here")
    if settings.workers > len(machine.cores):
        notes.append(
            f"--workers {settings.workers}: {settings.workers} replicas share {_count(len(machine.cores), 'core')}; "
            "more replicas than cores cost memory and gain nothing"
        )
    return Placement(tuple(Share(cores) for cores in divided(machine.cores, settings.workers)), tuple(notes))


def divided(cores: Sequence[int], replicas: int) -> list[tuple[int, ...]]:
    """Cores for each replica, as even as can be; where there are fewer cores than replicas, they are shared."""
    if replicas >= len(cores):
        return [(cores[i % len(cores)],) for i in range(replicas)]
    bounds = [round(i * len(cores) / replicas) for i in range(replicas + 1)]
    return [tuple(cores[low:high]) for low, high in itertools.pairwise(bounds)]


def ineffective(kind: Kind, settings: ServeSettings, engine: str) -> list[str]:
    """A line for each setting that was given and means nothing to ``engine``."""
    unset = ServeSettings()
    table = {**WITHOUT_EFFECT[engine], **WITHOUT_EFFECT.get(f"{engine} {kind}", {})}
    given = {key: getattr(settings, key) for key in table if getattr(settings, key) != getattr(unset, key)}
    where = "here" if engine == "auto" else f"on {engine}"
    return [f"--{key.replace('_', '-')} {value} has no effect {where}: {table[key]}" for key, value in given.items()]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
