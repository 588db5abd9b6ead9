"""What is asked of the server: request ``index`` of level ``level``, the same for the same seed.

``random`` gives an index the same lengths on every level and a new text, so that levels differ in concurrency alone and
a prefix cache flatters none of them. ``custom`` goes through a JSONL file, each level going on where the last ended.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from loadstone.core.api.endpoint import BodyOptions, Endpoint, JsonObject, Prompt
from loadstone.core.errors import UsageError
from loadstone.core.target import Request
from loadstone.measure.texts import Texts

DATASETS = ("random", "custom")
QUERY_TOKENS = 32
"""Longest query of a rerank request."""
CUSTOM_OUTPUT_TOKENS = 256
"""Asked for where neither the line nor a flag says."""
_DOCUMENTS = {"rerank": 8}
"""Texts in a request by endpoint, where nothing is said; one elsewhere."""


@dataclass(frozen=True)
class WorkloadSettings:
    """What the data-set flags say. Lengths in tokens."""

    dataset_name: str = "random"
    dataset_path: str | None = None
    input_len: int = 512
    """Of a prompt; of each text for embeddings; of each document for rerank, whose query has up to 32 more."""
    output_len: int = 128
    input_range_ratio: float = 0.0
    """Lengths are uniform in [n·(1 − ratio), n·(1 + ratio)]."""
    output_range_ratio: float = 0.0
    prefix_len: int = 0
    """A prefix that all prompts share, on top of ``input_len``."""
    batch_size: int | None = None
    """Texts or images in one embeddings request (1), documents in one rerank request (8)."""
    custom_output_len: int | None = None
    """For ``custom``: overrides what the lines say."""
    shuffle: bool = True
    """For ``custom``: in an order drawn from the seed, so that a sorted file does not make levels unlike."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset_name not in DATASETS:
            raise UsageError(f"--dataset-name {self.dataset_name} is not to be had; choose {' or '.join(DATASETS)}")
        if self.dataset_name == "custom" and not self.dataset_path:
            raise UsageError('--dataset-name custom needs --dataset-path FILE (lines of {"prompt": …})')
        if self.dataset_name == "random" and self.dataset_path:
            raise UsageError("--dataset-path goes with --dataset-name custom")
        for flag, value, least in (
            ("--random-input-len", self.input_len, 1),
            ("--random-output-len", self.output_len, 1),
            ("--random-prefix-len", self.prefix_len, 0),
            ("--random-batch-size", 1 if self.batch_size is None else self.batch_size, 1),
        ):
            if value < least:
                raise UsageError(f"{flag} {value} must be at least {least}")
        for ratio in (self.input_range_ratio, self.output_range_ratio):
            if not 0.0 <= ratio < 1.0:
                raise UsageError(f"--random-range-ratio {ratio:g} must be at least 0 and below 1")

    def lengths(self, index: int) -> tuple[int, int]:
        """(input, output) tokens of request ``index``, on every level."""
        if not (self.input_range_ratio or self.output_range_ratio):
            return self.input_len, self.output_len
        rng = random.Random(f"lengths/{self.seed}/{index}")
        return (
            _uniform(rng, self.input_len, self.input_range_ratio),
            _uniform(rng, self.output_len, self.output_range_ratio),
        )

    def texts_per_request(self, endpoint: Endpoint) -> int:
        if endpoint.streams:
            return 1
        return self.batch_size or _DOCUMENTS.get(endpoint.name, 1)


def _uniform(rng: random.Random, mean: int, ratio: float) -> int:
    return max(1, rng.randint(math.floor(mean * (1 - ratio)), math.ceil(mean * (1 + ratio))))


class Workload(Protocol):
    """Where requests come from."""

    def request(self, level: int, index: int) -> Request: ...

    @property
    def notes(self) -> Sequence[str]:
        """Sentences that a person should read beside the figures."""
        ...


