"""What a rate search knows so far, each point computed once."""

import math
from collections.abc import Sequence
from dataclasses import replace

from loadstone.core.verdict import LevelRow
from loadstone.measure.answer import row_of
from loadstone.measure.open_loop import OpenLoop
from loadstone.measure.points import Point, point_of
from loadstone.measure.rate import Goal, ask, smallest
from loadstone.measure.rate_answer import RateAnswer, answer_of, row_for
from loadstone.measure.search import Ask, SearchSettings
from loadstone.measure.steady import LevelData, Throughput, summarise


class RateBook:
    """Closed-loop levels in running order, and everything that follows from them."""

    def __init__(self, goal: Goal, settings: SearchSettings) -> None:
        self.goal = goal
        self.settings = settings
        self.levels: list[LevelData] = []
        self.rows: list[LevelRow] = []
        self._points: dict[int, Point] = {}

    def __repr__(self) -> str:
        return f"<RateBook {len(self.levels)} levels at {sorted(self._points)} for {self.goal.target_qps:g}/s>"

    @property
    def points(self) -> list[Point]:
        """Ascending by concurrency."""
        return [point for _, point in sorted(self._points.items())]

    def add(self, level: LevelData) -> LevelRow:
        """Take a level in and hold it against the goal."""
        self.levels.append(level)
        concurrency = level.meta.concurrency
        same = [other for other in self.levels if other.meta.concurrency == concurrency]
        self._points[concurrency] = rate_point(same, self.settings)
        row = row_for(row_of(level, self.settings), self.goal)
        self.rows.append(row)
        return row

    def ask(self) -> Ask | None:
        """The next level; None when the search is over."""
        return ask(self.points, self.goal)

    def found(self) -> int | None:
        """c*."""
        point = smallest(self.points, self.goal)
        return None if point is None else point.concurrency

    def answer(self, open_loop: OpenLoop | None) -> RateAnswer:
        return answer_of(self.points, self.rows, open_loop, self.goal)


def rate_point(levels: Sequence[LevelData], settings: SearchSettings) -> Point:
    """All levels run at one concurrency, pooled; its throughput no surer than its requests allow.

    In a closed loop X = N/R, so X is at least as uncertain as the mean of R: eight slices of a short window may agree
    by luck, and one such level would decide the search.
    """
    point = point_of(levels, settings.rules)
    if point.throughput is None or not point.requests:
        return point
    cv = summarise([level for level in levels if level.complete]).e2el.cv
    least_se_rps = point.throughput.rps * cv / math.sqrt(point.requests)
    return replace(point, throughput=Throughput(point.throughput.rps, max(point.throughput.se_rps, least_se_rps)))
