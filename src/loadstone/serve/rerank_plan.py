"""What one replica of the rerank service runs with: settings, model and machine made one. Pure."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from loadstone.core.errors import UsageError
from loadstone.core.settings import ServeSettings
from loadstone.serve.batcher import BatchSettings
from loadstone.serve.engines.vllm import check_int8
from loadstone.serve.planning import Machine
from loadstone.serve.rerank_advice import size_of

ENGINES = ("auto", "vllm", "transformers", "cross-encoder")
ORIGINAL = "Qwen3ForCausalLM"
"""Architecture of Qwen3-Reranker as it is published."""
_QWEN = (ORIGINAL, "Qwen3ForSequenceClassification")
_LIMIT_TOKENS = 8192
"""Query, document and prompt where nothing is asked for: what the model's authors use."""
_CPU_BATCH_TOKENS = 2048
"""A CPU gains nothing from more at once: its caches are full, and a short request would wait for seconds."""
_UTILIZATION = 0.9
_TOLD = (
    *("engine", "quantization", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization"),
    *("tensor_parallel_size", "max_workers", "max_model_len"),
)


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that a checkpoint's ``config.json`` names first."""
    return str(next(iter(config.get("architectures") or ()), "model of unknown architecture"))


def in_force(
    settings: ServeSettings, config: Mapping[str, Any], machine: Machine, batch: BatchSettings
) -> ServeSettings:
    """``settings`` with a value for everything that has an effect; ``batch`` has those where nothing is given.

    Raises UsageError for what this model or engine cannot do.
    """
    engine = choose_engine(settings.engine, architecture_of(config), machine)
    if settings.quantization and engine != "vllm":
        raise UsageError(
            f"--quantization {settings.quantization}: --engine {engine} runs rerankers as they are; leave it out"
        )
    if settings.quantization == "int8":
        check_int8(settings.model, config)
    on_gpus = engine == "vllm" and bool(machine.gpus)
    batch_tokens = batch.max_tokens if machine.gpus else _CPU_BATCH_TOKENS
    return dataclasses.replace(
        settings,
        engine=engine,
        max_model_len=limit_tokens(settings.max_model_len, config),
        max_num_seqs=settings.max_num_seqs or batch.max_items,
        max_num_batched_tokens=settings.max_num_batched_tokens or batch_tokens,
        gpu_memory_utilization=(settings.gpu_memory_utilization or _UTILIZATION) if on_gpus else None,
        tensor_parallel_size=settings.tensor_parallel_size if on_gpus else 1,
        max_workers=settings.max_workers or settings.threads or batch.prepare_threads,
    )


def choose_engine(asked: str, architecture: str, machine: Machine) -> str:
    """The engine that ``asked`` names, or the best for the model. Raises UsageError where it cannot run the model."""
    if asked == "auto" and architecture in _QWEN:
        return "vllm" if machine.gpus and machine.vllm else "transformers"
    engine = "cross-encoder" if asked == "auto" else asked
    if architecture in _QWEN and engine == "cross-encoder":
        raise UsageError(f"--engine {engine} cannot run a {architecture}: take --engine transformers or vllm")
    if architecture not in _QWEN and engine != "cross-encoder":
        raise UsageError(
            f"--engine {engine} runs Qwen3-Reranker, and this is a {architecture}: take --engine cross-encoder"
        )
    return engine


def limit_tokens(asked: int | None, config: Mapping[str, Any]) -> int:
    """The longest sequence. Raises UsageError where the model cannot take what is asked for."""
    most = int(config.get("max_position_embeddings", _LIMIT_TOKENS))
    if asked is not None and asked > most:
        raise UsageError(f"--max-model-len {asked}: the model takes {most} tokens at most")
    return asked or min(_LIMIT_TOKENS, most)


def told(settings: ServeSettings) -> dict[str, Any]:
    """What /health says of settings in force."""
    return {"model_size": size_of(settings.model), **{key: getattr(settings, key) for key in _TOLD}}
