"""This machine's memory, accelerators and cores, and how much of them the generator was given; nothing here blocks."""

import threading
import time
from pathlib import Path

import msgspec
import psutil

from loadstone.wire.accelerators import Accelerators


class MachineReading(msgspec.Struct, frozen=True, omit_defaults=True):
    """One look at the machine that runs the generator. None where it cannot be read."""

    host_memory_free: float | None = None
    """Share of the memory that is available, 0 … 1."""
    host_cpu: float | None = None
    """Share of all cores that was busy since the last reading, 0 … 1."""
    device_memory: float | None = None
    """Share in use of the fullest accelerator, 0 … 1."""
    device_use: float | None = None
    """Share of time the busiest accelerator worked, 0 … 1."""
    client_cpu_s: float | None = None
    """CPU time of the generator's thread since its start."""
    run_queue_wait_s: float | None = None
    """Time the generator's thread was ready to run and had no core, since its start."""


class Machine:
    """Reads this machine; make it on the thread that runs the generator.

    Without an NVIDIA driver the device figures stay None.
    """

    def __init__(self) -> None:
        self._schedstat = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._accelerators = Accelerators()
        psutil.cpu_percent(interval=None)  # the first call only sets the mark that the next one counts from

    def read(self) -> MachineReading:
        memory = psutil.virtual_memory()
        return MachineReading(
            host_memory_free=memory.available / memory.total,
            host_cpu=psutil.cpu_percent(interval=None) / 100,
            device_memory=self._accelerators.memory(),
            device_use=self._accelerators.use(),
            client_cpu_s=time.thread_time(),
            run_queue_wait_s=self._run_queue_wait_s(),
        )

    def _run_queue_wait_s(self) -> float | None:
        try:
            return int(self._schedstat.read_text().split()[1]) / 1e9
        except FileNotFoundError:  # not Linux, or a kernel without schedstats
            return None

    def __repr__(self) -> str:
        return f"<Machine, {len(self._accelerators)} accelerators>"
