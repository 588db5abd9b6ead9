"""Which cores the engine computes on and which one the generator keeps, so that neither is measured by the other."""

import contextlib
import os
from collections.abc import Iterator


def available_cores() -> frozenset[int]:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def split_cores(available: frozenset[int]) -> tuple[frozenset[int], frozenset[int]]:
    """(cores for the generator, cores for the engine): the engine gets all but one; a lone core is shared."""
    first, *rest = sorted(available)
    return frozenset([first]), frozenset(rest) or frozenset([first])


@contextlib.contextmanager
def pinned_to(cores: frozenset[int]) -> Iterator[None]:
    """Keep the calling thread, and those it starts, on ``cores`` for the length of the block; a system that cannot
    pin (macOS) goes on without."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
