"""Waiting for processes that are not this one's children to be gone."""

import os
import select
from collections.abc import Iterable

_PATIENCE_MS = 20_000


def all_gone(pids: Iterable[int]) -> bool:
    """Have all of them ended, at the latest within the tests' patience?"""
    poll = select.poll()
    waiting = set()
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        waiting.add(pidfd)
        poll.register(pidfd, select.POLLIN)
    try:
        for_certain = True
        ended: set[int] = set()
        while ended != waiting and for_certain:
            ready = poll.poll(_PATIENCE_MS)
            for_certain = bool(ready)
            for pidfd, _ in ready:
                ended.add(pidfd)
                poll.unregister(pidfd)
        return ended == waiting
    finally:
        for pidfd in waiting:
            os.close(pidfd)
