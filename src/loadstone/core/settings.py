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
    """chat, completions, embeddings or rerank."""
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
    """Texts in an embeddings request (1), documents in a rerank request (8)."""
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
    """Requests for each slot of a level: one warms up, one fills at the end, the others are judged."""
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
