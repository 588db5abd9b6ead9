"""What ``loadstone bench`` can be told: the flags of ``vllm bench serve`` with their defaults, and a few of ours."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Group, Parameter

_Words = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())]
_SERVER = Parameter(group=Group("Server", sort_key=1))
_WORK = Parameter(group=Group("Workload", sort_key=2))
_TRAFFIC = Parameter(group=Group("Traffic", sort_key=3))
_BODY = Parameter(group=Group("Request bodies", sort_key=4))
_RESULT = Parameter(group=Group("Result", sort_key=5))
_COMPAT = Parameter(group=Group("Accepted for compatibility, without effect", sort_key=6))


@Parameter(name="*", negative_bool=())
@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """The flags of ``bench``."""

    base_url: Annotated[str | None, _SERVER] = None
    """Server to measure, such as http://127.0.0.1:8000; overrides --host and --port."""
    host: Annotated[str, _SERVER] = "127.0.0.1"
    """Host, where --base-url is not given."""
    port: Annotated[int, _SERVER] = 8000
    """Port, where --base-url is not given."""
    backend: Annotated[str, _SERVER] = "openai"
    """vllm, openai, openai-chat, openai-embeddings, vllm-pooling, vllm-rerank or infinity-embeddings."""
    endpoint: Annotated[str | None, _SERVER] = None
    """Path such as /v1/completions, or chat, completions, embeddings, rerank, embed_text, embed_image; by default the
    backend's own."""
    model: Annotated[str | None, _SERVER] = None
    """Model name; by default the first that /v1/models lists."""
    served_model_name: Annotated[str | None, _SERVER] = None
    """Name to use in requests, where it is not the same as --model."""
    api_key: Annotated[str | None, Parameter(env_var=("LOADSTONE_API_KEY", "OPENAI_API_KEY")), _SERVER] = None
    """Sent as a bearer token. Never written to disk."""
    header: Annotated[_Words, _SERVER] = ()
    """Extra request headers, KEY=VALUE …"""
    insecure: Annotated[bool, _SERVER] = False
    """Do not verify the server's TLS certificate."""
    ready_check_timeout_sec: Annotated[float, _SERVER] = 0.0
    """Wait this long for the server to answer; by default not at all."""
    request_timeout_s: Annotated[float, _SERVER] = 21_600.0
    """A request that takes longer has failed."""

    dataset_name: Annotated[str, _WORK] = "random"
    """random or custom."""
    dataset_path: Annotated[str | None, _WORK] = None
    """JSONL file for --dataset-name custom: {"prompt": …} or {"messages": …}, optionally "output_tokens"."""
    num_prompts: Annotated[int, _WORK] = 1000
    """Requests to send."""
    random_input_len: Annotated[int, _WORK] = 1024
    """Tokens of a prompt."""
    random_output_len: Annotated[int, _WORK] = 128
    """Tokens to generate."""
    input_len: Annotated[int | None, _WORK] = None
    """The same as --random-input-len."""
    output_len: Annotated[int | None, _WORK] = None
    """The same as --random-output-len and --custom-output-len."""
    random_range_ratio: Annotated[str, _WORK] = "0.0"
    """Lengths vary by this share, uniformly; or {"input": 0.3, "output": 0.5}."""
    random_prefix_len: Annotated[int, _WORK] = 0
    """Tokens of a prefix that all prompts share, on top."""
    random_batch_size: Annotated[int, _WORK] = 1
    """Texts in one embeddings request, documents in one rerank request."""
    custom_output_len: Annotated[int | None, _WORK] = None
    """Tokens to generate with custom; by default what the line says, else 256. -1: what the line says."""
    disable_shuffle: Annotated[bool, _WORK] = False
    """Send a custom file's lines in their order."""
    tokenizer: Annotated[str | None, _WORK] = None
    """tokenizer.json, or a folder that holds one; without it the server's usage gives the lengths."""
    seed: Annotated[int, _WORK] = 0
    """Of texts, lengths and arrival times."""

    max_concurrency: Annotated[int | None, _TRAFFIC] = None
    """Requests in flight at most; by default no bound."""
    request_rate: Annotated[float, _TRAFFIC] = math.inf
    """Requests per second; inf sends all at once."""
    burstiness: Annotated[float, _TRAFFIC] = 1.0
    """Gamma shape of the gaps: 1 is Poisson, inf constant."""
    ramp_up_strategy: Annotated[Literal["linear", "exponential"] | None, _TRAFFIC] = None
    """Raise the rate from --ramp-up-start-rps to --ramp-up-end-rps."""
    ramp_up_start_rps: Annotated[float | None, _TRAFFIC] = None
    """Rate at the first request."""
    ramp_up_end_rps: Annotated[float | None, _TRAFFIC] = None
    """Rate at the last request."""
    num_warmups: Annotated[int, _TRAFFIC] = 0
    """Requests to send before, not counted."""

    ignore_eos: Annotated[bool, _BODY] = False
    """Generate all tokens asked for; always on with random."""
    extra_body: Annotated[str | None, _BODY] = None
    """JSON object merged into each request."""
    temperature: Annotated[float | None, _BODY] = None
    """By default the server's."""
    top_p: Annotated[float | None, _BODY] = None
    """By default the server's."""
    top_k: Annotated[int | None, _BODY] = None
    """By default the server's."""
    min_p: Annotated[float | None, _BODY] = None
    """By default the server's."""
    frequency_penalty: Annotated[float | None, _BODY] = None
    """By default the server's."""
    presence_penalty: Annotated[float | None, _BODY] = None
    """By default the server's."""
    repetition_penalty: Annotated[float | None, _BODY] = None
    """By default the server's."""
    logprobs: Annotated[int | None, _BODY] = None
    """Log-probabilities to ask for with each token."""

    percentile_metrics: Annotated[str | None, _RESULT] = None
    """Of ttft,tpot,itl,e2el; by default ttft,tpot,itl, and e2el for embeddings and rerank."""
    metric_percentiles: Annotated[str, _RESULT] = "99"
    """Percentiles of these, such as 50,95,99."""
    goodput: Annotated[_Words, _RESULT] = ()
    """Limits in ms that a request must meet to count as good: ttft:200 tpot:50 e2el:1000 …"""
    label: Annotated[str | None, _RESULT] = None
    """Prefix of the result's file name; by default the backend."""
    metadata: Annotated[_Words, _RESULT] = ()
    """KEY=VALUE … to be kept in the result."""
    save_result: Annotated[bool, _RESULT] = False
    """Write the result to a JSON file."""
    save_detailed: Annotated[bool, _RESULT] = False
    """With the figures of each request."""
    append_result: Annotated[bool, _RESULT] = False
    """Append to the file instead of replacing it."""
    result_dir: Annotated[str | None, _RESULT] = None
    """Folder of the file; by default the current one."""
    result_filename: Annotated[str | None, _RESULT] = None
    """Name of the file (given alone it saves, too)."""
    disable_tqdm: Annotated[bool, _RESULT] = False
    """No progress bar."""
    out: Annotated[str, _RESULT] = ""
    """Folder to write a run to, with the records of each request; must be empty or not exist."""
    json: Annotated[bool, _RESULT] = False
    """Print the result as one line of JSON, last."""
    quiet: Annotated[bool, _RESULT] = False
    """No progress bar and no notes; with --json nothing but the JSON."""

    request_id_prefix: Annotated[str | None, _COMPAT] = None
    """Requests carry no id."""
    trust_remote_code: Annotated[bool, _COMPAT] = False
    """Loadstone runs no code of a model."""
    skip_tokenizer_init: Annotated[bool, _COMPAT] = False
    """No tokenizer is loaded unless --tokenizer names one."""
    tokenizer_mode: Annotated[str | None, _COMPAT] = None
    """Only tokenizer.json is read."""
