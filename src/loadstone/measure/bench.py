"""One level as ``vllm bench serve`` runs it: no warm-up hand-over, no window, every request counts."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadstone.core.api.endpoint import Endpoint
from loadstone.core.api.reading import to_record
from loadstone.core.clock import Clock
from loadstone.core.records import RequestRecord
from loadstone.core.target import Exchange, Target
from loadstone.measure.arrivals import Arrivals, offsets_ns
from loadstone.measure.generator import play
from loadstone.measure.texts import WARM_UPS
from loadstone.measure.tokens import Tokenizer, fill_output_tokens
from loadstone.measure.workload import Workload

FEWEST_PROMPTS_PER_SLOT = 5


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
    requests = [workload.request(plan.level, index) for index in range(plan.num_prompts)]
    offsets = offsets_ns(plan.arrivals, plan.num_prompts, plan.seed)
    t0_ns = clock.now_ns()
    exchanges = await play(target, clock, requests, offsets, plan.max_concurrency, on_done)
    records = [to_record(exchange, endpoint, t0_ns, plan.keep_text) for exchange in exchanges]
    filled, output_tokens_from = fill_output_tokens(records, tokenizer)
    return Played(filled, max(record.end_s for record in filled), output_tokens_from)


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
