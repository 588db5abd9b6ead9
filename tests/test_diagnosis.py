"""From an engine's exit status and the end of its log to one line: texts as the engines really write them."""

import pytest

from loadstone.serve.diagnosis import Diagnosis, diagnose

VLLM = "(EngineCore_DP0 pid=83) ERROR 10-25 13:08:43 [core.py:708] "
LESS = "lower --max-concurrency (MAX_CONCURRENT) to 2, --max-output-tokens (max_tokens) to 256"
GPU_LESS = f"CUDA out of memory: {LESS}, or --gpu-memory-utilization"
HOST_LESS = f"{LESS}, --workers, or take --quantization int8 or a smaller model"
KILLED = f"killed with SIGKILL, most likely by the kernel for want of memory (dmesg tells): {HOST_LESS}"
NO_GPU = "no GPU can be used: nvidia-smi must list one; without a GPU take --engine transformers or --engine llamacpp"
NO_HUB = (
    "the model is neither a local folder nor to be had from the hub: give --model the folder of a model that was "
    "downloaded before, or check its name and the network"
)
NO_PATH = (
    "there is no model at the path that --model names: check the path; it must be a folder with a config.json, or for "
    "llama.cpp a GGUF file"
)
SEE_ABOVE = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"

MEMORY = [
    (
        f"{VLLM}ValueError: Free memory on device cuda:0 (7.34/139.72 GiB) on startup is less than desired GPU memory "
        "utilization (0.9, 125.75 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        "only 7.34 of the GPU's 139.72 GiB are free, less than --gpu-memory-utilization 0.9 asks for: lower it, or end "
        "what else runs on that GPU (nvidia-smi lists it)",
    ),
    (
        "ValueError: Free memory on device (31.44/47.38 GiB) on startup is less than desired GPU memory utilization "
        "(0.95, 45.01 GiB).",
        "only 31.44 of the GPU's 47.38 GiB are free, less than --gpu-memory-utilization 0.95 asks for: lower it, or "
        "end what else runs on that GPU (nvidia-smi lists it)",
    ),
    (
        f"{VLLM}ValueError: Available memory on node 0 (3.10/31.00 GiB) on startup is less than desired CPU memory "
        "utilization (0.92, 28.52 GiB).",
        "the machine has less free memory than the engine would reserve: lower --gpu-memory-utilization, which on a "
        "CPU is the share of the machine's memory",
    ),
    (
        f"{VLLM}ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
        f"initializing the engine\n{SEE_ABOVE}",
        "the model leaves no memory for the KV cache: raise --gpu-memory-utilization where the GPU has more to give, "
        "lower --max-num-seqs or --max-model-len, or take an INT8 or smaller model",
    ),
    (
        f"{VLLM}ValueError: To serve at least one request with the model's max seq len (40960), (5.62 GiB KV cache is "
        "needed, which is larger than the available KV cache memory (1.3 GiB). Based on the available memory, the "
        "estimated maximum model length is 9488. Try increasing `gpu_memory_utilization`",
        "a sequence of 40960 tokens needs more KV cache than there is: lower --max-model-len to 9488, or raise "
        "--gpu-memory-utilization",
    ),
    (
        "ValueError: The model's max seq len (4096) is larger than the maximum number of tokens that can be stored in "
        "KV cache (3664). Try increasing `gpu_memory_utilization` or decreasing `max_model_len`",
        "a sequence of 4096 tokens needs more KV cache than there is: lower --max-model-len to 3664, or raise "
        "--gpu-memory-utilization",
    ),
    (
        f"{VLLM}ValueError: To serve at least one request with the model's max seq len (40960), (5.62 GiB KV cache is "
        "needed, which is larger than the available KV cache memory (0.0 GiB). Try increasing",
        "the model's longest sequence needs more KV cache than there is: lower --max-model-len, or raise "
        "--gpu-memory-utilization",
    ),
    (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 22.00 MiB. GPU 0 has a total capacity of 23.65 "
        "GiB of which 11.06 MiB is free.",
        GPU_LESS,
    ),
    ("RuntimeError: CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously", GPU_LESS),
    (
        f"{VLLM}RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try "
        "lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine.",
        GPU_LESS,
    ),
    (
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9866.00 MiB on device 1: cudaMalloc failed: out of "
        "memory\nggml_gallocr_reserve_n: failed to allocate CUDA1 buffer of size 10345253120",
        GPU_LESS,
    ),
    ("llama_model_load: error loading model: unable to allocate CUDA0 buffer", GPU_LESS),
    (
        "llama_init_from_model: failed to initialize the context: failed to allocate compute pp buffers",
        f"the machine's memory does not suffice: {HOST_LESS}",
    ),
    (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 400000000000000 bytes. Error code 12 (Cannot allocate memory)",
        f"the machine's memory does not suffice: {HOST_LESS}",
    ),
    ("Traceback (most recent call last):\nMemoryError", f"the machine's memory does not suffice: {HOST_LESS}"),
    (
        "(EngineCore pid=8) ERROR 11-20 13:39:25 [multiproc_executor.py:315] Worker proc VllmWorker-0 died "
        f"unexpectedly (exit code: None), shutting down executor.\n{VLLM}RuntimeError: Executor failed.",
        "an inner process of the engine died, of an error in its log or killed by the kernel for want of memory (dmesg "
        f"tells): {HOST_LESS}",
    ),
]

