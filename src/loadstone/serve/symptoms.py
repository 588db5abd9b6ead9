"""What engines write when they fail, and what it means: tables for ``diagnosis``. Data alone.

The tables go from the particular to the general, and the first entry that matches counts: CUDA's complaint about memory
is also in the log of an engine whose context is too long, and there it is the lesser advice. Texts are those of vLLM
0.32, torch 2.13, transformers 5.23, sentence-transformers, huggingface_hub and llama.cpp, with the older wordings that
are still about.
"""

import re
from dataclasses import dataclass

_LESS_MEMORY = "lower --max-concurrency (MAX_CONCURRENT) to 2, --max-output-tokens (max_tokens) to 256"
_LESS_GPU_MEMORY = f"{_LESS_MEMORY}, or --gpu-memory-utilization"
LESS_HOST_MEMORY = f"{_LESS_MEMORY}, --workers, or take --quantization int8 or a smaller model"
_LOCAL_MODEL = "give --model the folder of a model that was downloaded before"
_WITHOUT_GPU = "nvidia-smi must list one; without a GPU take --engine transformers or --engine llamacpp"
_INNER_DIED = (
    "an inner process of the engine died, of an error in its log or killed by the kernel for want of memory "
    "(dmesg tells)"
)
_PORT_TAKEN = "its port is taken by another process"
_WHO_LISTENS = "start again; ss -ltnp tells who listens"


@dataclass(frozen=True)
class Symptom:
    """What in a log tells a cause."""

    pattern: re.Pattern[str]
    cause: str
    """The pattern's groups stand in for {0}, {1}, …, in the remedy too."""
    remedy: str


def _symptom(pattern: str, cause: str, remedy: str) -> Symptom:
    return Symptom(re.compile(pattern, re.IGNORECASE), cause, remedy)


