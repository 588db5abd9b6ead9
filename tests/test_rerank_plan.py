"""What a rerank replica would run with, and what is said about its settings: tables."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest

from loadstone.core.errors import UsageError
from loadstone.core.settings import ServeSettings
from loadstone.serve import prompts
from loadstone.serve.batching import BatchSettings
from loadstone.serve.engines.checkpoint import read_config
from loadstone.serve.engines.vllm import rerank_command
from loadstone.serve.planning import Machine, place
from loadstone.serve.rerank import parse
from loadstone.serve.rerank_advice import SIZES, advice, size_of
from loadstone.serve.rerank_plan import choose_engine, in_force, told

CPU = Machine(cores=(0, 1))
GPU_24 = Machine(cores=(0, 1), gpus=("0",), gpu_memory_bytes=24_000_000_000, vllm=True)
TWO_24 = Machine(cores=(0, 1), gpus=("0", "1"), gpu_memory_bytes=24_000_000_000, vllm=True)
EIGHT_80 = Machine(cores=(0, 1), gpus=tuple("01234567"), gpu_memory_bytes=80_000_000_000, vllm=True)
QWEN = {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 40_960}
BERT = {"architectures": ["BertForSequenceClassification"], "max_position_embeddings": 512}

PRODUCTION = ServeSettings(
    workers=2, max_num_seqs=1024, max_num_batched_tokens=32_768, gpu_memory_utilization=0.9, max_workers=8
)
SCARCE = ServeSettings(
    workers=1, max_num_seqs=256, max_num_batched_tokens=8192, gpu_memory_utilization=0.6, max_workers=2
)
FAST = ServeSettings(
    workers=4,
    tensor_parallel_size=2,
    max_num_seqs=2048,
    max_num_batched_tokens=65_536,
    gpu_memory_utilization=0.95,
    max_workers=16,
)
AGGRESSIVE = "--gpu-memory-utilization 0.95 is aggressive: watch for out of memory, and lower it where it occurs"


@pytest.mark.parametrize(
    ("settings", "size", "machine", "lines"),
    [
        (PRODUCTION, "4B", GPU_24, []),
        (PRODUCTION, "4B", CPU, []),
        (SCARCE, "0.6B", GPU_24, []),
        (FAST, "8B", EIGHT_80, [AGGRESSIVE]),
        (
            PRODUCTION,
            "0.6B",
            GPU_24,
            ["--max-num-seqs 1024: 256–512 are recommended for 0.6B"],
        ),  # the environment block
        (ServeSettings(), "0.6B", GPU_24, []),
        (ServeSettings(gpu_memory_utilization=0.75), "0.6B", GPU_24, []),
        (ServeSettings(gpu_memory_utilization=0.5), None, GPU_24, ["--gpu-memory-utilization 0.5 is below"]),
        (ServeSettings(max_num_seqs=128), "0.6B", CPU, ["--max-num-seqs 128: 256–512 are recommended for 0.6B; raise"]),
        (ServeSettings(max_num_seqs=128), None, CPU, []),
        (ServeSettings(max_num_seqs=2048), "8B", GPU_24, ["--max-num-seqs 2048: 24 GB of GPU memory carry 512–1024"]),
        (ServeSettings(max_num_seqs=2048, tensor_parallel_size=2), "8B", TWO_24, []),
        (
            ServeSettings(gpu_memory_utilization=0.6),
            "8B",
            GPU_24,
            ["Qwen3-Reranker 8B needs 16–24 GB and may use 14: take a smaller size"],
        ),
    ],
)
def test_advice(settings: ServeSettings, size: str | None, machine: Machine, lines: list[str]) -> None:
    said = advice(settings, size, machine)
    assert len(said) == len(lines)
    assert all(line.startswith(start) for line, start in zip(said, lines, strict=True)), said


@pytest.mark.parametrize("settings", [PRODUCTION, SCARCE, FAST])
@pytest.mark.parametrize("machine", [CPU, TWO_24, EIGHT_80])
def test_no_recommended_configuration_is_refused(settings: ServeSettings, machine: Machine) -> None:
    engine = choose_engine("auto", "Qwen3ForCausalLM", machine)
    assert place(settings, machine, engine).shares
    final = in_force(settings, QWEN, machine, BatchSettings())
    assert (final.max_num_seqs, final.max_workers) == (settings.max_num_seqs, settings.max_workers)
    assert told(final)["tensor_parallel_size"] == (settings.tensor_parallel_size if machine.gpus else 1)


def test_more_tensor_parallel_than_gpus_is_refused() -> None:
    with pytest.raises(UsageError, match="--tensor-parallel-size 2: this machine has 1 GPU"):
        place(FAST, GPU_24, "vllm")


def test_the_high_performance_configuration_would_run_this() -> None:
    final = in_force(FAST, QWEN, EIGHT_80, BatchSettings())
    line = rerank_command("python3", SIZES["8B"].model, 8100, final, original=True, on_cpu=False)
    flags = dict(zip(line[3::2], line[4::2], strict=True))
    overrides = json.loads(flags.pop("--hf-overrides"))
    assert line[:3] == ["python3", "-m", "vllm.entrypoints.openai.api_server"]
    assert flags == {
        "--model": "Qwen/Qwen3-Reranker-8B",
        "--host": "127.0.0.1",
        "--port": "8100",
        "--runner": "pooling",
        "--chat-template": prompts.VLLM_TEMPLATE,
        "--max-num-seqs": "2048",
        "--max-num-batched-tokens": "65536",
        "--max-model-len": "8192",
        "--gpu-memory-utilization": "0.95",
        "--tensor-parallel-size": "2",
    }
    assert overrides == {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True,
    }


def test_a_converted_checkpoint_is_taken_as_it_is() -> None:
    line = rerank_command("python3", "model", 8100, ServeSettings(), original=False, on_cpu=True)
    assert "--hf-overrides" not in line
    assert "--chat-template" in line
    assert line[-3:] == ["--enforce-eager", "--dtype", "float32"]


@pytest.mark.parametrize("instruction", ["", "Find the city"])
def test_the_template_is_the_prompt(instruction: str) -> None:
    messages = [{"role": "query", "content": "who?"}, {"role": "document", "content": "me {{ 1 }}"}]
    told = {"instruction": instruction} if instruction else {}
    rendered = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(prompts.VLLM_TEMPLATE)
    head = prompts.before_document("who?", instruction)
    assert rendered.render(messages=messages, **told) == f"{prompts.PREFIX}{head}me {{{{ 1 }}}}{prompts.SUFFIX}"


@pytest.mark.parametrize(
    ("asked", "architecture", "machine", "engine"),
    [
        ("auto", "Qwen3ForCausalLM", GPU_24, "vllm"),
        ("auto", "Qwen3ForCausalLM", CPU, "transformers"),
        ("auto", "Qwen3ForSequenceClassification", CPU, "transformers"),
        ("auto", "XLMRobertaForSequenceClassification", GPU_24, "cross-encoder"),
        ("vllm", "Qwen3ForCausalLM", CPU, "vllm"),
    ],
)
def test_the_engine(asked: str, architecture: str, machine: Machine, engine: str) -> None:
    assert choose_engine(asked, architecture, machine) == engine


@pytest.mark.parametrize(
    ("settings", "config", "says"),
    [
        (ServeSettings(engine="vllm"), BERT, "take --engine cross-encoder"),
        (ServeSettings(engine="transformers"), {}, "this is a model of unknown architecture"),
        (ServeSettings(engine="cross-encoder"), QWEN, "take --engine transformers or vllm"),
        (ServeSettings(max_model_len=50_000), QWEN, "--max-model-len 50000: the model takes 40960 tokens at most"),
        (ServeSettings(quantization="int8"), QWEN, "runs rerankers as they are; leave it out"),
        (ServeSettings(engine="vllm", quantization="int8"), QWEN, "give a W8A8 or GPTQ-Int8 checkpoint"),
    ],
)
def test_what_cannot_run(settings: ServeSettings, config: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        in_force(settings, config, CPU, BatchSettings())


def test_an_int8_checkpoint_says_so_itself() -> None:
    config = QWEN | {"quantization_config": {"quant_method": "gptq", "bits": 8}}
    final = in_force(ServeSettings(quantization="int8"), config, GPU_24, BatchSettings())
    assert "--quantization" not in rerank_command("python3", "m", 1, final, original=True, on_cpu=False)


def test_what_is_not_given_has_a_value_in_force() -> None:
    final = in_force(ServeSettings(model="Qwen/Qwen3-Reranker-4B", threads=3), QWEN, CPU, BatchSettings())
    assert told(final) == {
        "model_size": "4B",
        "engine": "transformers",
        "quantization": "",
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
        "gpu_memory_utilization": None,
        "tensor_parallel_size": 1,
        "max_workers": 3,
        "max_model_len": 8192,
    }
    on_gpu = told(in_force(ServeSettings(), QWEN, GPU_24, BatchSettings()))
    assert (on_gpu["gpu_memory_utilization"], on_gpu["max_num_batched_tokens"]) == (0.9, 16_384)


@pytest.mark.parametrize(
    ("model", "size"),
    [("Qwen/Qwen3-Reranker-0.6B", "0.6B"), ("/models/qwen3-reranker-8b/", "8B"), ("BAAI/bge-reranker-v2-m3", None)],
)
def test_the_size_is_in_the_name(model: str, size: str | None) -> None:
    assert size_of(model) == size


def test_a_replica_s_command_line() -> None:
    words = "--port 8001 --model m --engine vllm --max-num-seqs 8 --gpu-memory-utilization 0.6 --max-workers 4"
    settings = ServeSettings(
        model="m",
        engine="vllm",
        max_num_seqs=8,
        gpu_memory_utilization=0.6,
        max_workers=4,
        vllm_python="/usr/bin/python3",
    )
    assert parse([*words.split(), "--vllm-python", "/usr/bin/python3"]) == (settings, 8001)


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read_config(str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="has no config"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not JSON"):
        read_config(str(tmp_path))
