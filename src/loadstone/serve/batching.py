"""The batcher at work: preparation on a pool of threads, the engine on one thread of its own, replies on the loop.

Theory of operation
    ``submit`` hands its items to the pool in jobs of a few; a job prepares them and offers them to the batcher. The
    engine's thread takes the next batch itself as soon as it is done with the last one, so the engine waits for nothing
    but items, however busy the loop is. Both do so under one lock, ``_wakes``; the engine's thread sleeps on it until
    the batcher's ``due_ns`` and is woken where an offer brings that forward. The loop learns of results once for each
    batch, and ends the submissions there: only the loop touches their futures.

Failures
    A batch of several that raises is run again item by item, once; what fails then, or has an EngineError in its place,
    fails its own submission alone.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import msgspec

from loadstone.core.engine import Engine, EngineError, Item_contra
from loadstone.core.refusals import BadAskError
from loadstone.serve.batcher import Batcher, BatchFigures, BatchSettings, Entry

__all__ = ["BatchFigures", "BatchSettings", "Batching", "Done"]

I = TypeVar("I")  # noqa: E741
P = TypeVar("P")
R = TypeVar("R")

_NS = 1_000_000_000
_FOREVER_NS = 1 << 62
_JOB_ITEMS = 16
"""Prepared by one job: a hop to a thread costs about as much as the tokens of a short text."""


class Done(msgspec.Struct, Generic[R], frozen=True):
    """An item's result and where its time went: the three add up to that from submission to the end of its batch."""

    result: R
    tokenise_s: float
    """Preparation, with the wait for a thread."""
    queue_s: float
    inference_s: float
    """The whole batch that it was in."""


class _Submission(Generic[P, R]):
    """The items of one ``submit``. All but ``entries`` and ``open`` belongs to the loop."""

    __slots__ = ("done", "entries", "future", "left", "open", "submitted_ns")

    def __init__(self, count: int, future: "asyncio.Future[list[Done[R]]]", now_ns: int) -> None:
        self.future = future
        self.submitted_ns = now_ns
        self.left = count
        self.done: list[Done[R] | None] = [None] * count
        self.open = True
        """Somebody waits for it."""
        self.entries: list[Entry[_Part[P, R]]] = []

    def settle(self, index: int, done: Done[R]) -> None:
        self.done[index] = done
        self.left -= 1
        if not self.left and not self.future.done():
            self.future.set_result([it for it in self.done if it is not None])

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Computer(Protocol[Item_contra, R]):
    """What a service computes with: a ``Batching`` over an engine, or an engine that batches by itself."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def submit(self, items: Sequence[Item_contra]) -> list[Done[R]]:
        """All results in order, or the first error; cancelling gives up what has not been computed."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it computes what is submitted."""
        ...

    def figures(self) -> object:
        """For /health, as msgspec can encode it."""
        ...


class _Part(Generic[P, R]):
    """One item of a submission, prepared."""

    __slots__ = ("index", "prepared", "submission")

    def __init__(self, submission: _Submission[P, R], index: int, prepared: P) -> None:
        self.submission = submission
        self.index = index
        self.prepared = prepared


