"""Processor, memory and accelerators of the machine that runs the gate, read on a thread of their own.

Reading them takes from 0.1 to tens of milliseconds, which on the event loop would stall every stream. A handler only
takes the latest reading.
"""

import threading

import msgspec
import psutil

from loadstone.wire.accelerators import Accelerators

_STOP_WITHIN_S = 1.0


class Gpu(msgspec.Struct, frozen=True):
    """Shares, 0 … 1; None where the driver does not tell."""

    memory: float | None
    """In use, of the fullest accelerator."""
    use: float | None
    """Of the time that the busiest one worked."""


class Resources(msgspec.Struct, frozen=True):
    """One reading; None where there is none yet."""

    cpu: float | None = None
    """Share of all cores that was busy since the reading before, 0 … 1."""
    memory: float | None = None
    """Share in use, 0 … 1."""
    gpu: Gpu | None = None
    """None where there is no accelerator."""


class Machine:
    """Reads this machine; each reading counts processor time since the one before."""

    def __init__(self) -> None:
        self._accelerators = Accelerators()
        psutil.cpu_percent(interval=None)  # the first call only sets the mark that the next one counts from

    def read(self) -> Resources:
        """Blocks for as long as the driver takes."""
        gpu = Gpu(self._accelerators.memory(), self._accelerators.use()) if self._accelerators else None
        memory = psutil.virtual_memory()
        return Resources(
            cpu=psutil.cpu_percent(interval=None) / 100,
            memory=1 - memory.available / memory.total,
            gpu=gpu,
        )

    def __repr__(self) -> str:
        return f"<Machine, {len(self._accelerators)} accelerators>"


class Sampler:
    """Takes a reading every ``period_s`` from ``start`` to ``stop``; ``latest`` costs nothing."""

    def __init__(self, period_s: float = 1.0) -> None:
        self._period_s = period_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="resources", daemon=True)
        self.latest = Resources()

    def start(self) -> None:
        """Begin, once."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; one that hangs in a driver is left behind."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_WITHIN_S)

    def _run(self) -> None:
        # Made here: finding the accelerators can take a second.
        machine = Machine()
        while not self._stopping.wait(self._period_s):
            self.latest = machine.read()

    def __repr__(self) -> str:
        return f"<Sampler {'running' if self._thread.is_alive() else 'stopped'}, {self.latest}>"