MODEL = [
    (
        "OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the "
        "cached files.\nCheck your internet connection or see how to run the library in offline mode",
        NO_HUB,
    ),
    (
        "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder for the "
        "specified revision on the local disk and outgoing traffic has been disabled.",
        NO_HUB,
    ),
    ("OSError: Qwen/Nope is not a local folder and is not a valid model identifier listed on 'https://hugg…", NO_HUB),
    (
        "OSError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/no/folder'. Use `repo_type` "
        "argument if needed.",
        NO_PATH,
    ),
    ("FileNotFoundError: Path /nonexistent/folder not found", NO_PATH),
    (
        "0.00.010.216 E gguf_init_from_file: failed to open GGUF file '/no.gguf' (No such file or directory)\n"
        "0.00.010.413 E llama_model_load: error loading model: llama_model_loader: failed to load model from /no.gguf\n"
        "RuntimeError: Failed to init server, please check the input params.",
        NO_PATH,
    ),
    (
        "ValueError: Unrecognized model in /models/empty. Should have a `model_type` key in its config.json.",
        "the folder that --model names holds no complete model (/models/empty): it must hold config.json, the "
        "tokenizer and the weights",
    ),
    (
        "gguf_init_from_file_impl: invalid magic characters: 'not ', expected 'GGUF'\n",
        "the file that --model names is no GGUF model that llama.cpp can read: download or convert it again",
    ),
    (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, Unknown "
        "quantization method: nope. Must be one of ['awq', 'fp8']",
        "this engine cannot do the quantization nope: take a checkpoint in a format that it can, such as "
        "compressed-tensors W8A8 or GPTQ-Int8 on vLLM, torchao int8 on transformers, Q8_0 on llama.cpp",
    ),
    (
        "ValueError: bitsandbytes quantization is currently not supported in cpu.",
        "this engine cannot do the quantization bitsandbytes: take a checkpoint in a format that it can, such as "
        "compressed-tensors W8A8 or GPTQ-Int8 on vLLM, torchao int8 on transformers, Q8_0 on llama.cpp",
    ),
    (
        "  Value error, Cannot find the config file for awq [type=value_error, input_value=ArgsKwargs((), {})]",
        "the checkpoint is not quantised as awq: leave --quantization out, or take a checkpoint that is",
    ),
    (
        "Value error, User-specified max_model_len (99999) is greater than the derived max_model_len "
        "(max_position_embeddings=2048 or model_max_length=None in model's config.json).",
        "--max-model-len 99999 is longer than the model, which takes 2048 tokens: lower it to 2048",
    ),
    (
        "ImportError: Using `bitsandbytes` 8-bit quantization requires bitsandbytes: `pip install -U bitsandbytes`",
        "the quantised model needs bitsandbytes, which is not installed: pip install bitsandbytes",
    ),
    (
        "ValueError: Model architectures ['NoSuchLM'] are not supported for now.",
        "this version of the engine does not know the model's architecture 'NoSuchLM': update the engine, or take "
        "another --engine",
    ),
]

MACHINE = [
    ("AssertionError: Torch not compiled with CUDA enabled", NO_GPU),
    ("RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", NO_GPU),
    ("RuntimeError: No CUDA GPUs are available", NO_GPU),
    ("RuntimeError: Failed to infer device type, please set the environment variable", NO_GPU),
    (
        "ValueError: World size (4) is larger than the number of available GPUs (2) in this node.",
        "--tensor-parallel-size 4, but there are 2 GPUs: lower it to 2 at most",
    ),
    (
        "ValueError: Total number of attention heads (15) must be divisible by tensor parallel size (2).",
        "--tensor-parallel-size 2 does not divide the model's 15 attention heads: take a divisor of 15",
    ),
    (
        f"{VLLM}torch.AcceleratorError: CUDA error: an illegal memory access was encountered\nCompile with",
        "the GPU failed (an illegal memory access was encountered): check that it works: nvidia-smi, and dmesg for "
        "NVRM: Xid",
    ),
    (
        "python: Error while finding module specification for 'vllm.entrypoints.openai.api_server' "
        "(ModuleNotFoundError: No module named 'vllm')",
        "vllm is not installed in that interpreter: pip install vllm, name an interpreter that has it (--vllm-python), "
        "or take --engine transformers",
    ),
    (
        "ModuleNotFoundError: No module named 'torch'",
        "torch is not installed: pip install the package that holds it",
    ),
    (
        "0.00.003.341 E srv         start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 18933\n"
        "RuntimeError: Failed to init server, please check the input params.",
        "its port is taken by another process: start again; ss -ltnp tells who listens",
    ),
    ("OSError: [Errno 24] Too many open files: '/x'", "too many open files: raise the limit (ulimit -n)"),
    (
        "OSError: [Errno 28] No space left on device",
        "a disk is full: make room; /dev/shm counts (docker run --shm-size)",
    ),
    (
        "OSError: [Errno 98] error while attempting to bind on address ('127.0.0.1', 18935): address already in use",
        "its port is taken by another process: start again; ss -ltnp tells who listens",
    ),
]

