"""Runs a ``Service`` on a clock, real or virtual: one timer, each step at its own absolute time."""

from collections.abc import Callable

from loadstone.core.clock import Clock, Timer
from loadstone.sim.service import Fate, Service


class Driver:
    """Hands each job's tokens to its callback. A late timer delays callbacks, never the engine's own schedule."""

    def __init__(self, service: Service, clock: Clock) -> None:
        self._service = service
        self._clock = clock
        self._timer: Timer | None = None
        self._clients: dict[int, Callable[[int, bool], None]] = {}
        self._jobs = 0

    def arrive(
        self, prompt_tokens: int, output_tokens: int, on_tokens: Callable[[int, bool], None]
    ) -> tuple[Fate, int]:
        """Bring a request to the service; returns its fate and the job's number.

        Of a served job ``on_tokens(tokens so far, finished)`` is called until it has finished or left; it may
        bring or take away other jobs.
        """
        self._jobs += 1
        job = self._jobs
        fate = self._service.arrive(job, prompt_tokens, output_tokens, self._clock.now_ns())
        if fate is Fate.SERVED:
            self._clients[job] = on_tokens
            self._arm()
        return fate, job

    def leave(self, job: int) -> None:
        """The client has gone: no more calls for this job, whatever the service does with the work."""
        self._clients.pop(job, None)
        self._service.leave(job)

    def stop(self) -> None:
        """Arm no more timers: the service stands still."""
        self._clients.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        due_ns = self._service.next_ns
        if self._timer is None and due_ns is not None:
            self._timer = self._clock.call_at(due_ns, self._run)

    def _run(self) -> None:
        self._timer = None
        now_ns = self._clock.now_ns()
        while (due_ns := self._service.next_ns) is not None and due_ns <= now_ns:
            for job, tokens, finished in self._service.advance():
                on_tokens = self._clients.pop(job, None) if finished else self._clients.get(job)
                if on_tokens is not None:
                    on_tokens(tokens, finished)
        self._arm()

    def __repr__(self) -> str:
        return f"<Driver {len(self._clients)} clients of {self._service!r}>"
