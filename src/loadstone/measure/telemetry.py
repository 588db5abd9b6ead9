"""What went on beside the requests of a level: the server's own metrics, both machines' resources, our own starvation.

Every half second a timer fires. The server is asked for its metrics, never a second time while an answer is
outstanding; the machine is read when that answer comes, or at once where none is awaited. Counters are kept as they
stand, so that any window's share is a difference of two samples.
"""

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import pairwise
from urllib.parse import urlsplit

import msgspec

from loadstone.core.clock import Clock, Timer
from loadstone.core.engine_metrics import EngineMetrics, read_engine_metrics
from loadstone.measure.machine import Machine, MachineReading

_PERIOD_NS = 500_000_000

Fetch = Callable[[], Awaitable[str | None]]
"""Text of the server's ``/metrics``, None where it gives none; raises nothing that a bad server can cause."""


class TelemetrySample(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of ``telemetry.jsonl.zst``."""

    t_s: float
    """Since the level's t0."""
    server: EngineMetrics | None = None
    machine: MachineReading = MachineReading()


class Telemetry:
    """The sampler of one run: ``start`` at a level's t0, ``stop`` for its samples, then the next level.

    A server that answers the very first question with None has no metrics and is not asked again. Without ``machine``
    (in virtual time) only the server is read.
    """

    def __init__(self, clock: Clock, fetch: Fetch | None, machine: Machine | None) -> None:
        self._clock = clock
        self._fetch = fetch
        self._machine = machine
        self._answered = False
        self._t0_ns = 0
        self._next_ns = 0
        self._samples: list[TelemetrySample] = []
        self._timer: Timer | None = None
        self._asking: asyncio.Task[None] | None = None

    def start(self, t0_ns: int) -> None:
        """Begin a level; the first sample is taken at once. Call inside the running loop."""
        self._samples = []
        self._t0_ns = t0_ns
        self._next_ns = self._clock.now_ns()
        self._tick()

    @property
    def samples(self) -> list[TelemetrySample]:
        """Of the running level so far."""
        return self._samples

    async def stop(self) -> list[TelemetrySample]:
        """End the level: a last look at the machine, and all samples in order of time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.cancel()
            await asyncio.wait({asking})
            if not asking.cancelled():
                asking.result()
        self._keep(None)
        return self._samples

    def _tick(self) -> None:
        # A stalled loop must not be followed by a burst of samples.
        self._next_ns = max(self._next_ns + _PERIOD_NS, self._clock.now_ns())
        self._timer = self._clock.call_at(self._next_ns, self._tick)
        if self._fetch is not None and self._free_to_ask():
            self._asking = asyncio.ensure_future(self._ask(self._fetch))
        else:
            self._keep(None)

    def _free_to_ask(self) -> bool:
        """Nothing outstanding; a question that failed stays, and its error is raised by ``stop``."""
        asking = self._asking
        return asking is None or (asking.done() and asking.exception() is None)

    async def _ask(self, fetch: Fetch) -> None:
        text = await fetch()
        if text is None and not self._answered:
            self._fetch = None
        self._answered = self._answered or text is not None
        self._keep(None if text is None else read_engine_metrics(text))

    def _keep(self, server: EngineMetrics | None) -> None:
        t_s = (self._clock.now_ns() - self._t0_ns) / 1e9
        machine = self._machine.read() if self._machine else MachineReading()
        self._samples.append(TelemetrySample(t_s, server, machine))

    def __repr__(self) -> str:
        state = "idle" if self._timer is None else "sampling"
        return f"<Telemetry {state}, {len(self._samples)} samples, server {'' if self._fetch else 'not '}asked>"


class ServerFigures(msgspec.Struct, frozen=True):
    """The samples of a window in one line; None where nothing told it."""

    engine: str = ""
    preallocates: bool = False
    """The engine takes its device memory at the start: judge its KV cache, not the device."""
    kv_use: float | None = None
    """Median, as are ``running``, ``waiting``, ``host_cpu`` and ``device_use``."""
    running: float | None = None
    waiting: float | None = None
    preemptions: float | None = None
    """How many more by the end of the window."""
    restarted: bool = False
    """The server has another start time, or one of its counters fell."""
    host_memory_free: float | None = None
    """Least share. Of the generator's machine, which is the server's only where the server is local; so for devices."""
    device_memory: float | None = None
    """Greatest share."""
    device_use: float | None = None
    host_cpu: float | None = None
    client_cpu: float | None = None
    """Share of one core that the generator's thread used."""
    run_queue_wait: float | None = None
    """Share of the time that the generator's thread waited for a core."""

    def as_row(self) -> dict[str, float]:
        """The server's figures that are known, for a level's row."""
        known = {name: getattr(self, name) for name in ("kv_use", "running", "waiting", "preemptions")}
        return {name: value for name, value in known.items() if value is not None}


def is_loopback(base_url: str) -> bool:
    """Whether the server runs on this machine, so that this machine's memory is the server's."""
    host = urlsplit(base_url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def summarise_telemetry(samples: Sequence[TelemetrySample], w0_s: float, w1_s: float) -> ServerFigures:
    """What the samples say of the window [w0_s, w1_s), both in seconds since t0.

    Differences run from the last sample before the window to the first after it, so that even a short window has two.
    """
    around = _around(samples, w0_s, w1_s)
    inside = [sample for sample in around if w0_s <= sample.t_s < w1_s] or around
    said = [sample.server for sample in around if sample.server is not None]
    said_inside = [sample.server for sample in inside if sample.server is not None] or said
    machines = [sample.machine for sample in inside]
    engine = said[-1] if said else EngineMetrics()
    return ServerFigures(
        engine=engine.engine,
        preallocates=engine.preallocates,
        kv_use=_median(metrics.kv_use for metrics in said_inside),
        running=_median(metrics.running for metrics in said_inside),
        waiting=_median(metrics.waiting for metrics in said_inside),
        preemptions=_growth([metrics.preemptions_total for metrics in said]),
        restarted=_restarted(said),
        host_memory_free=min(_known(machine.host_memory_free for machine in machines), default=None),
        device_memory=max(_known(machine.device_memory for machine in machines), default=None),
        device_use=_median(machine.device_use for machine in machines),
        host_cpu=_median(machine.host_cpu for machine in machines),
        client_cpu=_share([(sample.t_s, sample.machine.client_cpu_s) for sample in around]),
        run_queue_wait=_share([(sample.t_s, sample.machine.run_queue_wait_s) for sample in around]),
    )


def _around(samples: Sequence[TelemetrySample], w0_s: float, w1_s: float) -> list[TelemetrySample]:
    first = max((i for i, sample in enumerate(samples) if sample.t_s <= w0_s), default=0)
    last = next((i for i, sample in enumerate(samples) if sample.t_s >= w1_s), len(samples) - 1)
    return list(samples[first : last + 1])


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _median(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return statistics.median(known) if known else None


def _growth(counter: Sequence[float | None]) -> float | None:
    """How much a counter grew; from zero again where it fell."""
    known = _known(counter)
    if len(known) < 2:
        return None
    return sum(b - a if b >= a else b for a, b in pairwise(known))


def _restarted(said: Sequence[EngineMetrics]) -> bool:
    if len({metrics.started_at_s for metrics in said if metrics.started_at_s is not None}) > 1:
        return True
    counters = (
        _known(getattr(metrics, name) for metrics in said)
        for name in ("prompt_tokens_total", "generation_tokens_total", "preemptions_total")
    )
    return any(b < a for counter in counters for a, b in pairwise(counter))


def _share(counter_s: Sequence[tuple[float, float | None]]) -> float | None:
    """Growth of a counter of seconds ÷ the time it took."""
    known = [(t_s, value) for t_s, value in counter_s if value is not None]
    if len(known) < 2 or known[-1][0] <= known[0][0]:
        return None
    return (known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0])
