"""What all rows of the gate's bench share: the two cores, the number of runs, loads, and lines of the table."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client import line, spread
from gate_servers import end

Figures = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """How everything is run."""

    load_core: int
    """The load generator's, and the mock's."""
    proxy_core: int
    rounds: int
    quick: bool

    def seconds(self, whole: float, quick: float) -> float:
        return quick if self.quick else whole

    def load(self, name: str, core: int | None = None, **options: Any) -> Figures:
        """Run one load of ``gate_loads.py`` to its end."""
        command = _command(name, self.load_core if core is None else core, options)
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        figures: Figures = json.loads(done.stdout)
        return figures

    @contextlib.contextmanager
    def held(self, name: str, **options: Any) -> Iterator[Figures]:
        """A load that stands for the length of the block; told is how much of it stood at the start."""
        command = _command(name, self.load_core, options)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            figures: Figures = json.loads(process.stdout.readline())
            yield figures
            process.stdin.close()
            figures["standing_at_end"] = json.loads(process.stdout.readline())["standing"]
        finally:
            end(process)


def _command(name: str, core: int, options: Figures) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("gate_loads.py")), name, str(core), json.dumps(options)]


def quotient(ones: list[float], others: list[float]) -> list[float]:
    """Of each run by its neighbour in the same round."""
    return [one / other for one, other in zip(ones, others, strict=True)]


def row(what: str, values: list[float], digits: int = 2, goal: str = "") -> None:
    line(what, spread(values, digits), goal)
