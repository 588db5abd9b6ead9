"""What each measuring verb can be told. Flags, environment variables and configuration files are made from these.

The line below a field is its help text. Every setting is equally ``LOADSTONE_<FLAG>`` and a key of ``loadstone.toml``.
"""

from dataclasses import dataclass

from loadstone.core.errors import UsageError

DEFAULT_LEVELS = "1,2,5,10,20,50,100,200,500,1000"
TIMEOUT_RANGE_S = (0.001, 1e6)


@dataclass(frozen=True)
class ServerSettings:
    """Where the server is and what is asked of it."""

    base_url: str = "http://127.0.0.1:8000"
    """Where the server is; a path prefix or a trailing /v1 is fine."""
    endpoint: str = "chat"
    """chat, completions, embeddings, rerank, embed_text or embed_image."""
    model: str = ""
    """Model name to ask for; the first that /v1/models lists where none is given."""
    header: tuple[str, ...] = ()
    """Extra request header, NAME=VALUE. Repeatable."""
    extra_body: str = ""
    """JSON object merged into every request body."""
    request_timeout_s: float = 120.0
    """A request without a complete reply by then has failed."""


@dataclass(frozen=True)
class DataSettings:
    """Which requests are sent."""

    dataset_name: str = "random"
    """random (words of exact token lengths) or custom (JSON lines)."""
    dataset_path: str = ""
    """File of the custom data set."""
    tokenizer: str = ""
    """tokenizer.json, or a folder that holds one; without it lengths are calibrated from the server's usage."""
    random_input_len: int = 512
    """Prompt tokens."""
    random_output_len: int = 128
    """Tokens to generate."""
    random_range_ratio: float = 0.0
    """Lengths vary by up to this share to both sides."""
    random_prefix_len: int = 0
    """Tokens of a prefix that all prompts share."""
    random_batch_size: int = 0
    """Texts or images in an embeddings request (1), documents in a rerank request (8)."""
    seed: int = 0
    """The same seed sends the same requests."""


@dataclass(frozen=True)
class RuleSettings:
    """Where a level fails."""

    min_success: float = 0.95
    """Least share of requests that must succeed."""
    max_ttft_ms: float = 1000.0
    """Limit of the time to first token; where nothing streams, of the end-to-end time. 0 = no such rule."""
    ttft_stat: str = "mean"
    """Which TTFT is held to it: mean, p50, p95 or p99."""
    max_e2el_ms: float = 0.0
    """Limit of the mean end-to-end time; 0 = none."""
    min_gain: float = 0.2
    """Throughput must grow by this share for a doubling of the concurrency; 0 = no such rule."""
    max_kv_use: float = 0.95
    """Largest median share of the KV cache in use."""
    max_waiting: int = -1
    """Most requests waiting inside the engine; -1 = no such rule."""
    max_gpu_memory: float = 0.0
    """Largest share of device memory, for engines that do not preallocate it; 0 = no such rule."""
    slo: tuple[str, ...] = ()
    """A limit of your own, METRIC:STAT:MS such as tpot:p99:50. Repeatable."""
    resolution: float = 0.05
    """How finely the line is found."""
    headroom: float = 0.75
    """Share of the measured line that is recommended."""


@dataclass(frozen=True)
class LadderSettings:
    """How the search climbs."""

    levels: str = DEFAULT_LEVELS
    """Concurrencies to climb through, ascending."""
    requests_per_slot: int = 10
    """Requests judged for each slot where throughput scatters or the verdict is not sure; where all is steady two less
    at the answer, and half as many below it."""
    max_level_seconds: float = 0.0
    """Longest time for one level; 0 = as long as its requests take."""


@dataclass(frozen=True)
class OutputSettings:
    """Where the results go."""

    out: str = ""
    """Folder of the run; runs/TIME-MODEL where none is given. Must be empty or not exist."""
    json: bool = False
    """Print one machine-readable line last on standard output."""
    quiet: bool = False
    """No progress, no tables."""


@dataclass(frozen=True)
class LimitSettings:
    """What a gate allows. Each flag overrides the limits file; 0 = no bound."""

    limits: str = ""
    """The limits.toml to hold the server to; without one the cautious defaults of a chat model on a small GPU."""
    max_concurrency: int | None = None
    """Requests in flight at one upstream."""
    max_queue: int | None = None
    """Requests waiting at the gate; beyond it 503."""
    queue_timeout_s: float | None = None
    """Longest wait for a place."""
    request_timeout_s: float | None = None
    """From arrival to the last byte: queue, connect and generation together."""
    max_output_tokens: int | None = None
    """Clamp on max_tokens and max_completion_tokens."""
    default_output_tokens: int | None = None
    """Output tokens where the request names none."""
    max_tokens_in_flight: int | None = None
    """Prompt and output tokens admitted at once, for one upstream."""
    requests_per_minute: int | None = None
    """For one client."""
    requests_per_hour: int | None = None
    """For one client."""
    tokens_per_minute: int | None = None
    """For one client, prompt and output."""
    force: bool = False
    """Start although a limit lies above the measured line."""


