"""A heap whose items may leave it, or change their place in it, at any time."""

import heapq
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_SLACK = 64


class LazyHeap(Generic[T]):
    """Items (hashable) by key, least first; equal keys in the order they were put.

    An entry counts only while it is the latest of its item. The others are dropped when they come to the top, or all at
    once when they outnumber the rest, so memory stays in proportion and every operation is O(log n), amortised.
    """

    __slots__ = ("_entries", "_latest", "_puts")

    def __init__(self) -> None:
        self._entries: list[tuple[Any, int, T]] = []
        self._latest: dict[T, int] = {}
        """Which put of an item is its latest."""
        self._puts = 0

    def __len__(self) -> int:
        return len(self._latest)

    def put(self, key: Any, item: T) -> None:
        """Add ``item``, or give it another key."""
        self._puts += 1
        self._latest[item] = self._puts
        heapq.heappush(self._entries, (key, self._puts, item))
        self._sweep()

    def discard(self, item: T) -> None:
        """Take ``item`` out; nothing happens where it is not in."""
        if self._latest.pop(item, None) is not None:
            self._sweep()

    def first(self) -> T | None:
        """The item with the least key, left where it is."""
        entries, latest = self._entries, self._latest
        while entries:
            _, number, item = entries[0]
            if latest.get(item) == number:
                return item
            heapq.heappop(entries)
        return None

    def _sweep(self) -> None:
        if len(self._entries) > 2 * len(self._latest) + _SLACK:
            latest = self._latest
            self._entries = [entry for entry in self._entries if latest.get(entry[2]) == entry[1]]
            heapq.heapify(self._entries)

    def __repr__(self) -> str:
        return f"<LazyHeap of {len(self)}, {len(self._entries)} entries>"
