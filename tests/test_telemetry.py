"""The sampler in virtual time, this machine's readings, and what a window makes of samples."""

import asyncio
from collections.abc import Awaitable, Callable

import pynvml
import pytest

from loadstone.core.clock import Clock
from loadstone.core.engine_metrics import EngineMetrics
from loadstone.measure.machine import Machine, MachineReading
from loadstone.measure.telemetry import (
    Fetch,
    ServerFigures,
    Telemetry,
    TelemetrySample,
    is_loopback,
    summarise_telemetry,
)
from loadstone.sim.clock import run_virtual

SECOND = 1_000_000_000


def wait(clock: Clock, seconds: float) -> Awaitable[None]:
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    clock.call_at(clock.now_ns() + round(seconds * SECOND), lambda: done.done() or done.set_result(None))
    return done


def answers(clock: Clock, asked: list[float], text: Callable[[int], str | None], takes_s: float = 0.0) -> Fetch:
    async def fetch() -> str | None:
        asked.append(clock.now_ns() / SECOND)
        if takes_s:
            await wait(clock, takes_s)
        return text(len(asked))

    return fetch


def sampled(
    seconds: float, text: Callable[[int], str | None], takes_s: float = 0.0
) -> tuple[list[TelemetrySample], list[float]]:
    asked: list[float] = []

    async def main(clock: Clock) -> list[TelemetrySample]:
        telemetry = Telemetry(clock, answers(clock, asked, text, takes_s), None)
        telemetry.start(clock.now_ns())
        await wait(clock, seconds)
        return await telemetry.stop()

    return run_virtual(main), asked


def test_two_samples_a_second_and_one_at_the_end() -> None:
    samples, asked = sampled(1.7, lambda i: f"te_queue_size {i}")
    assert asked == [0.0, 0.5, 1.0, 1.5]
    assert [sample.t_s for sample in samples] == pytest.approx([0.0, 0.5, 1.0, 1.5, 1.7])
    assert [sample.server and sample.server.waiting for sample in samples] == [1.0, 2.0, 3.0, 4.0, None]


def test_a_server_without_metrics_is_asked_once() -> None:
    samples, asked = sampled(2.0, lambda i: None)
    assert asked == [0.0]
    assert all(sample.server is None for sample in samples)


def test_a_server_that_fell_silent_is_asked_again() -> None:
    samples, asked = sampled(1.2, lambda i: None if i == 2 else "te_queue_size 1")
    assert len(asked) == 3
    assert [sample.server is None for sample in samples] == [False, True, False, True]


def test_a_slow_answer_is_waited_for_while_the_machine_is_read_on() -> None:
    samples, asked = sampled(3.0, lambda i: "te_queue_size 1", takes_s=1.2)
    assert asked == [0.0, 1.5]
    assert [sample.t_s for sample in samples if sample.server] == pytest.approx([1.2, 2.7])
    assert [sample.t_s for sample in samples if not sample.server] == pytest.approx([0.5, 1.0, 2.0, 2.5, 3.0])


def test_stopping_abandons_an_outstanding_question() -> None:
    samples, asked = sampled(0.2, lambda i: "te_queue_size 1", takes_s=60.0)
    assert len(asked) == 1
    assert [sample.t_s for sample in samples] == [0.2]


def test_levels_follow_one_another() -> None:
    asked: list[float] = []

    async def main(clock: Clock) -> tuple[list[TelemetrySample], list[TelemetrySample]]:
        telemetry = Telemetry(clock, answers(clock, asked, lambda i: "te_queue_size 1"), None)
        telemetry.start(clock.now_ns())
        await wait(clock, 0.6)
        first = await telemetry.stop()
        await wait(clock, 5.0)
        telemetry.start(clock.now_ns())
        await wait(clock, 0.1)
        return first, await telemetry.stop()

    first, second = run_virtual(main)
    assert [sample.t_s for sample in first] == pytest.approx([0.0, 0.5, 0.6])
    assert [sample.t_s for sample in second] == pytest.approx([0.0, 0.1])
    assert asked == pytest.approx([0.0, 0.5, 5.6])


def test_an_error_of_our_own_is_raised_at_the_end() -> None:
    async def main(clock: Clock) -> None:
        async def fetch() -> str | None:
            raise ZeroDivisionError

        telemetry = Telemetry(clock, fetch, None)
        telemetry.start(clock.now_ns())
        await wait(clock, 2.0)
        await telemetry.stop()

    with pytest.raises(ZeroDivisionError):
        run_virtual(main)


