"""Does ``find`` find the truth, and at what cost? Searches in virtual time against the computed line of each profile.

Every seed is another server: step times and batch sizes are scaled at random, so that the line falls anywhere between
two levels of the ladder. Cost is in requests sent, against the plain ladder (ten requests a slot, up to the first level
that one of the document's stop rules ends), which knows the line only to a factor of two.

    python bench/search.py [--seeds 20] [--profiles a,b] [--noisy-seeds 20]
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from loadstone.cli.progress import Silent
from loadstone.cli.virtual import virtual_server
from loadstone.core.settings import DEFAULT_LEVELS, DataSettings, ServerSettings, parse_levels
from loadstone.core.verdict import RunVerdict
from loadstone.measure.find import FindSettings, find
from loadstone.measure.runs import create_run
from loadstone.sim.clock import VirtualClock, run_virtual
from loadstone.sim.profiles import NOISY, QUIET, Profile
from loadstone.sim.truth import Truth

LADDER = parse_levels(DEFAULT_LEVELS)
PROMPT_TOKENS = 512
RESOLUTION = 0.05
MIN_GAIN = 0.2
MAX_TTFT_S = 1.0
MAX_KV_USE = 0.95
MIN_SUCCESS = 0.95
STREAM_INTERVAL = 16


@dataclass(frozen=True)
class Outcome:
    """One search held against the truth."""

    profile: str
    seed: int
    hard_line: int | None
    """Largest concurrency that success, KV use and TTFT allow; None beyond the ladder."""
    gain_line: int | None
    answer: int | None
    binding: str
    low: int
    high: int
    sent: int
    plain: int
    took_s: float

    @property
    def line(self) -> int | None:
        lines = [line for line in (self.hard_line, self.gain_line) if line is not None]
        return min(lines, default=None)

    @property
    def error(self) -> float:
        """Answer over truth, minus one; the end of the ladder is the truth where nothing binds below it."""
        return (self.answer or 0) / min(self.line or LADDER[-1], LADDER[-1]) - 1

    @property
    def ok(self) -> bool:
        """A hard line within the resolution (or one slot), a gain line inside its printed interval."""
        if self.binding == "gain":
            return self.gain_line is not None and self.low <= self.gain_line <= self.high
        return abs(self.error) <= RESOLUTION or abs((self.answer or 0) - (self.line or LADDER[-1])) <= 1

    @property
    def cost(self) -> float:
        return self.sent / self.plain


def variant(profile: Profile, seed: int) -> Profile:
    """Another server of the same kind."""
    rng = random.Random(f"{profile.name}/{seed}")

    def scaled(value: int | None) -> int | None:
        return None if value is None else max(2, round(value * rng.uniform(0.7, 1.4)))

    pace = rng.uniform(0.8, 1.25)
    return replace(
        profile,
        base_s=profile.base_s * pace,
        per_decode_seq_s=profile.per_decode_seq_s * pace * rng.uniform(0.8, 1.25),
        max_num_seqs=scaled(profile.max_num_seqs) or 1,
        num_kv_blocks=scaled(profile.num_kv_blocks) or 1,
        refuse_beyond=scaled(profile.refuse_beyond),
        stream_interval=STREAM_INTERVAL,
    )


def run(job: tuple[Profile, int, bool]) -> Outcome:
    """One search and its truth."""
    profile, seed, vary = job
    server = variant(profile, seed) if vary else replace(profile, stream_interval=STREAM_INTERVAL)
    started = time.perf_counter()
    verdict, sent = searched(server, seed)
    took_s = time.perf_counter() - started
    truth = truth_of(server)
    hard = truth.largest(
        lambda at: (
            at.success_share >= MIN_SUCCESS
            and at.median_kv_use < MAX_KV_USE
            and at.preemptions_per_request <= 0.01
            and at.mean_ttft_s <= MAX_TTFT_S
        )
    )
    gain = verdict.gain_line
    return Outcome(
        profile=profile.name,
        seed=seed,
        hard_line=hard,
        gain_line=truth.gain_line(MIN_GAIN),
        answer=verdict.measured_max_concurrency,
        binding=verdict.binding,
        low=gain.low if gain else 0,
        high=gain.high if gain else 0,
        sent=sent,
        plain=plain_ladder(truth, hard),
        took_s=took_s,
    )


@cache
def truth_of(profile: Profile) -> Truth:
    """One profile's truth serves all of its seeds."""
    return Truth(profile, PROMPT_TOKENS, profile.default_output_tokens, request_timeout_s=120.0, most=2 * LADDER[-1])