@dataclass(frozen=True)
class GateSettings:
    """How a gate runs."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 9000
    """Port to listen on; 0 takes a free one."""
    trusted_proxy: tuple[str, ...] = ()
    """Proxy whose X-Forwarded-For is believed, an address or CIDR. Repeatable."""
    api_key_file: str = ""
    """Keys that may use the gate, one a line: KEY [NAME [PRIORITY]]. Quotas are then counted for each key."""
    redis: str = ""
    """Count quotas in this Redis, shared by several gates: redis://HOST:PORT/0."""
    adaptive: bool = False
    """Lower the limit while the engine is slower than it was measured, and raise it again; never above the file."""
    affinity: bool = False
    """Send requests that share the start of their prompt to the same upstream, for its prefix cache."""
    access_log: str = ""
    """Write a JSON line for each request to this file; - is standard output."""
    max_body_mb: float = 16.0
    """Largest request body."""
    upstream_ca: str = ""
    """Certificate authority of https upstreams, a PEM file; the system's where none is given."""
    drain_timeout_s: float = 0.0
    """After SIGTERM, longest wait for what still runs; 0 = as long as each request's own deadline."""


@dataclass(frozen=True)
class ServiceGateSettings(GateSettings):
    """How the gate of a model service runs."""

    port: int = 8000
    """Port to listen on; 0 takes a free one."""


@dataclass(frozen=True)
class EmbedGateSettings(GateSettings):
    """How the gate of the embedding service runs."""

    port: int = 8080
    """Port to listen on; 0 takes a free one."""


@dataclass(frozen=True)
class ServeSettings:
    """How the engines behind a model service run. What is not given is the engine's own default."""

    model: str = ""
    """Folder or file of the model, or its name on the hub."""
    engine: str = "auto"
    """What runs the model; auto chooses by the machine and the model."""
    quantization: str = ""
    """int8, or what the engine calls it."""
    workers: int = 1
    """Replicas of the engine behind the one gate, whose limits hold for all of them together."""
    threads: int | None = None
    """Threads that prepare requests (tokenise, decode images), in each replica."""
    max_workers: int | None = None
    """The same as --threads; beats it."""
    max_num_seqs: int | None = None
    """Sequences that a replica computes at once."""
    max_num_batched_tokens: int | None = None
    """Tokens of one batch, padding included."""
    gpu_memory_utilization: float | None = None
    """Share of a GPU's memory that an engine which allocates it beforehand takes."""
    tensor_parallel_size: int = 1
    """GPUs that share one replica."""
    max_model_len: int | None = None
    """Longest sequence, prompt and reply together; shorter takes less memory."""
    vllm_python: str = ""
    """Python interpreter that has vLLM; this one where none is given."""
    log_dir: str = ""
    """Folder for the engines' logs; one beside other temporary files where none is given."""
    ready_timeout_s: float = 1800.0
    """Longest time until an engine is ready: large models take minutes to load."""
    unlimited: bool = False
    """Open the gate altogether, to measure what stands behind it."""
    show: bool = False
    """Print the command line of each replica, and start nothing."""


def parse_levels(text: str, flag: str = "--levels") -> tuple[int, ...]:
    """``1,2,5`` → (1, 2, 5). Raises UsageError where it is empty, unsorted or has anything below 1."""
    try:
        levels = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"{flag} {text!r}: give whole numbers separated by commas, such as 1,2,5,10") from None
    if not levels:
        raise UsageError(f"{flag} is empty: give at least one concurrency, such as 1,2,5,10")
    if min(levels) < 1:
        raise UsageError(f"{flag} {text}: a concurrency is at least 1, not {min(levels)}")
    if list(levels) != sorted(set(levels)):
        ordered = ",".join(str(level) for level in sorted(set(levels)))
        raise UsageError(f"{flag} {text}: must ascend without repeats; did you mean {ordered}?")
    return levels


def check_range(flag: str, value: float, low: float, high: float) -> None:
    """Raises UsageError where ``value`` is not within [low, high]."""
    if not low <= value <= high:
        raise UsageError(f"{flag} {value:g} must be between {low:g} and {high:g}")
