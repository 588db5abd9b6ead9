"""Command lines of vLLM's OpenAI server. Pure."""

import json
from collections.abc import Mapping
from typing import Any

from loadstone.core.errors import UsageError
from loadstone.core.settings import ServeSettings
from loadstone.serve import prompts

_SERVER = "vllm.entrypoints.openai.api_server"
"""Its ``vllm`` command is missing from some builds; the module is in all of them."""
_ORIGINAL_RERANKER = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": [prompts.NO, prompts.YES],
    "is_original_qwen3_reranker": True,
}


def rerank_command(
    python: str, model: str, port: int, settings: ServeSettings, *, original: bool, on_cpu: bool
) -> list[str]:
    """Serve Qwen3-Reranker on ``port`` of the loopback.

    ``original``: the checkpoint is the language model as published, whose answers "yes" and "no" are made a classifier
    here, not one converted to a classifier beforehand. ``on_cpu``: vLLM's build for CPUs.
    """
    return [
        *(python, "-m", _SERVER, "--model", model, "--host", "127.0.0.1", "--port", str(port)),
        *("--runner", "pooling", "--chat-template", prompts.VLLM_TEMPLATE),
        *(("--hf-overrides", json.dumps(_ORIGINAL_RERANKER)) if original else ()),
        *_sizes(settings),
        # Compiling takes minutes on a CPU and gains little; half precision is no faster there.
        *(("--enforce-eager", "--dtype", "float32") if on_cpu else ()),
    ]


def chat_command(python: str, model: str, port: int, settings: ServeSettings, *, on_cpu: bool = False) -> list[str]:
    """Serve a chat model on ``port`` of the loopback. ``on_cpu``: vLLM's build for CPUs."""
    return [
        *(python, "-m", _SERVER, "--model", model, "--host", "127.0.0.1", "--port", str(port)),
        *_sizes(settings),
        *(("--enforce-eager",) if on_cpu else ()),
    ]


def check_int8(model: str, config: Mapping[str, Any]) -> None:
    """For ``--quantization int8``: raises UsageError unless ``config``, the checkpoint's config.json, says that its
    weights are 8-bit integers. vLLM runs such a checkpoint; it does not make one."""
    told = config.get("quantization_config")
    if not isinstance(told, Mapping):
        remedy = "give a W8A8 or GPTQ-Int8 checkpoint of it, or take --engine transformers"
        raise UsageError(f"--quantization int8: {model} is not quantised, and vLLM does not do it on loading; {remedy}")
    if not _is_int8(told):
        method = told.get("quant_method", "something else")
        raise UsageError(f"--quantization int8: {model} is quantised by {method}, not to INT8; leave the flag out")


def _is_int8(quantization: Mapping[str, Any]) -> bool:
    if quantization.get("load_in_8bit"):
        return True
    if quantization.get("quant_method") != "compressed-tensors":
        return quantization.get("bits") == 8
    weights = [group.get("weights") or {} for group in (quantization.get("config_groups") or {}).values()]
    return bool(weights) and all(one.get("num_bits") == 8 and one.get("type") == "int" for one in weights)


def _sizes(settings: ServeSettings) -> list[str]:
    """``--quantization int8`` is not handed on: the checkpoint says itself that it is INT8 (``check_int8``)."""
    given = {
        "--max-num-seqs": settings.max_num_seqs,
        "--max-num-batched-tokens": settings.max_num_batched_tokens,
        "--max-model-len": settings.max_model_len,
        "--gpu-memory-utilization": settings.gpu_memory_utilization,
        "--tensor-parallel-size": settings.tensor_parallel_size,
        "--quantization": "" if settings.quantization == "int8" else settings.quantization,
    }
    return [text for flag, value in given.items() if value for text in (flag, str(value))]