def searched(profile: Profile, seed: int) -> tuple[RunVerdict, int]:
    """The answer of ``find`` and the requests that it sent."""
    settings = FindSettings(
        server=ServerSettings(base_url="sim://virtual"),
        data=DataSettings(random_output_len=profile.default_output_tokens, seed=seed),
    )
    with tempfile.TemporaryDirectory() as place:
        folder = create_run(str(Path(place) / "run"), "sim", datetime.now(UTC))

        async def main(clock: VirtualClock) -> RunVerdict:
            server = virtual_server(profile, clock, seed)
            return await find(server, settings, lambda model: folder, Silent(), command="bench/search.py")

        verdict = run_virtual(main)
        return verdict, sum(len(level.records) for level in folder.levels())


def plain_ladder(truth: Truth, hard_line: int | None) -> int:
    """Requests of the document's script up to the level at which it stops."""
    requests = 0
    last_rps = 0.0
    for level in LADDER:
        requests += 10 * level
        rps = truth.at(level).throughput_rps
        grows_little = level > 2 and rps < last_rps * (1 + MIN_GAIN)
        if (hard_line is not None and level > hard_line) or grows_little:
            break
        last_rps = rps
    return requests


def report(title: str, outcomes: Sequence[Outcome]) -> None:
    """One line for each profile, then the summary."""
    print(f"\n{title}")
    print(
        f"{'profile':<14}{'truth':>7}{'binds':>22}{'within':>9}{'error, median':>15}{'worst':>8}"
        f"{'cost, mean':>12}{'p95':>7}"
    )
    for name in dict.fromkeys(o.profile for o in outcomes):
        same = [o for o in outcomes if o.profile == name]
        lines = [min(o.line or LADDER[-1], LADDER[-1]) for o in same]
        worst = max((o.error for o in same), key=abs)
        bindings = ", ".join(sorted({o.binding for o in same}))
        print(
            f"{name:<14}{min(lines):>3}–{max(lines):<4}{bindings:>21}{sum(o.ok for o in same):>5}/{len(same):<3}"
            f"{100 * statistics.median(abs(o.error) for o in same):>13.1f} %{100 * worst:>6.1f} %"
            f"{statistics.mean(o.cost for o in same):>11.2f}{_p95(o.cost for o in same):>8.2f}"
        )
    costs = [o.cost for o in outcomes]
    over = sum(1 for o in outcomes if o.error > RESOLUTION and not (o.binding == "gain" and o.ok))
    print(
        f"all: {sum(o.ok for o in outcomes)} of {len(outcomes)} within, {over} over-promised by more than "
        f"{100 * RESOLUTION:g} %; cost mean {statistics.mean(costs):.2f}, p95 {_p95(costs):.2f}; "
        f"a search takes {statistics.median(o.took_s for o in outcomes):.1f} s (median)"
    )
    for o in outcomes:
        if not o.ok:
            print(
                f"  missed: {o.profile} seed {o.seed}: hard line {o.hard_line}, gain line {o.gain_line}, "
                f"answered {o.answer} ({o.binding}) [{o.low}–{o.high}]"
            )


def _p95(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--noisy-seeds", type=int, default=20)
    parser.add_argument("--profiles", default="")
    args = parser.parse_args()
    names = [name for name in args.profiles.split(",") if name]
    quiet = [p for p in QUIET if not names or p.name in names]
    noisy = [p for p in NOISY if not names or p.name in names]
    with ProcessPoolExecutor() as pool:
        if quiet and args.seeds:
            report("Quiet profiles", list(pool.map(run, [(p, s, True) for p in quiet for s in range(args.seeds)])))
        if noisy and args.noisy_seeds:
            jobs = [(p, s, False) for p in noisy for s in range(args.noisy_seeds)]
            report("Service-time cv 0.5", list(pool.map(run, jobs)))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