def test_this_machine() -> None:
    async def main(clock: Clock) -> list[TelemetrySample]:
        telemetry = Telemetry(clock, None, Machine())
        telemetry.start(clock.now_ns())
        return await telemetry.stop()

    first, last = (sample.machine for sample in run_virtual(main))
    assert first.host_memory_free is not None
    assert 0 < first.host_memory_free < 1
    assert first.host_cpu is not None
    assert 0 <= first.host_cpu <= 1
    assert first.client_cpu_s is not None
    assert last.client_cpu_s is not None
    assert last.client_cpu_s > first.client_cpu_s


def test_accelerators_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    def utilisation(device: int) -> object:
        if device == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return type("Rates", (), {"gpu": 75})

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda i: i)
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetMemoryInfo", lambda device: type("Memory", (), {"used": 30 * (device + 1), "total": 80})
    )
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", utilisation)
    reading = Machine().read()
    assert (reading.device_memory, reading.device_use) == (0.75, 0.75)


def at(
    t_s: float,
    waiting: float | None = None,
    preemptions: float | None = None,
    started_at_s: float | None = None,
    **machine: float,
) -> TelemetrySample:
    server = None
    if waiting is not None:
        server = EngineMetrics("vllm", 8.0, waiting, waiting / 10, preemptions, started_at_s=started_at_s)
    return TelemetrySample(t_s, server, MachineReading(**machine))


def test_a_window_of_samples() -> None:
    samples = [
        at(0.0, 9.0, 0.0, host_memory_free=0.01, client_cpu_s=1.0, run_queue_wait_s=0.0),
        at(1.0, 1.0, 3.0, host_memory_free=0.5, device_memory=0.9, client_cpu_s=1.4, run_queue_wait_s=0.1),
        at(2.0, 3.0, 3.0, host_memory_free=0.4, device_memory=0.8, client_cpu_s=1.8, run_queue_wait_s=0.1),
        at(3.0, 2.0, 7.0, host_memory_free=0.6, device_memory=0.7, client_cpu_s=2.2, run_queue_wait_s=0.2),
        at(4.0, 9.0, 8.0, client_cpu_s=2.6, run_queue_wait_s=0.4),
        at(5.0, 9.0, 99.0, client_cpu_s=9.0, run_queue_wait_s=0.4),
    ]
    figures = summarise_telemetry(samples, 0.5, 3.5)
    assert figures.engine == "vllm"
    assert figures.preallocates
    assert (figures.running, figures.waiting, figures.kv_use) == (8.0, 2.0, pytest.approx(0.2))
    assert figures.preemptions == 8.0
    assert not figures.restarted
    assert (figures.host_memory_free, figures.device_memory) == (0.4, 0.9)
    assert (figures.client_cpu, figures.run_queue_wait) == (pytest.approx(0.4), pytest.approx(0.1))
    assert figures.as_row() == {"kv_use": 0.2, "running": 8.0, "waiting": 2.0, "preemptions": 8.0}


def test_a_window_shorter_than_the_period() -> None:
    samples = [at(0.0, 2.0, 1.0, client_cpu_s=1.0), at(0.5, 4.0, 2.0, client_cpu_s=1.1)]
    figures = summarise_telemetry(samples, 0.1, 0.4)
    assert (figures.waiting, figures.preemptions, figures.client_cpu) == (3.0, 1.0, pytest.approx(0.2))


def test_a_counter_that_fell_means_a_restart() -> None:
    figures = summarise_telemetry([at(0.0, 1.0, 10.0), at(1.0, 1.0, 12.0), at(2.0, 1.0, 3.0)], 0.0, 3.0)
    assert figures.restarted
    assert figures.preemptions == 5.0


def test_another_start_time_means_a_restart() -> None:
    figures = summarise_telemetry([at(0.0, 1.0, started_at_s=5.0), at(1.0, 1.0, started_at_s=6.0)], 0.0, 3.0)
    assert figures.restarted
    assert figures.preemptions is None


@pytest.mark.parametrize("samples", [[], [at(0.0)], [at(0.0), at(9.0)]])
def test_nothing_told(samples: list[TelemetrySample]) -> None:
    figures = summarise_telemetry(samples, 1.0, 3.0)
    assert figures == ServerFigures()
    assert figures.as_row() == {}


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://localhost:8000/v1", True),
        ("http://[::1]:80", True),
        ("http://127.3.2.1", True),
        ("https://gpu.example.com", False),
        ("http://10.0.0.7:8000", False),
        ("", False),
    ],
)
def test_is_loopback(url: str, local: bool) -> None:
    assert is_loopback(url) is local
