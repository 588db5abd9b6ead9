"""The same examples in every run, however busy the machine: a property that fails must fail again."""

import pytest
from hypothesis import settings

from upstream_heard import LOOPS, Run, runner

settings.register_profile("house", derandomize=True, deadline=None)
settings.load_profile("house")


@pytest.fixture(params=LOOPS.values(), ids=LOOPS.keys())
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a test's coroutine, on each of the loops that are served."""
    return runner(request.param)
