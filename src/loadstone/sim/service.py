"""The engine behind its front door: what a server does besides computing, pleasant or not. Pure, like the engine."""

from enum import Enum
from random import Random

from loadstone.sim.engine import Emission, Engine, Submission
from loadstone.sim.profiles import Profile


class Fate(Enum):
    """What the server does with a request on its arrival."""

    SERVED = "served"
    REFUSED = "refused"
    """503 at once."""
    ERROR = "error"
    """500 at once."""
    TOO_LONG = "too long"
    """400 at once: more tokens than the KV cache holds."""
    HUNG = "hung"
    """Accepted, never answered."""


_FATES = {Submission.ACCEPTED: Fate.SERVED, Submission.FULL: Fate.REFUSED, Submission.TOO_LONG: Fate.TOO_LONG}


class Service:
    """One simulated server. Jobs are numbered by the caller, never twice the same; times are nanoseconds."""

    def __init__(self, profile: Profile, seed: int = 0) -> None:
        self.profile = profile
        self.engine = Engine(profile, seed)
        self._random = Random(seed + 1)
        self._served: set[int] = set()
        self._hung: set[int] = set()

    @property
    def in_flight(self) -> int:
        """Requests accepted and not ended, work whose client has left included."""
        return len(self._served) + len(self._hung)

    @property
    def next_ns(self) -> int | None:
        """When ``advance`` is due, None while nothing is computed."""
        return self.engine.next_ns

    def arrive(self, job: int, prompt_tokens: int, output_tokens: int, now_ns: int) -> Fate:
        """A request for ``output_tokens`` at most (lengths below 1 count as 1)."""
        fate = self._whim()
        if fate is Fate.HUNG:
            self._hung.add(job)
        if fate is not Fate.SERVED:
            return fate
        output_tokens = self._reply_length(max(1, output_tokens))
        fate = _FATES[self.engine.submit(job, max(1, prompt_tokens), output_tokens, now_ns)]
        if fate is Fate.SERVED:
            self._served.add(job)
        return fate

    def leave(self, job: int) -> None:
        """The client has gone. Jobs that have ended are ignored."""
        self._hung.discard(job)
        if job in self._served and not self.profile.work_outlives_client:
            self._served.remove(job)
            self.engine.cancel(job)

    def advance(self) -> list[Emission]:
        """End the engine's step at ``next_ns``; tokens for clients that have left are among the emissions."""
        emissions = self.engine.step()
        for emission in emissions:
            if emission.finished:
                self._served.remove(emission.job)
        return emissions

    def _whim(self) -> Fate:
        profile = self.profile
        if profile.error_rate and self._random.random() < profile.error_rate:
            return Fate.ERROR
        if profile.hang_rate and self._random.random() < profile.hang_rate:
            return Fate.HUNG
        if profile.refuse_beyond is not None and self.in_flight >= profile.refuse_beyond:
            return Fate.REFUSED
        if profile.hang_beyond is not None and len(self._served) >= profile.hang_beyond:
            return Fate.HUNG
        return Fate.SERVED

    def _reply_length(self, asked: int) -> int:
        """A beta-distributed share with mean 1/2 has cv² = 1/(2α + 1)."""
        cv = self.profile.length_cv
        if not cv:
            return asked
        alpha = (1 / cv**2 - 1) / 2
        return max(1, round(asked * self._random.betavariate(alpha, alpha)))

    def __repr__(self) -> str:
        return f"<Service {self.profile.name}: {self.in_flight} in flight, {self.engine!r}>"
