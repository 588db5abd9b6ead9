"""serve.batching on real threads: every wait is for an event, nothing for a time."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence

import pytest

from loadstone.core.engine import EngineError
from loadstone.core.refusals import BadAskError
from loadstone.serve.batching import Batching, BatchSettings, Done


class Upper:
    """An engine that shouts. ``bad`` cannot be prepared, ``odd`` crashes there; ``nan`` has no result, a batch with
    ``bomb`` in it raises. It stops in front of each batch until ``go`` is set."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.running = threading.Semaphore(0)
        """Released as each batch begins."""
        self.go = threading.Event()
        self.go.set()
        self.prepares = threading.Event()
        self.prepares.set()
        self.broken = False
        self.threads: set[str] = set()

    def prepare(self, item: str) -> str:
        self.prepares.wait()
        if item == "bad":
            raise BadAskError("it is bad", "items")
        if item == "odd":
            raise ValueError("it is odd")
        return item.upper()

    def tokens(self, prepared: str) -> int:
        return len(prepared)

    def run(self, batch: Sequence[str]) -> Sequence[str | EngineError]:
        self.batches.append(list(batch))
        self.threads.add(threading.current_thread().name)
        self.running.release()
        self.go.wait()
        if self.broken or "BOMB" in batch:
            raise RuntimeError("boom")
        if "SHORT" in batch:
            return []
        return [EngineError("NaN in its output") if it == "NAN" else it for it in batch]


Upstairs = Batching[str, str, str]


def run(main: Callable[[Upper, Upstairs], Coroutine[None, None, None]]) -> Upper:
    """``main(engine, batching)``, from start to stop."""
    engine = Upper()

    async def whole() -> None:
        batching: Upstairs = Batching(engine, BatchSettings(), time.monotonic_ns)
        await batching.start()
        await main(engine, batching)
        engine.go.set()
        engine.prepares.set()
        await batching.stop()

    before = threading.active_count()
    asyncio.run(whole())
    assert threading.active_count() == before
    return engine


def results(done: Sequence[Done[str]]) -> list[str]:
    return [it.result for it in done]


async def begun(engine: Upper) -> None:
    """Until a batch has begun."""
    await asyncio.to_thread(engine.running.acquire)


async def queued(batching: Upstairs, count: int) -> None:
    """Until so many items wait: nothing tells of that, so the loop turns until it is so."""
    while batching.figures().queued != count:  # noqa: ASYNC110
        await asyncio.sleep(0)


def test_results_come_in_the_order_of_the_items() -> None:
    async def main(_engine: Upper, batching: Upstairs) -> None:
        assert results(await batching.submit(["ccc", "a", "bb"])) == ["CCC", "A", "BB"]
        items = [f"{'x' * (index % 7)}{index}" for index in range(100)]
        assert results(await batching.submit(items)) == [it.upper() for it in items]
        assert await batching.submit([]) == []

    engine = run(main)
    assert engine.threads == {"engine"}


def test_what_arrives_during_a_batch_makes_the_next_one() -> None:
    async def main(engine: Upper, batching: Upstairs) -> None:
        engine.go.clear()
        first = asyncio.create_task(batching.submit(["first"]))
        await begun(engine)
        others = [asyncio.create_task(batching.submit([name])) for name in ("dd", "ccc", "b")]
        await queued(batching, 3)
        assert batching.figures().running == 1
        engine.go.set()
        assert results(await first) == ["FIRST"]
        assert [results(it) for it in await asyncio.gather(*others)] == [["DD"], ["CCC"], ["B"]]

    assert run(main).batches == [["FIRST"], ["B", "DD", "CCC"]]


def test_a_result_says_where_its_time_went() -> None:
    async def main(engine: Upper, batching: Upstairs) -> None:
        before_ns = time.monotonic_ns()
        (done,) = await batching.submit(["a"])
        parts_s = (done.tokenise_s, done.queue_s, done.inference_s)
        assert min(parts_s) > 0
        assert sum(parts_s) <= (time.monotonic_ns() - before_ns) / 1e9

    run(main)


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ("bad", BadAskError, "it is bad"),
        ("odd", EngineError, "ValueError: it is odd"),
        ("nan", EngineError, "NaN in its output"),
        ("bomb", EngineError, "RuntimeError: boom"),
        ("short", EngineError, "0 results for a batch of 1"),
    ],
)
def test_an_item_fails_alone(item: str, error: type[Exception], message: str) -> None:
    async def main(engine: Upper, batching: Upstairs) -> None:
        engine.go.clear()
        first = asyncio.create_task(batching.submit(["first"]))
        await begun(engine)
        names = ["a", item, "b"]
        tasks = [asyncio.create_task(batching.submit([name])) for name in names]
        await queued(batching, 2 if item in ("bad", "odd") else 3)
        engine.go.set()
        await first
        one, failed, two = await asyncio.gather(*tasks, return_exceptions=True)
        assert [it[0].result for it in (one, two) if isinstance(it, list)] == ["A", "B"]
        assert type(failed) is error
        assert str(failed) == message
        assert results(await batching.submit(["after"])) == ["AFTER"]

    run(main)


