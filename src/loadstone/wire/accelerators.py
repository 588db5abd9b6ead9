"""This machine's NVIDIA accelerators through NVML. Without a driver there are none.

A call can take milliseconds, so it has no place on an event loop that relays streams.
"""

from collections.abc import Callable, Iterable

import pynvml


class Accelerators:
    """The devices that were there when it was made."""

    def __init__(self) -> None:
        try:
            pynvml.nvmlInit()
            self._devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError:
            self._devices = []

    def __len__(self) -> int:
        return len(self._devices)

    def memory(self) -> float | None:
        """Share in use of the fullest device, 0 … 1; None where none tells it."""
        return _greatest(_told(_memory, device) for device in self._devices)

    def use(self) -> float | None:
        """Share of time the busiest device worked, 0 … 1; None where none tells it, as a partitioned one (MIG)."""
        return _greatest(_told(_use, device) for device in self._devices)

    def least_memory_bytes(self) -> int | None:
        """All of the memory of the smallest device; None where none tells it."""
        told = (_told(_total_bytes, device) for device in self._devices)
        return min((int(total) for total in told if total is not None), default=None)

    def __repr__(self) -> str:
        return f"<Accelerators {len(self)}>"


def _told(read: Callable[[object], float], device: object) -> float | None:
    try:
        return read(device)
    except pynvml.NVMLError:  # some share the host's memory and have none of their own; some are partitioned
        return None


def _memory(device: object) -> float:
    memory = pynvml.nvmlDeviceGetMemoryInfo(device)
    return float(memory.used) / float(memory.total)


def _total_bytes(device: object) -> float:
    return float(pynvml.nvmlDeviceGetMemoryInfo(device).total)


def _use(device: object) -> float:
    return float(pynvml.nvmlDeviceGetUtilizationRates(device).gpu) / 100


def _greatest(shares: Iterable[float | None]) -> float | None:
    return max((share for share in shares if share is not None), default=None)
