"""Who looks on while a search runs."""

from dataclasses import dataclass
from typing import Protocol

from loadstone.core.verdict import LevelKind, LevelRow


@dataclass(frozen=True, slots=True)
class LevelProgress:
    """A level that is running. None is not known yet."""

    done: int
    planned: int
    throughput_rps: float | None
    mean_ttft_ms: float | None
    elapsed_s: float
    in_flight: int


class Watcher(Protocol):
    """Is told what happens, level by level. Called on the generator's thread: it must be quick and must not raise."""

    def level_started(self, ordinal: int, kind: LevelKind, concurrency: int, planned: int) -> None:
        """A level of ``planned`` requests begins."""
        ...

    def level_progress(self, so_far: LevelProgress) -> None:
        """How far the running level is; call it as often as convenient."""
        ...

    def level_decided(self, row: LevelRow) -> None:
        """The level's verdict stands."""
        ...

    def note(self, text: str) -> None:
        """One sentence that a person should read."""
        ...