def test_each_item_of_a_failed_batch_is_tried_once_more_alone() -> None:
    async def main(engine: Upper, batching: Upstairs) -> None:
        with pytest.raises(EngineError, match="RuntimeError: boom"):
            await batching.submit(["bomb", "a", "bb"])
        assert batching.figures().batches == 1

    assert run(main).batches == [["A", "BB", "BOMB"], ["A"], ["BB"], ["BOMB"]]


def test_an_item_cancelled_during_its_batch_is_not_tried_again() -> None:
    async def main(engine: Upper, batching: Upstairs) -> None:
        engine.go.clear()
        bomb = asyncio.create_task(batching.submit(["bomb", "gone"]))
        await begun(engine)
        bomb.cancel()
        await asyncio.wait([bomb])
        engine.go.set()
        assert results(await batching.submit(["after"])) == ["AFTER"]

    assert run(main).batches == [["BOMB", "GONE"], ["AFTER"]]


def test_a_broken_engine_fails_its_items_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def main(engine: Upper, batching: Upstairs) -> None:
        engine.broken = True
        for _ in range(3):
            with pytest.raises(EngineError, match="boom"):
                await batching.submit(["a", "b"])
        engine.broken = False
        assert results(await batching.submit(["a", "b"])) == ["A", "B"]

    with caplog.at_level(logging.ERROR):
        run(main)
    assert [it.getMessage() for it in caplog.records] == ["the engine failed on a batch of 2"] * 3
    assert all("RuntimeError: boom" in str(it.exc_text) for it in caplog.records)


def test_items_of_a_cancelled_submission_are_dropped() -> None:
    async def main(engine: Upper, batching: Upstairs) -> None:
        engine.go.clear()
        first = asyncio.create_task(batching.submit(["first"]))
        await begun(engine)
        gone = asyncio.create_task(batching.submit(["x", "y"]))
        kept = asyncio.create_task(batching.submit(["z"]))
        await queued(batching, 3)
        gone.cancel()
        await asyncio.wait([gone])
        assert gone.cancelled()
        engine.go.set()
        await first
        assert results(await kept) == ["Z"]
        assert batching.figures().cancelled == 2

    assert run(main).batches == [["FIRST"], ["Z"]]


def test_items_cancelled_before_they_are_prepared_never_wait() -> None:
    async def main(engine: Upper, batching: Upstairs) -> None:
        engine.prepares.clear()
        gone = asyncio.create_task(batching.submit(["x"] * 40))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        engine.prepares.set()
        assert results(await batching.submit(["z"])) == ["Z"]

    assert run(main).batches == [["Z"]]


def test_a_submission_fails_as_a_whole() -> None:
    async def main(engine: Upper, batching: Upstairs) -> None:
        engine.go.clear()
        first = asyncio.create_task(batching.submit(["first"]))
        await begun(engine)
        with pytest.raises(BadAskError):
            await batching.submit(["good"] * 16 + ["bad"])
        assert batching.figures().queued == 0
        engine.go.set()
        await first

    assert run(main).batches == [["FIRST"]]


def test_stop_fails_what_waits_and_finishes_what_runs() -> None:
    async def main(engine: Upper, batching: Upstairs) -> None:
        engine.go.clear()
        runs = asyncio.create_task(batching.submit(["runs"]))
        await begun(engine)
        waits = asyncio.create_task(batching.submit(["waits"]))
        await queued(batching, 1)
        engine.prepares.clear()
        unprepared = asyncio.create_task(batching.submit(["unprepared"]))
        await asyncio.sleep(0)
        stop = asyncio.create_task(batching.stop())
        await asyncio.sleep(0)
        assert repr(batching).startswith("<Batching: 3 submissions, <Batcher: 1 waiting, 1 running")
        engine.go.set()
        engine.prepares.set()
        await stop
        assert results(await runs) == ["RUNS"]
        for task in (waits, unprepared):
            with pytest.raises(EngineError, match="has stopped"):
                await task
        assert not batching.alive
        with pytest.raises(EngineError, match="has stopped"):
            await batching.submit(["late"])

    run(main)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_where_the_engine_ends_its_thread_nobody_is_left_waiting() -> None:
    async def main(engine: Upper, batching: Upstairs) -> None:
        engine.go = Killer()
        with pytest.raises(EngineError, match="has stopped"):
            await batching.submit(["last"])
        assert not batching.alive

    run(main)


class Killer(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        raise KeyboardInterrupt


def test_many_clients_from_many_directions() -> None:
    """A thousand submissions of mixed sizes, a third of them cancelled at some point: each of the rest is answered."""

    async def main(_engine: Upper, batching: Upstairs) -> None:
        async def client(index: int) -> list[str]:
            return results(await batching.submit([f"{index}-{'x' * (part * 5)}" for part in range(index % 20 + 1)]))

        tasks = [asyncio.create_task(client(index)) for index in range(1000)]
        for index in range(0, 1000, 3):
            await asyncio.sleep(0)
            tasks[index].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for index, answer in enumerate(answers):
            if isinstance(answer, list):
                assert answer == [f"{index}-{'X' * (part * 5)}" for part in range(index % 20 + 1)]
            else:
                assert isinstance(answer, asyncio.CancelledError)
                assert index % 3 == 0
        assert batching.figures().queued == 0

    run(main)
