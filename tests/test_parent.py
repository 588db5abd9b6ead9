"""A replica's end with its parent: while it loads, and in good order once it serves."""

import subprocess
import sys

_LOADING = """
import time
from loadstone.serve.parent import ParentWatch
watch = ParentWatch()
print(watch, flush=True)
while True:
    time.sleep(60)
"""
_SERVING = """
import threading
from loadstone.serve.parent import ParentWatch
gone = threading.Event()
watch = ParentWatch()
watch.when_gone(gone.set)
print("serving", flush=True)
gone.wait()
print("the last replies are sent", flush=True)
"""


def said_after_the_parent_left(program: str) -> tuple[str, str, int]:
    """(first line, what came after standard input was closed, exit status)."""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        first = process.stdout.readline()
        process.stdin.write("anything that is written is no end\n")
        process.stdin.close()
        return first.strip(), process.stdout.read().strip(), process.wait()


def test_a_replica_that_still_loads_ends_at_once() -> None:
    assert said_after_the_parent_left(_LOADING) == ("<ParentWatch watching>", "", 0)


def test_one_that_serves_ends_in_good_order() -> None:
    assert said_after_the_parent_left(_SERVING) == ("serving", "the last replies are sent", 0)