@dataclass(frozen=True)
class RandomWorkload:
    """Random words of exact lengths."""

    settings: WorkloadSettings
    texts: Texts
    endpoint: Endpoint
    path: str
    options: BodyOptions

    @property
    def notes(self) -> Sequence[str]:
        return ()

    def request(self, level: int, index: int) -> Request:
        input_tokens, output_tokens = self.settings.lengths(index)
        count = self.settings.texts_per_request(self.endpoint)
        first = index * (count + 1)
        texts = [self.texts.text(level, first + part, input_tokens) for part in range(count)]
        tokens = count * (self.settings.prefix_len + input_tokens)
        if self.endpoint.name == "rerank":
            query_tokens = min(QUERY_TOKENS, input_tokens)
            texts.insert(0, self.texts.text(level, first + count, query_tokens))
            tokens += count * query_tokens
        return Request(
            path=self.path,
            body=self.endpoint.build(Prompt(tuple(texts)), output_tokens, self.options),
            index=index,
            input_tokens=None if self.endpoint.name == "embed_image" else tokens,
            output_tokens=output_tokens if self.endpoint.streams else None,
            sequences=count,
        )


class Row(msgspec.Struct):
    """One line of a custom file."""

    prompt: str | list[str] | None = None
    messages: list[JsonObject] | None = None
    query: str | None = None
    documents: list[str] | None = None
    image: str | list[str] | None = None
    """In base64."""
    output_tokens: int | None = None


def load_rows(path: str, endpoint: Endpoint) -> list[Row]:
    """The lines of a JSONL file; raises :class:`UsageError` naming the line that does not fit ``endpoint``."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"--dataset-path {path} cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=Row)
            _prompt(row, endpoint)
        except (msgspec.DecodeError, UnicodeDecodeError, UsageError) as error:
            raise UsageError(f"{path}, line {number}: {error}") from error
        rows.append(row)
    if not rows:
        raise UsageError(f"--dataset-path {path} is empty")
    return rows


def _prompt(row: Row, endpoint: Endpoint) -> Prompt:
    if endpoint.name == "rerank":
        if row.query is None or not row.documents:
            raise UsageError('rerank needs {"query": …, "documents": […]}')
        return Prompt((row.query, *row.documents))
    if endpoint.name == "chat" and row.messages:
        return Prompt(messages=row.messages)
    if isinstance(row.prompt, str) and endpoint.name != "embed_image":
        return Prompt((row.prompt,))
    if endpoint.name == "embed_image" and row.image:
        return Prompt((row.image,) if isinstance(row.image, str) else tuple(row.image))
    if endpoint.name in ("embeddings", "embed_text") and row.prompt:
        return Prompt(tuple(row.prompt))
    if endpoint.name == "embed_image":
        raise UsageError('embed_image needs {"image": BASE64}')
    also = ' or {"messages": […]}' if endpoint.name == "chat" else ""
    raise UsageError(f'{endpoint.name} needs {{"prompt": …}}{also}')


class CustomWorkload:
    """The lines of a file, over and over; each level begins where the one before it ended."""

    def __init__(
        self,
        settings: WorkloadSettings,
        rows: Sequence[Row],
        endpoint: Endpoint,
        path: str,
        options: BodyOptions,
        used: int = 0,
    ) -> None:
        """``used``: lines that earlier levels of a resumed run have sent already."""
        self._settings = settings
        self._rows = list(rows)
        if settings.shuffle:
            random.Random(f"rows/{settings.seed}").shuffle(self._rows)
        self._endpoint = endpoint
        self._path = path
        self._options = options
        self._used = used
        self._starts: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<CustomWorkload {self._used} sent of {len(self._rows)} lines>"

    @property
    def notes(self) -> Sequence[str]:
        if self._used <= len(self._rows):
            return ()
        return (
            f"the file's prompts ({len(self._rows)}) were repeated for {self._used} requests: "
            "what is repeated may come out of the server's prefix cache",
        )

    def request(self, level: int, index: int) -> Request:
        start = self._starts.setdefault(level, self._used)
        self._used = max(self._used, start + index + 1)
        row = self._rows[(start + index) % len(self._rows)]
        prompt = _prompt(row, self._endpoint)
        output_tokens = self._output_tokens(row)
        return Request(
            path=self._path,
            body=self._endpoint.build(prompt, output_tokens, self._options),
            index=index,
            output_tokens=output_tokens if self._endpoint.streams else None,
            sequences=1 if self._endpoint.streams else len(prompt.texts) - (self._endpoint.name == "rerank"),
        )

    def _output_tokens(self, row: Row) -> int:
        asked = self._settings.custom_output_len
        if asked is not None and asked > 0:
            return asked
        return row.output_tokens or CUSTOM_OUTPUT_TOKENS
