"""Ends a replica when its parent is gone, however the parent went: the kernel then closes our standard input."""

import os
import sys
import threading
from collections.abc import Callable

_CHUNK_BYTES = 4096


class ParentWatch:
    """Watches from when it is made, on a thread of its own: loading a model takes minutes and holds everything else up.

    Until ``when_gone`` says how to end in good order, the process ends at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._end: Callable[[], object] = _at_once
        self._thread = threading.Thread(target=self._watch, name="parent", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<ParentWatch {'watching' if self._thread.is_alive() else 'the parent is gone'}>"

    def when_gone(self, end: Callable[[], object]) -> None:
        """Call ``end``, on the watching thread, instead of ending at once."""
        with self._lock:
            self._end = end

    def _watch(self) -> None:
        while os.read(sys.stdin.fileno(), _CHUNK_BYTES):
            pass
        with self._lock:
            self._end()


def _at_once() -> None:
    os._exit(0)