ANYWHERE: tuple[Symptom, ...] = (
    # -- memory, where the engine itself says how much
    _symptom(
        r"Free memory on device \S* ?\(([\d.]+)/([\d.]+) GiB\) on startup is less than desired GPU memory utilization"
        r" \(([\d.]+)",
        "only {0} of the GPU's {1} GiB are free, less than --gpu-memory-utilization {2} asks for",
        "lower it, or end what else runs on that GPU (nvidia-smi lists it)",
    ),
    _symptom(
        r"Available memory on node .{0,200}?(?:is less than desired CPU memory|is less than requested memory for kv)",
        "the machine has less free memory than the engine would reserve",
        "lower --gpu-memory-utilization, which on a CPU is the share of the machine's memory",
    ),
    _symptom(
        r"max seq len \((\d+)\).{0,200}?(?:estimated maximum model length is|can be stored in KV cache \()\s?(\d+)",
        "a sequence of {0} tokens needs more KV cache than there is",
        "lower --max-model-len to {1}, or raise --gpu-memory-utilization",
    ),
    _symptom(
        r"larger than the (?:available KV cache memory|maximum number of tokens that can be stored in KV cache)",
        "the model's longest sequence needs more KV cache than there is",
        "lower --max-model-len, or raise --gpu-memory-utilization",
    ),
    _symptom(
        r"No available memory for the cache blocks",
        "the model leaves no memory for the KV cache",
        "raise --gpu-memory-utilization where the GPU has more to give, lower --max-num-seqs or --max-model-len, "
        "or take an INT8 or smaller model",
    ),
    _symptom(
        r"max_model_len \((\d+)\) is greater than the derived max_model_len \(\w+=(\d+)",
        "--max-model-len {0} is longer than the model, which takes {1} tokens",
        "lower it to {1}",
    ),
    _symptom(
        r"(?:CUDA|HIP|XPU) out of memory|(?:CUDA|HIP) error: out of memory|torch\.(?:cuda\.)?OutOfMemoryError"
        r"|cudaMalloc failed: out of memory|(?:unable|failed) to allocate (?:CUDA|ROCm|Vulkan|Metal)\w*"
        r"|CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED",
        "CUDA out of memory",
        _LESS_GPU_MEMORY,
    ),
    _symptom(
        r"DefaultCPUAllocator: can't allocate memory|std::bad_alloc|Cannot allocate memory"
        r"|failed to allocate (?:buffer|compute|CPU|output buffer|context|graph)"
        r"|unable to allocate (?:CPU|backend) buffer",
        "the machine's memory does not suffice",
        LESS_HOST_MEMORY,
    ),
    # -- GPUs
    _symptom(
        r"World size \((\d+)\) is larger than the number of available GPUs \((\d+)\)",
        "--tensor-parallel-size {0}, but there are {1} GPUs",
        "lower it to {1} at most",
    ),
    _symptom(
        r"(\d+)\) must be divisible by tensor parallel size \((\d+)\)",
        "--tensor-parallel-size {1} does not divide the model's {0} attention heads",
        "take a divisor of {0}",
    ),
    _symptom(
        r"Torch not compiled with CUDA enabled|Found no NVIDIA driver|No CUDA GPUs are available"
        r"|Failed to infer device type|CUDA driver version is insufficient|CUDA-capable device\(s\) is/are busy"
        r"|no CUDA-capable device is detected|libcuda\.so\.1: cannot open",
        "no GPU can be used",
        _WITHOUT_GPU,
    ),
    _symptom(
        r"CUDA error: (no kernel image is available[^\n]*)",
        "the engine was not built for this GPU ({0})",
        "install a build of torch or vllm for its compute capability",
    ),
    _symptom(
        r"CUDA error: ([^\n]+)|(?:NCCL|ncclUnhandled)[^\n]*error[^\n]*|uncorrectable ECC error",
        "the GPU failed ({0})",
        "check that it works: nvidia-smi, and dmesg for NVRM: Xid",
    ),
    # -- the model
    _symptom(
        r"Unknown quantization (?:method|type)[:,]? (?:got )?'?(\w+)|(\w+) quantization is currently not supported in",
        "this engine cannot do the quantization {0}",
        "take a checkpoint in a format that it can, such as compressed-tensors W8A8 or GPTQ-Int8 on vLLM, torchao int8 "
        "on transformers, Q8_0 on llama.cpp",
    ),
    _symptom(
        r"Quantization method specified in the model config \((\w+)\) does not match[^\n(]*\((\w+)\)",
        "the checkpoint is quantised as {0}, not {1}",
        "leave --quantization out: the checkpoint says it itself",
    ),
    _symptom(
        r"Cannot find the config file for (\w+)",
        "the checkpoint is not quantised as {0}",
        "leave --quantization out, or take a checkpoint that is",
    ),
    _symptom(
        r"requires? (?:the latest |an? )?[`']?(bitsandbytes|torchao|compressed-tensors|gptqmodel|optimum|accelerate)\b",
        "the quantised model needs {0}, which is not installed",
        "pip install {0}",
    ),
    _symptom(
        r"gated repo|401 Client Error|Access to model \S+ is restricted",
        "the hub gives out this model only to those who have agreed to its licence",
        "agree there and set HF_TOKEN, or give --model a local folder",
    ),
    _symptom(
        r"Repo id must be in the form|FileNotFoundError: Path (\S+) not found|failed to open GGUF file '?([^'\n]+)"
        r"|No such file or directory: '([^'\n]+(?:config\.json|\.gguf|\.safetensors))'",
        "there is no model at the path that --model names",
        "check the path; it must be a folder with a config.json, or for llama.cpp a GGUF file",
    ),
    _symptom(
        r"We couldn't connect to '|Cannot find an appropriate cached snapshot folder|LocalEntryNotFoundError"
        r"|outgoing traffic has been disabled|OfflineModeIsEnabled|Cannot reach https?://huggingface"
        r"|Failed to resolve 'huggingface|is not a local folder and is not a valid model identifier"
        r"|Invalid repository ID or local directory|RepositoryNotFoundError",
        "the model is neither a local folder nor to be had from the hub",
        f"{_LOCAL_MODEL}, or check its name and the network",
    ),
    _symptom(
        r"Unrecognized model in (\S+?)\. |does not appear to have a file named ([\w.]+)",
        "the folder that --model names holds no complete model ({0})",
        "it must hold config.json, the tokenizer and the weights",
    ),
    _symptom(
        r"does not recognize this architecture|Model architectures \[([^\]]*)\] (?:are not supported|failed)"
        r"|unknown model architecture: '(\w+)'",
        "this version of the engine does not know the model's architecture {0}",
        "update the engine, or take another --engine",
    ),
    _symptom(
        r"invalid magic characters|llama_model_loader: failed to load model|error loading model: ([^\n]+)",
        "the file that --model names is no GGUF model that llama.cpp can read",
        "download or convert it again",
    ),
    # -- what is around it
    _symptom(r"couldn't bind HTTP server socket", _PORT_TAKEN, _WHO_LISTENS),
    _symptom(
        r"(?:Engine core|Worker) proc \S+ died unexpectedly|Failed core proc\(s\): \{[^}]*-9",
        _INNER_DIED,
        LESS_HOST_MEMORY,
    ),
)

LAST_WORDS: tuple[Symptom, ...] = (
    # Engines live well with what they have complained of here in passing: it counts where it is the end alone.
    _symptom(
        r"No module named '?vllm\b",
        "vllm is not installed in that interpreter",
        "pip install vllm, name an interpreter that has it (--vllm-python), or take --engine transformers",
    ),
    _symptom(r"No module named '?([\w.]+)", "{0} is not installed", "pip install the package that holds it"),
    _symptom(r"address already in use|Errno 98\b", _PORT_TAKEN, _WHO_LISTENS),
    _symptom(r"Too many open files", "too many open files", "raise the limit (ulimit -n)"),
    _symptom(r"No space left on device", "a disk is full", "make room; /dev/shm counts (docker run --shm-size)"),
    _symptom(r"EngineDeadError: EngineCore encountered an issue", _INNER_DIED, LESS_HOST_MEMORY),
    _symptom(r"^MemoryError\b", "the machine's memory does not suffice", LESS_HOST_MEMORY),
)
