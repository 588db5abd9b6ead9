"""``verdict.json``: what a run says, level by level, and the answer. Written by ``measure``, read by ``report``."""

import enum

import msgspec


class Verdict(enum.StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    UNRESOLVED = "UNRESOLVED"
    """The interval still contains the limit after all the requests that were allowed."""
    INVALID = "INVALID"
    """The generator's own error could flip the verdict: never read as "the server is full"."""


NOT_ENDED = "the search has not ended"
"""So begins the note of a run that was judged before its search had found the answer."""


class LevelKind(enum.StrEnum):
    LADDER = "ladder"
    BISECT = "bisect"
    CONFIRM = "confirm"


class ClientFigures(msgspec.Struct, frozen=True):
    """How well the generator kept up; the ground on which a level is believed or voided."""

    late_p99_ms: float = 0.0
    """Actual minus planned send, 99th percentile, where a slot was free."""
    turnaround_share: float = 0.0
    """D: time slots stood empty between a reply and the next send, as a share of N·T."""
    lag_p99_ms: float = 0.0
    """Kernel stamp to read, 99th percentile of each request's largest."""
    cpu: float = 0.0
    """Share of one core that the generator used."""
    run_queue_wait: float = 0.0
    """Share of wall time the generator was ready to run but had no core (schedstat)."""
    kernel_stamps: bool = False


class Finding(msgspec.Struct, frozen=True):
    """One rule held against one level."""

    rule: str
    """success | resource:<name> | slo:<metric> | ttft | e2el | client"""
    verdict: Verdict
    reason: str
    """One sentence with the value, its interval and the limit."""


class LevelRow(msgspec.Struct, frozen=True):
    """One level as it was judged. Latencies in ms; means over successes, failures infinite in quantiles (null)."""

    ordinal: int
    kind: LevelKind
    concurrency: int
    verdict: Verdict
    rule: str
    """The first rule that failed, empty where none did."""
    reason: str
    requests: int
    """Requests judged."""
    success_rate: float
    error_rate: float
    throughput_rps: float | None
    """Successful requests per second in the steady window; null where the level stopped early."""
    throughput_low_rps: float | None = None
    throughput_high_rps: float | None = None
    output_tps: float | None = None
    mean_ttft_ms: float | None = None
    ttft_low_ms: float | None = None
    """95 % interval of the mean."""
    ttft_high_ms: float | None = None
    p50_ttft_ms: float | None = None
    p95_ttft_ms: float | None = None
    p99_ttft_ms: float | None = None
    mean_e2el_ms: float | None = None
    p50_e2el_ms: float | None = None
    p95_e2el_ms: float | None = None
    p99_e2el_ms: float | None = None
    mean_tpot_ms: float | None = None
    p99_tpot_ms: float | None = None
    mean_itl_ms: float | None = None
    p50_itl_ms: float | None = None
    p95_itl_ms: float | None = None
    p99_itl_ms: float | None = None
    no_content: int = 0
    """Successes that carried no content: they have no TTFT."""
    failures: dict[str, int] = {}
    """Failed requests by outcome."""
    sure: bool = True
    stopped_early: bool = False
    duration_s: float = 0.0
    """Length of the judged window."""
    server: dict[str, float] = {}
    """Medians in the window of what the server's /metrics said: kv_use, running, waiting, preemptions …"""
    client: ClientFigures | None = None
    """Null where nothing is known of the generator."""
    findings: list[Finding] = []


class BestEfficiency(msgspec.Struct, frozen=True):
    """The document's optimum: the level with the most requests per second for each slot."""

    concurrency: int
    rps_per_slot: float


class GainLine(msgspec.Struct, frozen=True):
    """Largest N at which a doubling centred on N still gains ``--min-gain``; with the interval the data allow."""

    concurrency: int
    low: int
    high: int


class RunVerdict(msgspec.Struct, frozen=True):
    """The whole of ``verdict.json``."""

    measured_max_concurrency: int | None
    """Null where no level passed or none could be judged."""
    recommended_concurrency: int | None
    half_of_failing: int | None
    """What the document's script advises: half of the first failing level."""
    binding: str
    """success | ttft | e2el | gain | resource:<name> | slo:<metric> | ladder | client; empty: nothing was judged"""
    claim: str
    best_efficiency: BestEfficiency | None
    gain_line: GainLine | None
    non_monotone: bool
    peak_throughput_rps: float | None
    levels: list[LevelRow]
    sure: bool = True
    recommended_throughput_rps: float | None = None
    """Measured in a run of its own at the recommended concurrency."""
    notes: list[str] = []
    """Sentences a person should read beside the answer."""
