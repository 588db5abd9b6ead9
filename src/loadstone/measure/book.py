"""What a run knows so far: its levels, and everything that follows from them, each computed once."""

from collections.abc import Sequence

from loadstone.core.verdict import LevelRow, RunVerdict
from loadstone.measure.answer import row_of, verdict_of
from loadstone.measure.points import Point, point_of
from loadstone.measure.search import Ask, SearchSettings, ask
from loadstone.measure.steady import LevelData


class RunBook:
    """Levels in running order. ``ask`` says what to run next, ``verdict`` what they say."""

    def __init__(self, settings: SearchSettings, levels: Sequence[LevelData] = ()) -> None:
        self.settings = settings
        self.levels: list[LevelData] = []
        self.rows: list[LevelRow] = []
        self._points: dict[int, Point] = {}
        for level in levels:
            self.add(level)

    def __repr__(self) -> str:
        return f"<RunBook {len(self.levels)} levels at {sorted(self._points)}>"

    @property
    def points(self) -> list[Point]:
        """Ascending by concurrency."""
        return [point for _, point in sorted(self._points.items())]

    def add(self, level: LevelData) -> LevelRow:
        """Take a level in and judge it."""
        self.levels.append(level)
        concurrency = level.meta.concurrency
        same = [other for other in self.levels if other.meta.concurrency == concurrency]
        self._points[concurrency] = point_of(same, self.settings.rules)
        row = row_of(level, self.settings)
        self.rows.append(row)
        return row

    @property
    def next_ordinal(self) -> int:
        """Beyond every level that stands, also where one in between was deleted."""
        return max((level.meta.ordinal for level in self.levels), default=0) + 1

    def ask(self) -> Ask | None:
        """The next level; None when the search is over."""
        return ask(self.points, self.settings)

    def verdict(self) -> RunVerdict:
        return verdict_of(self.points, self.rows, self.levels, self.settings, self.ask())
