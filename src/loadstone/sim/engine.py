"""A continuous-batching engine as a pure state machine: no clock, no sockets, integer nanoseconds as arguments.

Theory of operation
-------------------
Work proceeds in steps. At the start of a step every decoding sequence gets one token of the budget
``max_num_batched_tokens``; what is left goes to prefill, first to the sequence whose prompt is half done, then to the
head of the waiting queue, while ``max_num_seqs`` and free KV blocks allow. A chunk takes the whole rest of the budget,
so at most one prompt is half done, and it belongs to the newest running sequence. At the end of the step tokens are
out, finished sequences leave, and the next step begins at that very instant: what arrives meanwhile waits for it, as
in vLLM. Where blocks run out, the newest running sequence loses its blocks, goes back to the head of the queue and is
computed again (prompt and tokens so far); a step that preempted admits nobody.

The work per step does not grow with the number of running sequences, because they all move in lockstep with one
counter, the number of decode steps begun. A sequence keeps the counter's value at which it joined; its tokens follow
by subtraction. The next chunk it owes the client stands in a bucket keyed by the counter's value at that time, and
the number of sequences that cross a block boundary at a step is kept in a ring of ``block_size`` counts.
"""

import math
from collections import deque
from enum import Enum
from random import Random
from typing import NamedTuple

from loadstone.sim.profiles import Profile


class Submission(Enum):
    """What became of a submitted job."""

    ACCEPTED = "accepted"
    FULL = "full"
    """Running and waiting places are taken."""
    TOO_LONG = "too long"
    """Prompt and reply would not fit the whole KV cache."""


class Emission(NamedTuple):
    """Tokens to be sent to a client."""

    job: int
    tokens: int
    """Tokens of the reply generated so far, those of earlier emissions included."""
    finished: bool


class _Sequence:
    """A job inside the engine. ``life`` changes each time it leaves the batch, which voids its bucket entries."""

    __slots__ = ("decoding", "generated", "job", "joined", "kv_tokens", "life", "output_tokens", "prompt_tokens")

    def __init__(self, job: int, prompt_tokens: int, output_tokens: int) -> None:
        self.job = job
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.generated = 0
        """Tokens out when decoding (last) began; the decode counter gives the rest."""
        self.kv_tokens = 0
        """Tokens in the cache when decoding (last) began, or so far while the prompt is being read."""
        self.joined = 0
        self.life = 0
        self.decoding = False

    def __repr__(self) -> str:
        return f"<sequence {self.job}: {self.prompt_tokens}+{self.generated}/{self.output_tokens}>"


