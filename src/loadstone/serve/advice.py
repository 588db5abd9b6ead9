"""What to change in a service that runs but not well: a line for each figure that is out of its band. Pure."""

from dataclasses import dataclass

_SLOW_S = 5.0
_MOST_FAILURES = 0.01
_MOST_MEMORY = 0.9
_LONG_QUEUE = 5
_MOST_QUEUE = 20
_BUSY = 0.9

TIMEOUTS = "check that the GPU works (nvidia-smi) and what is stuck (oldest_in_flight_s in /stats)"
"""Restarting, the third thing to do about it, is the supervisor's."""


@dataclass(frozen=True)
class Figures:
    """How a service has done lately. Shares are 0 … 1; None where a figure isn't known."""

    timeouts: int = 0
    """Requests that were not complete in time."""
    oldest_in_flight_s: float | None = None
    failed_share: float = 0.0
    """Failed and timed out, of those that were admitted."""
    mean_response_s: float | None = None
    queue_full: int = 0
    """Requests refused because the queue was full."""
    queued: int = 0
    max_queue: int | None = None
    gpu_memory: float | None = None
    """Share in use; None where the engine allocates all that it may beforehand."""
    kv_use: float | None = None
    max_num_seqs: int | None = None
    """Sequences that the engine computes at once; None where it doesn't batch."""
    engine_cpu: float | None = None
    """Of the cores that a replica may use, the share that the busiest replica keeps busy."""
    free_cores: float = 0.0
    """Idle, on the whole machine."""
    workers: int = 1


def advice(figures: Figures) -> dict[str, str]:
    """A line for each thing that is wrong, by what it is about, the gravest first; empty where all is well."""
    lines = {
        "timeouts": _timeouts(figures),
        "failures": _failures(figures),
        "memory": _memory(figures),
        "queue": _queue(figures),
        "slow": _slow(figures),
        "cpu": _cpu(figures),
    }
    return {subject: line for subject, line in lines.items() if line}


def _timeouts(figures: Figures) -> str:
    if not figures.timeouts:
        return ""
    oldest_s = figures.oldest_in_flight_s
    oldest = "" if oldest_s is None else f" (the oldest request runs for {oldest_s:.0f} s)"
    return f"{figures.timeouts} requests timed out{oldest}: {TIMEOUTS}, then restart the service"


def _failures(figures: Figures) -> str:
    if figures.failed_share <= _MOST_FAILURES:
        return ""
    return f"{figures.failed_share:.1%} of the requests fail, above 1 %: the engines' logs and last_error tell why"


def _memory(figures: Figures) -> str:
    shares = {"GPU memory": figures.gpu_memory, "the KV cache": figures.kv_use}
    full = [
        f"{name} is {share:.0%} full" for name, share in shares.items() if share is not None and share > _MOST_MEMORY
    ]
    if not full:
        return ""
    return f"{' and '.join(full)}, above 90 %: lower --max-concurrency (MAX_CONCURRENT) or --max-output-tokens"


def _queue(figures: Figures) -> str:
    elsewhere = "let clients wait for Retry-After before they try again, and add instances or --workers"
    if figures.queue_full:
        most = figures.max_queue
        longer = f"raise --max-queue from {most} to at most {_MOST_QUEUE}, " if most and most < _MOST_QUEUE else ""
        return f"{figures.queue_full} requests found the queue full: {longer}{elsewhere}"
    if figures.queued > _LONG_QUEUE:
        return f"{figures.queued} requests wait, more than {_LONG_QUEUE}: {elsewhere}"
    return ""


def _slow(figures: Figures) -> str:
    mean_s = figures.mean_response_s
    if mean_s is None or mean_s <= _SLOW_S:
        return ""
    seqs = figures.max_num_seqs
    remedy = f"raise --max-num-seqs from {seqs}" if seqs else "lower --max-concurrency (MAX_CONCURRENT) to 2"
    return f"a response takes {mean_s:.1f} s on average, above {_SLOW_S:.0f} s: {remedy}"


def _cpu(figures: Figures) -> str:
    if figures.engine_cpu is None or figures.engine_cpu < _BUSY:
        return ""
    if figures.free_cores >= 1:
        remedy = f"raise --workers from {figures.workers}: {figures.free_cores:.0f} cores are free"
    else:
        remedy = "no core is free for more --workers: add instances on other machines"
    return f"the engine is bound by the CPU ({figures.engine_cpu:.0%} of its cores): {remedy}"
