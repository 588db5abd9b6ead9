"""What the rerank guide's bands say about settings: one line for each that lies outside. Pure.

The bands: a GPU's memory used to 0.6–0.7 is conservative, 0.8–0.9 balanced, more is aggressive; each size of
Qwen3-Reranker has its memory and its number of sequences; 24 GB carry 512 to 1024 sequences.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loadstone.core.settings import ServeSettings
from loadstone.serve.planning import Machine

_LEAST_UTILIZATION, _MOST_UTILIZATION = 0.6, 0.9
_GB = 1e9
_SMALL_GPU_GB, _ITS_SEQUENCES = 24.0, 1024


@dataclass(frozen=True)
class Size:
    """One row of the guide's table."""

    model: str
    memory_gb: tuple[int, int]
    sequences: tuple[int, int]


SIZES: Mapping[str, Size] = {
    "0.6B": Size("Qwen/Qwen3-Reranker-0.6B", (2, 4), (256, 512)),
    "4B": Size("Qwen/Qwen3-Reranker-4B", (8, 12), (512, 1024)),
    "8B": Size("Qwen/Qwen3-Reranker-8B", (16, 24), (1024, 2048)),
}


def size_of(model: str) -> str | None:
    """The size that a Qwen3-Reranker's name ends with, None for any other model."""
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    return next((size for size in SIZES if name == f"qwen3-reranker-{size.lower()}"), None)


def advice(settings: ServeSettings, model_size: str | None, machine: Machine) -> list[str]:
    """A line for each setting outside its band; what is not given is not judged. ``model_size`` as in ``SIZES``."""
    return [
        *_on_utilization(settings.gpu_memory_utilization),
        *_on_sequences(settings.max_num_seqs, model_size),
        *_on_memory(settings, model_size, machine),
    ]


def _on_utilization(share: float | None) -> Iterator[str]:
    if share is None or _LEAST_UTILIZATION <= share <= _MOST_UTILIZATION:
        return
    if share > _MOST_UTILIZATION:
        yield f"--gpu-memory-utilization {share:g} is aggressive: watch for out of memory, and lower it where it occurs"
    else:
        yield f"--gpu-memory-utilization {share:g} is below even the conservative 0.6–0.7: less is computed at once"


def _on_sequences(sequences: int | None, model_size: str | None) -> Iterator[str]:
    if sequences is None or model_size is None:
        return
    low, high = SIZES[model_size].sequences
    where = f"--max-num-seqs {sequences}: {low}–{high} are recommended for {model_size}"
    if sequences > high:
        yield f"{where}; more take memory and seldom answer sooner"
    elif sequences < low:
        yield f"{where}; raise it where responses are slow"


def _on_memory(settings: ServeSettings, model_size: str | None, machine: Machine) -> Iterator[str]:
    if not machine.gpus or machine.gpu_memory_bytes is None:
        return
    memory_gb = machine.gpu_memory_bytes / _GB * settings.tensor_parallel_size
    usable_gb = memory_gb * (settings.gpu_memory_utilization or _MOST_UTILIZATION)
    if model_size is not None and usable_gb < SIZES[model_size].memory_gb[0]:
        low, high = SIZES[model_size].memory_gb
        yield f"Qwen3-Reranker {model_size} needs {low}–{high} GB and may use {usable_gb:.0f}: take a smaller size"
    if settings.max_num_seqs and settings.max_num_seqs > _ITS_SEQUENCES and memory_gb <= _SMALL_GPU_GB:
        yield f"--max-num-seqs {settings.max_num_seqs}: {memory_gb:.0f} GB of GPU memory carry 512–1024 sequences"