class Engine:
    """``submit`` and ``cancel`` jobs; whenever ``next_ns`` has come, ``step()``. Counters as vLLM names them."""

    def __init__(self, profile: Profile, seed: int = 0) -> None:
        self._profile = profile
        self._random = Random(seed)
        self._waiting: deque[_Sequence] = deque()
        self._waiting_gone = 0
        self._running: dict[int, _Sequence] = {}
        self._jobs: dict[int, _Sequence] = {}
        self._half_read: _Sequence | None = None
        self._read: list[tuple[_Sequence, int]] = []
        self._decoding = 0
        self._decode_steps = 0
        self._boundaries = [0] * profile.block_size
        self._due: dict[int, list[tuple[_Sequence, int]]] = {}
        self._free_blocks = profile.num_kv_blocks
        self._resident_tokens = 0
        self._first_ns: int | None = None
        self.next_ns: int | None = None
        """End of the step under way, None while idle."""
        self.preemptions_total = 0
        self.prompt_tokens_total = 0
        self.generation_tokens_total = 0
        self.finished_total = 0

    @property
    def num_requests_running(self) -> int:
        return len(self._running)

    @property
    def num_requests_waiting(self) -> int:
        return len(self._waiting) - self._waiting_gone

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV blocks in use, 0 … 1."""
        return 1.0 - self._free_blocks / self._profile.num_kv_blocks

    def submit(self, job: int, prompt_tokens: int, output_tokens: int, now_ns: int) -> Submission:
        """Queue a job (lengths ≥ 1); an idle engine begins a step with it at once."""
        profile = self._profile
        if self._blocks(prompt_tokens + output_tokens) > profile.num_kv_blocks:
            return Submission.TOO_LONG
        if profile.max_waiting is not None and len(self._jobs) >= profile.max_num_seqs + profile.max_waiting:
            return Submission.FULL
        sequence = _Sequence(job, prompt_tokens, output_tokens)
        self._jobs[job] = sequence
        self._waiting.append(sequence)
        if self._first_ns is None:
            self._first_ns = now_ns
        if self.next_ns is None:
            self._begin_step(now_ns)
        return Submission.ACCEPTED

    def cancel(self, job: int) -> None:
        """Drop a job and free its blocks; the step under way keeps its time. Unknown jobs are ignored."""
        sequence = self._jobs.pop(job, None)
        if sequence is None:
            return
        if job in self._running:
            self._evict(sequence)
        else:
            self._waiting_gone += 1

    def step(self) -> list[Emission]:
        """End the step under way (at ``next_ns``) and begin the next: what goes to the clients now.

        Raises RuntimeError where no step is under way.
        """
        now_ns = self.next_ns
        if now_ns is None:
            raise RuntimeError("no step is under way")
        emissions: list[Emission] = []
        self.generation_tokens_total += self._decoding
        for sequence, life in self._due.pop(self._decode_steps, ()):
            if sequence.life == life:
                self._emit(sequence, emissions)
        read, self._read = self._read, []
        for sequence, life in read:
            if sequence.life == life:
                self._start_decoding(sequence, emissions)
        self._begin_step(now_ns)
        return emissions

    # -- the start of a step ------------------------------------------------------------------------------------

    def _begin_step(self, now_ns: int) -> None:
        admitting = self._make_room()
        decodes = self._decoding
        if decodes:
            self._free_blocks -= self._boundaries[self._decode_steps % self._profile.block_size]
            self._resident_tokens += decodes
            self._decode_steps += 1
        prefill_tokens = self._prefill(self._profile.max_num_batched_tokens - decodes, admitting)
        if not decodes and not prefill_tokens:
            self.next_ns = None
            return
        self.next_ns = now_ns + self._duration_ns(decodes, prefill_tokens, now_ns)

    def _make_room(self) -> bool:
        """Preempt until every decoding sequence has a place for its next token; whether none had to go."""
        crossing = self._decode_steps % self._profile.block_size
        preempted = False
        while self._boundaries[crossing] > self._free_blocks:
            sequence = self._running[next(reversed(self._running))]
            sequence.generated = self._generated(sequence)
            self._evict(sequence)
            sequence.kv_tokens = 0
            self._waiting.appendleft(sequence)
            self.preemptions_total += 1
            preempted = True
        return not preempted

    def _prefill(self, budget: int, admitting: bool) -> int:
        """Spend ``budget`` tokens on prompts; returns the tokens read."""
        left = budget
        if self._half_read is not None:
            left -= self._read_chunk(self._half_read, left)
        while admitting and left and self._half_read is None and len(self._running) < self._profile.max_num_seqs:
            sequence = self._head()
            if sequence is None or not self._fits(sequence, left):
                break
            self._waiting.popleft()
            self._running[sequence.job] = sequence
            left -= self._read_chunk(sequence, left)
        return budget - left

    def _head(self) -> _Sequence | None:
        """The first waiting sequence whose client has not left."""
        while self._waiting:
            if self._waiting[0].job in self._jobs:
                return self._waiting[0]
            self._waiting.popleft()
            self._waiting_gone -= 1
        return None

    def _fits(self, sequence: _Sequence, budget: int) -> bool:
        chunk = min(budget, sequence.prompt_tokens + sequence.generated - sequence.kv_tokens)
        more = self._blocks(sequence.kv_tokens + chunk) - self._blocks(sequence.kv_tokens)
        return more <= self._free_blocks

    def _read_chunk(self, sequence: _Sequence, budget: int) -> int:
        """Read as much of the prompt as ``budget`` allows; a half-read prompt without free blocks waits for them."""
        if not self._fits(sequence, budget):
            return 0
        target = sequence.prompt_tokens + sequence.generated
        chunk = min(budget, target - sequence.kv_tokens)
        self._free_blocks -= self._blocks(sequence.kv_tokens + chunk) - self._blocks(sequence.kv_tokens)
        self._resident_tokens += chunk
        sequence.kv_tokens += chunk
        if sequence.kv_tokens == target:
            self._half_read = None
            self._read.append((sequence, sequence.life))
        else:
            self._half_read = sequence
        return chunk

    def _duration_ns(self, decodes: int, prefill_tokens: int, now_ns: int) -> int:
        profile = self._profile
        seconds = profile.step_s(decodes, prefill_tokens, self._resident_tokens) * self._pace(now_ns)
        if len(self._running) == 2:
            seconds *= profile.pair_factor
        if profile.step_cv:
            variance = math.log1p(profile.step_cv**2)
            seconds *= self._random.lognormvariate(-variance / 2, math.sqrt(variance))
        return max(1, round(seconds * 1e9))

    def _pace(self, now_ns: int) -> float:
        factor = 1.0
        for from_s, value in self._profile.pace:
            if self._first_ns is not None and now_ns - self._first_ns >= from_s * 1e9:
                factor = value
        return factor

    # -- the life of a sequence ---------------------------------------------------------------------------------

    def _start_decoding(self, sequence: _Sequence, emissions: list[Emission]) -> None:
        """The prompt has been read: the first token (or, after a preemption, the next) is out."""
        if sequence.generated == 0:
            self.prompt_tokens_total += sequence.prompt_tokens
        sequence.generated += 1
        self.generation_tokens_total += 1
        sequence.joined = self._decode_steps
        sequence.decoding = True
        self._decoding += 1
        self._boundaries[self._boundary(sequence)] += 1
        tokens = sequence.generated
        if tokens == 1 or tokens == sequence.output_tokens or tokens % self._profile.stream_interval == 0:
            self._emit(sequence, emissions)
        else:
            self._schedule(sequence, tokens)

    def _emit(self, sequence: _Sequence, emissions: list[Emission]) -> None:
        tokens = self._generated(sequence)
        finished = tokens == sequence.output_tokens
        emissions.append(Emission(sequence.job, tokens, finished))
        if not finished:
            self._schedule(sequence, tokens)
            return
        del self._jobs[sequence.job]
        self._evict(sequence)
        self.finished_total += 1

    def _schedule(self, sequence: _Sequence, tokens: int) -> None:
        """Note the step at which the next chunk of a sequence with ``tokens`` out is due."""
        interval = self._profile.stream_interval
        following = min(tokens - tokens % interval + interval, sequence.output_tokens)
        step = sequence.joined + following - sequence.generated
        self._due.setdefault(step, []).append((sequence, sequence.life))

    def _evict(self, sequence: _Sequence) -> None:
        """Take a running sequence off the batch and free its blocks."""
        del self._running[sequence.job]
        tokens = sequence.kv_tokens
        if sequence.decoding:
            tokens += self._decode_steps - sequence.joined
            self._boundaries[self._boundary(sequence)] -= 1
            self._decoding -= 1
            sequence.decoding = False
        elif sequence is self._half_read:
            self._half_read = None
        self._free_blocks += self._blocks(tokens)
        self._resident_tokens -= tokens
        sequence.life += 1

    def _generated(self, sequence: _Sequence) -> int:
        if not sequence.decoding:
            return sequence.generated
        return sequence.generated + self._decode_steps - sequence.joined

    def _boundary(self, sequence: _Sequence) -> int:
        """The decode steps, modulo ``block_size``, at whose start the sequence needs one more block."""
        return (sequence.joined - sequence.kv_tokens) % self._profile.block_size

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._profile.block_size)

    def __repr__(self) -> str:
        return (
            f"<Engine {self._profile.name}: {self.num_requests_running} running, "
            f"{self.num_requests_waiting} waiting, KV {self.kv_cache_usage:.0%}>"
        )