DEAD = "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the"
LEAKED = "resource_tracker.py:254: UserWarning: There appear to be 1 leaked objects\n  warnings.warn('There appear …'\n"

NOT_KNOWN = [
    (1, "Traceback (most recent call last):\n  File \"x.py\"\nKeyError: 'weight'\n", "KeyError: 'weight'"),
    (1, f"{VLLM}AssertionError: odd\n(APIServer pid=7) {SEE_ABOVE}", "AssertionError: odd"),
    (0, f"{VLLM}AssertionError: odd\n(APIServer pid=7) ERROR [x.py:9] {DEAD} root cause.\n{LEAKED}", "AssertionError"),
    (1, "Traceback (most recent call last):\nValueError: first\n\nAssertionError\n", "AssertionError"),
    (
        1,
        "(APIServer pid=9) pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
        "(APIServer pid=9)   Value error, max_num_seqs is odd [type=value_error, input_value=Args]\n"
        "(APIServer pid=9)     For further information visit https://errors.pydantic.dev",
        "max_num_seqs is odd",
    ),
    (2, "usage: python [-h]\npython: error: unrecognized arguments: --nope\n\n", "python: error: unrecognized …"),
]


@pytest.mark.parametrize(("log", "line"), MEMORY + MODEL + MACHINE)
def test_a_known_failure_is_one_line_with_its_remedy(log: str, line: str) -> None:
    for end in ("", "\n", "\nINFO some later line\n"):
        assert str(diagnose(1, f"INFO an engine starts\n{log}{end}")) == line
    assert "\n" not in line


@pytest.mark.parametrize("status", [-9, 137])
def test_a_kill_without_a_word_is_the_kernels_for_want_of_memory(status: int) -> None:
    assert str(diagnose(status, "INFO 200 OK\n")) == KILLED


def test_an_inner_process_that_died_without_a_word_of_its_own() -> None:
    log = f"INFO 200 OK\n(APIServer pid=7) ERROR 11-20 14:13:05 [async_llm.py:906] {DEAD} root cause.\n{LEAKED}"
    said = "an inner process of the engine died, of an error in its log or killed by the kernel for want of memory"
    assert str(diagnose(0, log)) == f"{said} (dmesg tells): {HOST_LESS}"


def test_a_kill_after_words_of_memory_is_what_the_words_say() -> None:
    assert str(diagnose(-9, "torch.OutOfMemoryError: CUDA out of memory.")) == GPU_LESS


@pytest.mark.parametrize(
    ("status", "way"),
    [
        (3, "it ended with status 3"),
        (0, "it ended with status 0"),
        (-11, "it crashed with SIGSEGV"),
        (134, "it crashed with SIGABRT"),
        (255, "it ended with status 255"),
        (None, "it still ran"),
    ],
)
def test_without_a_known_text_it_is_the_way_it_ended_and_its_last_words(status: int | None, way: str) -> None:
    assert diagnose(status, "loading\n\n  nearly there \n") == Diagnosis(f"{way}; its last words: nearly there")
    assert diagnose(status, "\n") == Diagnosis(f"{way}; it wrote nothing")


@pytest.mark.parametrize(("status", "log", "words"), NOT_KNOWN)
def test_the_last_words_are_the_last_exception_that_says_something(status: int, log: str, words: str) -> None:
    said = str(diagnose(status, log))
    assert said.startswith(f"it ended with status {status}; its last words: {words.removesuffix('…')}")


@pytest.mark.parametrize(
    "log",
    [
        "loadstone: --model x: give a folder\n",
        "Traceback …\nloadstone.core.errors.UsageError: --model x: give a folder\n",
    ],
)
def test_our_own_errors_say_all_there_is_to_say(log: str) -> None:
    assert str(diagnose(2, log)) == "--model x: give a folder"


def test_very_long_last_words_are_cut() -> None:
    assert len(str(diagnose(1, "ValueError: " + "x" * 5000))) < 400


@pytest.mark.parametrize(
    "complaint",
    [
        "ModuleNotFoundError(\"No module named 'vllm._C'\")",
        "(APIServer pid=7) WARNING 11-20 13:34:20 [system_utils.py:255] This can cause fd limit errors like `OSError: "
        "[Errno 24] Too many open files`.",
        "(EngineCore pid=8) (Worker pid=9) INFO 11-20 13:34:20 [x.py:1] CUDA out of memory, so the batch is halved",
        "Address already in use. Retrying with a new port.",
    ],
)
def test_what_is_complained_of_in_passing_is_no_cause(complaint: str) -> None:
    assert str(diagnose(1, f"{complaint}\nINFO serving\nKeyError: 'x'\n")).endswith("its last words: KeyError: 'x'")


@pytest.mark.parametrize(("status", "word"), [(-4, "instruction"), (-15, "somebody ended it with SIGTERM")])
def test_other_signals_that_tell_something(status: int, word: str) -> None:
    assert word in str(diagnose(status, ""))
