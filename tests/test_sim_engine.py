"""The simulated engine: against hand-worked timelines, and against a plain engine that recounts everything."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.core.errors import UsageError
from loadstone.sim.engine import Emission, Engine, Submission
from loadstone.sim.profiles import PROFILES, Profile, named
from loadstone.sim.service import Fate, Service

MS = 1_000_000
PLAIN = Profile("plain", base_s=0.010)


def drain(engine: Engine) -> list[tuple[int, Emission]]:
    """(time in ms, emission) until the engine is idle."""
    seen = []
    while (now_ns := engine.next_ns) is not None:
        seen += [(now_ns // MS, emission) for emission in engine.step()]
    return seen


def test_one_request_takes_one_step_for_each_token() -> None:
    engine = Engine(PLAIN)
    assert engine.submit(1, 100, 3, 5 * MS) is Submission.ACCEPTED
    assert drain(engine) == [(15, (1, 1, False)), (25, (1, 2, False)), (35, (1, 3, True))]
    assert (engine.prompt_tokens_total, engine.generation_tokens_total, engine.finished_total) == (100, 3, 1)
    assert engine.kv_cache_usage == 0


def test_a_newcomer_waits_for_the_step_under_way() -> None:
    engine = Engine(PLAIN)
    engine.submit(1, 10, 3, 0)
    engine.submit(2, 10, 2, 4 * MS)
    assert (engine.num_requests_running, engine.num_requests_waiting) == (1, 1)
    assert drain(engine) == [
        (10, (1, 1, False)),
        (20, (1, 2, False)),
        (20, (2, 1, False)),
        (30, (1, 3, True)),
        (30, (2, 2, True)),
    ]


def test_step_time_is_the_sum_of_its_parts() -> None:
    profile = replace(PLAIN, per_decode_seq_s=0.001, per_prefill_token_s=0.000_1, kv_token_s=0.000_01)
    engine = Engine(profile)
    engine.submit(1, 100, 2, 0)
    # 10 ms + 100 prompt tokens at 0.1 ms + 100 resident at 0.01 ms; then 10 + 1 decode + 101 resident
    assert [t for t, _ in drain(engine)] == [21, 33]
    assert profile.step_s(1, 0, 101) == pytest.approx(0.01201)


def test_a_long_prompt_is_read_in_chunks_beside_the_decodes() -> None:
    engine = Engine(replace(PLAIN, max_num_batched_tokens=41, max_num_seqs=4))
    engine.submit(1, 10, 9, 0)
    engine.submit(2, 100, 1, 0)
    # from the second step on one token goes to job 1 and 40 to the prompt: 40 + 40 + 20
    assert (40, (2, 1, True)) in drain(engine)


def test_places_in_the_batch_are_bounded_and_the_queue_is_fifo() -> None:
    engine = Engine(replace(PLAIN, max_num_seqs=2))
    for job in range(1, 6):
        engine.submit(job, 10, 2, 0)
    finished = [emission.job for _, emission in drain(engine) if emission.finished]
    assert finished == [1, 2, 3, 4, 5]


def test_a_bounded_queue_refuses_and_a_hopeless_request_is_told() -> None:
    engine = Engine(replace(PLAIN, max_num_seqs=1, max_waiting=1, num_kv_blocks=4))
    assert engine.submit(1, 60, 5, 0) is Submission.TOO_LONG
    answers = [engine.submit(job, 10, 2, 0) for job in (2, 3, 4)]
    assert answers == [Submission.ACCEPTED, Submission.ACCEPTED, Submission.FULL]


def test_stream_interval_merges_tokens_but_not_the_first() -> None:
    engine = Engine(replace(PLAIN, stream_interval=4))
    engine.submit(1, 10, 10, 0)
    assert [emission.tokens for _, emission in drain(engine)] == [1, 4, 8, 10]


def test_the_newest_is_preempted_and_computed_again() -> None:
    engine = Engine(replace(PLAIN, num_kv_blocks=4))
    engine.submit(1, 30, 20, 0)
    engine.submit(2, 30, 20, 0)
    seen = drain(engine)
    assert engine.preemptions_total >= 1
    assert [e.tokens for _, e in seen if e.job == 1] == list(range(1, 21))
    assert [e.tokens for _, e in seen if e.job == 2] == list(range(1, 21))
    assert max(t for t, e in seen if e.job == 1) < max(t for t, e in seen if e.job == 2)
    assert engine.kv_cache_usage == 0
    assert engine.prompt_tokens_total == 60


def test_cancelling_frees_blocks_wherever_the_job_is() -> None:
    engine = Engine(replace(PLAIN, max_num_seqs=2, max_num_batched_tokens=16))
    engine.submit(1, 10, 50, 0)
    engine.submit(2, 100, 5, 0)  # half read after the second step
    engine.submit(3, 10, 5, 0)  # waiting
    engine.step()
    engine.step()
    for job in (3, 2, 1, 7):
        engine.cancel(job)
    assert engine.kv_cache_usage == 0
    assert (engine.num_requests_running, engine.num_requests_waiting) == (0, 0)
    assert drain(engine) == []
    with pytest.raises(RuntimeError, match="no step is under way"):
        engine.step()


def test_pace_pairs_and_noise_change_the_step_time() -> None:
    slow = Engine(replace(PLAIN, pace=((0.0, 3.0), (0.05, 1.0))))
    slow.submit(1, 10, 4, 7 * MS)
    assert [t for t, _ in drain(slow)] == [37, 67, 77, 87]
    pair = Engine(replace(PLAIN, pair_factor=2.0))
    pair.submit(1, 10, 3, 0)
    pair.submit(2, 10, 2, 0)
    assert [t for t, _ in drain(pair)] == [10, 30, 30, 50, 50]
    noisy = Engine(replace(PLAIN, step_cv=0.5), seed=1)
    noisy.submit(1, 10, 4000, 0)
    assert drain(noisy)[-1][0] == pytest.approx(40_000, rel=0.03)


# -- against a plain engine -----------------------------------------------------------------------------------------


@dataclass
class PlainJob:
    job: int
    prompt: int
    output: int
    out: int = 0
    kv: int = 0
    blocks: int = 0


class PlainEngine:
    """The same rules, each sequence looked at in each step."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.waiting: list[PlainJob] = []
        self.running: list[PlainJob] = []
        self.decoding: list[PlainJob] = []
        self.read: list[PlainJob] = []
        self.busy = False
        self.preempted = 0

    def free(self) -> int:
        return self.profile.num_kv_blocks - sum(job.blocks for job in self.running)

    def submit(self, job: int, prompt: int, output: int) -> None:
        self.waiting.append(PlainJob(job, prompt, output))
        if not self.busy:
            self.begin()

    def cancel(self, number: int) -> None:
        for jobs in (self.waiting, self.running, self.decoding, self.read):
            jobs[:] = [job for job in jobs if job.job != number]

    def begin(self) -> None:
        room = True
        self.decoding = [
            job for job in self.running if job.kv >= job.prompt and job.out and job.kv >= job.prompt + job.out - 1
        ]
        while sum(job.kv % self.profile.block_size == 0 for job in self.decoding) > self.free():
            newest = self.running.pop()
            self.decoding = [job for job in self.decoding if job is not newest]
            newest.kv = newest.blocks = 0
            self.waiting.insert(0, newest)
            self.preempted += 1
            room = False
        for job in self.decoding:
            job.kv += 1
            job.blocks = -(-job.kv // self.profile.block_size)
        budget = self.profile.max_num_batched_tokens - len(self.decoding)
        self.read = []
        reading = [job for job in self.running if job not in self.decoding]
        for job in reading:
            budget -= self.read_chunk(job, budget)
        while room and budget and self.waiting and len(self.running) < self.profile.max_num_seqs:
            if any(job.kv < job.prompt + job.out for job in self.running if job not in self.decoding):
                break
            if not self.fits(self.waiting[0], budget):
                break
            job = self.waiting.pop(0)
            self.running.append(job)
            budget -= self.read_chunk(job, budget)
        self.busy = bool(self.decoding or budget < self.profile.max_num_batched_tokens - len(self.decoding))

    def fits(self, job: PlainJob, budget: int) -> bool:
        chunk = min(budget, job.prompt + job.out - job.kv)
        return -(-(job.kv + chunk) // self.profile.block_size) - job.blocks <= self.free()

    def read_chunk(self, job: PlainJob, budget: int) -> int:
        if not self.fits(job, budget):
            return 0
        chunk = min(budget, job.prompt + job.out - job.kv)
        job.kv += chunk
        job.blocks = -(-job.kv // self.profile.block_size)
        if job.kv == job.prompt + job.out:
            self.read.append(job)
        return chunk

    def step(self) -> set[tuple[int, int, bool]]:
        seen = set()
        for job in [*self.decoding, *self.read]:
            job.out += 1
            seen.add((job.job, job.out, job.out == job.output))
            if job.out == job.output:
                self.running.remove(job)
        self.begin()
        return seen


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 60), st.integers(1, 40)),
        st.tuples(st.just("step"), st.integers(1, 12), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(1, 20), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(ACTIONS, st.integers(1, 6), st.integers(6, 50), st.integers(7, 30))
def test_it_agrees_with_an_engine_that_looks_at_every_sequence(
    actions: list[tuple[str, int, int]], seqs: int, batched: int, blocks: int
) -> None:
    profile = replace(PLAIN, max_num_seqs=seqs, max_num_batched_tokens=batched, num_kv_blocks=blocks)
    engine, plain = Engine(profile), PlainEngine(profile)
    jobs = 0

    def both_step() -> None:
        assert {tuple(emission) for emission in engine.step()} == plain.step()
        assert engine.kv_cache_usage == pytest.approx(1 - plain.free() / blocks)
        assert engine.num_requests_running == len(plain.running) <= seqs
        assert engine.num_requests_waiting == len(plain.waiting)
        assert engine.preemptions_total == plain.preempted
        assert (engine.next_ns is not None) == plain.busy

    for action, first, second in actions:
        if action == "submit":
            jobs += 1
            assert engine.submit(jobs, first, second, engine.next_ns or 0) is Submission.ACCEPTED
            plain.submit(jobs, first, second)
        elif action == "cancel":
            engine.cancel(first)
            plain.cancel(first)
        else:
            for _ in range(first):
                if engine.next_ns is not None:
                    both_step()
    while engine.next_ns is not None:
        both_step()
    assert engine.kv_cache_usage == 0
    assert engine.num_requests_running == engine.num_requests_waiting == 0


# -- what stands before the engine ----------------------------------------------------------------------------------


def test_refusals_and_hangs_beyond_a_limit() -> None:
    refusing = Service(replace(PLAIN, refuse_beyond=2))
    assert [refusing.arrive(job, 1, 1, 0) for job in (1, 2, 3)] == [Fate.SERVED, Fate.SERVED, Fate.REFUSED]
    refusing.leave(1)
    assert refusing.arrive(4, 1, 1, 0) is Fate.SERVED
    hanging = Service(replace(PLAIN, hang_beyond=1))
    assert [hanging.arrive(job, 1, 1, 0) for job in (1, 2)] == [Fate.SERVED, Fate.HUNG]
    assert hanging.in_flight == 2
    hanging.leave(2)
    hanging.advance()
    assert hanging.in_flight == 0


def test_stray_errors_and_hangs_come_at_their_rate() -> None:
    service = Service(replace(PLAIN, error_rate=0.1, hang_rate=0.05), seed=3)
    fates = [service.arrive(job, 1, 1, 0) for job in range(10_000)]
    assert fates.count(Fate.ERROR) == pytest.approx(1000, rel=0.1)
    assert fates.count(Fate.HUNG) == pytest.approx(450, rel=0.15)


def test_work_may_outlive_its_client() -> None:
    service = Service(replace(PLAIN, work_outlives_client=True))
    service.arrive(1, 10, 5, 0)
    service.leave(1)
    assert (service.in_flight, service.engine.num_requests_running) == (1, 1)
    while service.next_ns is not None:
        service.advance()
    assert service.in_flight == 0


def test_replies_that_end_by_themselves_keep_within_what_was_asked() -> None:
    service = Service(replace(PLAIN, length_cv=0.5, max_num_seqs=4000, stream_interval=1 << 20), seed=1)
    for job in range(4000):
        service.arrive(job, 1, 100, 0)
    lengths = []
    while service.next_ns is not None:
        lengths += [emission.tokens for emission in service.advance() if emission.finished]
    mean = sum(lengths) / len(lengths)
    deviation = (sum((length - mean) ** 2 for length in lengths) / len(lengths)) ** 0.5
    assert 1 <= min(lengths) <= max(lengths) <= 100
    assert mean == pytest.approx(50, rel=0.03)
    assert deviation / mean == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"max_num_batched_tokens": 8}, "could not decode one token each"),
        ({"num_kv_blocks": -1}, "num_kv_blocks must be at least 1"),
    ],
)
def test_overrides_that_cannot_work_are_refused(overrides: dict[str, int | None], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        named("sharp-knee").with_overrides(**overrides)


def test_profiles_are_found_by_name() -> None:
    assert all(named(name).name == name for name in PROFILES)
    assert named("narrow").with_overrides(max_num_seqs=7, num_kv_blocks=None).max_num_seqs == 7
    with pytest.raises(UsageError, match="narrow, sharp-knee"):
        named("no-such")