class Batching(Generic[I, P, R]):
    """Runs an engine in batches. To be made, started, used and stopped on one loop."""

    def __init__(self, engine: Engine[I, P, R], settings: BatchSettings, clock_ns: Callable[[], int]) -> None:
        self._engine = engine
        self._clock_ns = clock_ns
        self._batcher: Batcher[_Part[P, R]] = Batcher(settings)
        self._wakes = threading.Condition(threading.Lock())
        """Guards the batcher, the entries of submissions, and the two that follow."""
        self._alarm_ns = 0
        """Until when the engine's thread sleeps; 0 while it is awake."""
        self._alive = False
        self._open: set[_Submission[P, R]] = set()
        self._ended = asyncio.Event()
        self._pool = ThreadPoolExecutor(settings.prepare_threads, thread_name_prefix="prepare")
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    async def start(self) -> None:
        """Start the threads."""
        self._loop = asyncio.get_running_loop()
        self._alive = True
        self._thread.start()

    async def stop(self) -> None:
        """Finish the batch that runs; all that wait fail with EngineError. Gives when the threads have ended."""
        with self._wakes:
            self._alive = False
            self._wakes.notify()
        await self._ended.wait()
        self._thread.join()
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)

    async def submit(self, items: Sequence[I]) -> list[Done[R]]:
        """The results of all items, in their order. Raises the first error of any: BadAskError of the preparation,
        EngineError of the model, or because it was stopped. Cancelled or failed, its items that wait are dropped."""
        if not self._alive:
            raise _stopped()
        if not items:
            return []
        submission: _Submission[P, R] = _Submission(len(items), self._loop.create_future(), self._clock_ns())
        self._open.add(submission)
        try:
            for first in range(0, len(items), _JOB_ITEMS):
                self._pool.submit(self._prepare, submission, first, items[first : first + _JOB_ITEMS])
            return await submission.future
        finally:
            self._open.discard(submission)
            if submission.left:
                self._drop(submission)
            submission.entries.clear()  # they lead back to the submission: a cycle that would wait for the collector

    def figures(self) -> BatchFigures:
        with self._wakes:
            return self._batcher.figures(self._clock_ns())

    @property
    def alive(self) -> bool:
        """Batches are run: it was started, not stopped, and the engine's thread has not died."""
        return self._alive

    def _drop(self, submission: _Submission[P, R]) -> None:
        with self._wakes:
            submission.open = False
            for entry in submission.entries:
                self._batcher.cancel(entry)

    # On a thread of the pool.

    def _prepare(self, submission: _Submission[P, R], first: int, items: Sequence[I]) -> None:
        try:
            ready = []
            for index, item in enumerate(items, first):
                if not submission.open:
                    return
                prepared = self._engine.prepare(item)
                ready.append((_Part(submission, index, prepared), self._engine.tokens(prepared)))
        except BadAskError as error:
            self._loop.call_soon_threadsafe(submission.fail, error)
        except Exception as error:
            logging.getLogger(__name__).exception("the engine failed to prepare an item")
            self._loop.call_soon_threadsafe(submission.fail, _failed(error))
        else:
            self._offer(submission, ready)

    def _offer(self, submission: _Submission[P, R], ready: Sequence[tuple[_Part[P, R], int]]) -> None:
        with self._wakes:
            if not submission.open:
                return
            now_ns = self._clock_ns()
            for part, tokens in ready:
                submission.entries.append(self._batcher.offer(part, tokens, now_ns))
            due_ns = self._batcher.due_ns
            if due_ns is not None and due_ns < self._alarm_ns:
                self._alarm_ns = 0
                self._wakes.notify()

    # On the engine's thread.

    def _serve(self) -> None:
        try:
            while self._step():
                pass
        finally:
            self._loop.call_soon_threadsafe(self._end)

    def _step(self) -> bool:
        """Await one batch, run it and send its results to the loop; False: it is time to stop."""
        batch = self._next()
        if not batch:
            return False
        started_ns = self._clock_ns()
        results, in_one_run = self._run(batch)
        ended_ns = self._clock_ns()
        with self._wakes:
            self._batcher.finished(ended_ns, in_one_run=in_one_run)
        self._loop.call_soon_threadsafe(self._deliver, batch, results, started_ns, ended_ns)
        return True

    def _next(self) -> "list[Entry[_Part[P, R]]]":
        with self._wakes:
            while self._alive:
                now_ns = self._clock_ns()
                if batch := self._batcher.take(now_ns):
                    return batch
                due_ns = self._batcher.due_ns
                self._alarm_ns = _FOREVER_NS if due_ns is None else due_ns
                self._wakes.wait(None if due_ns is None else (due_ns - now_ns) / _NS)
                self._alarm_ns = 0
        return []

    def _run(self, batch: "Sequence[Entry[_Part[P, R]]]") -> tuple[Sequence[R | EngineError], bool]:
        """Results in the order of the batch, and whether it took one run to get them."""
        try:
            return self._results(batch), True
        except Exception as error:
            logging.getLogger(__name__).exception("the engine failed on a batch of %d", len(batch))
            if len(batch) == 1:
                return [_failed(error)], False
        return [self._alone(entry) for entry in batch], False

    def _alone(self, entry: "Entry[_Part[P, R]]") -> R | EngineError:
        if entry.cancelled:
            return EngineError("cancelled")
        try:
            return self._results([entry])[0]
        except Exception as error:
            return _failed(error)

    def _results(self, batch: "Sequence[Entry[_Part[P, R]]]") -> Sequence[R | EngineError]:
        results = self._engine.run([entry.payload.prepared for entry in batch])
        if len(results) != len(batch):
            raise EngineError(f"{len(results)} results for a batch of {len(batch)}")
        return results

    # On the loop.

    def _deliver(
        self,
        batch: "Sequence[Entry[_Part[P, R]]]",
        results: Sequence[R | EngineError],
        started_ns: int,
        ended_ns: int,
    ) -> None:
        inference_s = (ended_ns - started_ns) / _NS
        for entry, result in zip(batch, results, strict=True):
            part = entry.payload
            submission = part.submission
            if isinstance(result, EngineError):
                submission.fail(result)
                continue
            tokenise_s = (entry.ready_ns - submission.submitted_ns) / _NS
            queue_s = (started_ns - entry.ready_ns) / _NS
            submission.settle(part.index, Done(result, tokenise_s, queue_s, inference_s))

    def _end(self) -> None:
        self._alive = False
        self._ended.set()
        for submission in self._open:
            submission.fail(_stopped())

    def __repr__(self) -> str:
        return f"<Batching: {len(self._open)} submissions, {self._batcher!r}>"


def _stopped() -> EngineError:
    return EngineError("the engine has stopped; send the request to another one or try again later")


def _failed(error: Exception) -> EngineError:
    """``error`` as an EngineError, with its kind where it says little by itself."""
    if isinstance(error, EngineError):
        return error
    wrapped = EngineError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
