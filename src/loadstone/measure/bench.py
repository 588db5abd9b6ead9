"""One level as ``vllm bench serve`` runs it: no warm-up hand-over, no window, every request counts."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from loadstone.core.api.endpoint import Endpoint
from loadstone.core.api.reading import to_record
from loadstone.core.clock import Clock
from loadstone.core.records import RequestRecord
from loadstone.core.target import Exchange, Request, Target
from loadstone.measure.arrivals import Arrivals, offsets_ns
from loadstone.measure.generator import play
from loadstone.measure.texts import WARM_UPS
from loadstone.measure.tokens import Tokenizer, fill_output_tokens
from loadstone.measure.workload import Workload

FEWEST_PROMPTS_PER_SLOT = 5
_BUILT_BEFORE = 20_000
"""Requests that are ready before the first is sent. Of a run longer than that the rest are built when they are due,
some 20 µs each, as the bodies of all of them would take more memory than their replies."""


@dataclass(frozen=True)
class BenchPlan:
    num_prompts: int
    arrivals: Arrivals
    max_concurrency: int | None = None
    num_warmups: int = 0
    seed: int = 0
    keep_text: bool = False
    level: int = 0
    """Of the workload: another one has other texts."""


@dataclass(frozen=True)
class Played:
    records: list[RequestRecord]
    """In send order, times from t0."""
    duration_s: float
    """From t0 to the last byte."""
    output_tokens_from: str
    """usage | tokenizer | chunks"""


async def run_bench(
    target: Target,
    clock: Clock,
    workload: Workload,
    endpoint: Endpoint,
    plan: BenchPlan,
    tokenizer: Tokenizer | None = None,
    on_done: Callable[[Exchange], None] | None = None,
) -> Played:
    """Play the plan; ``on_done`` hears of each request that ended. A failed request is a record, not an error."""
    if plan.num_warmups:
        warm_ups = [workload.request(WARM_UPS, index) for index in range(plan.num_warmups)]
        await play(target, clock, warm_ups, [0] * plan.num_warmups, plan.max_concurrency)
    requests = _Requests(workload, plan)
    offsets = offsets_ns(plan.arrivals, plan.num_prompts, plan.seed)

    def done(exchange: Exchange) -> None:
        # Nobody reads it again.
        exchange.request = msgspec.structs.replace(exchange.request, body=b"")
        if on_done is not None:
            on_done(exchange)

    t0_ns = clock.now_ns()
    exchanges = await play(target, clock, requests, offsets, plan.max_concurrency, done)
    records = list(_records(exchanges, endpoint, t0_ns, plan.keep_text))
    filled, output_tokens_from = fill_output_tokens(records, tokenizer)
    return Played(filled, max(record.end_s for record in filled), output_tokens_from)


class _Requests(Sequence[Request]):
    """The requests of a plan, to be read one by one."""

    def __init__(self, workload: Workload, plan: BenchPlan) -> None:
        self._workload = workload
        self._plan = plan
        self._ready = [self._build(index) for index in range(min(plan.num_prompts, _BUILT_BEFORE))]

    def __len__(self) -> int:
        return self._plan.num_prompts

    def __getitem__(self, index: Any) -> Any:
        return self._ready[index] if index < len(self._ready) else self._build(index)

    def _build(self, index: int) -> Request:
        return self._workload.request(self._plan.level, index)


def _records(exchanges: list[Exchange], endpoint: Endpoint, t0_ns: int, keep_text: bool) -> Iterator[RequestRecord]:
    """Empties ``exchanges``: both forms of every reply at once would take twice the memory."""
    exchanges.reverse()
    while exchanges:
        yield to_record(exchanges.pop(), endpoint, t0_ns, keep_text)


def plan_notes(plan: BenchPlan) -> list[str]:
    """What is to be said about the plan before it runs."""
    slots = plan.max_concurrency
    if slots is None or plan.num_prompts >= FEWEST_PROMPTS_PER_SLOT * slots:
        return []
    return [
        f"{plan.num_prompts} prompts are few for {slots} at once: 5–10 times the concurrency "
        f"({5 * slots}–{10 * slots}) give figures to rely on"
    ]


def failure_lines(records: Sequence[RequestRecord], most: int = 5) -> list[str]:
    """The commonest errors, one line each with their count."""
    errors = Counter(f"{record.outcome}: {record.error}" for record in records if not record.ok)
    lines = [f"{count} × {error}" for error, count in errors.most_common(most)]
    if len(errors) > most:
        lines.append(f"and {len(errors) - most} other errors (--save-detailed writes all)")
    return lines
