"""What a batcher learns from its batches: what one costs, and how soon items follow those that were answered."""

_MEMORY, _ENOUGH = 64, 8
"""Batches over which the run time is learnt, and before it is believed."""
_SPREAD = 0.01
"""Least squared coefficient of variation of the batch sizes from which a fixed cost can be told."""
_LEAST_FIXED_TOKENS = 32
"""Handing over and answering a batch cost something even where the engine itself starts for nothing."""
_FADING = 1 / 8
"""Weight of the last batch in the pace at which items follow."""


class RunTime:
    """What a batch costs, as fixed cost + padded tokens x slope: least squares over the last batches, fading."""

    __slots__ = (
        "_count",
        "_covariance",
        "_max_tokens",
        "_mean_ns",
        "_mean_tokens",
        "_variance",
        "fixed_ns",
        "slope_ns",
    )

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._count = 0
        self._mean_tokens = self._mean_ns = self._variance = self._covariance = 0.0
        self.fixed_ns = self.slope_ns = 0.0
        """Both 0 until batches of sufficiently different sizes have been seen."""

    @property
    def fixed_tokens(self) -> float:
        """The padded tokens that cost as much as a batch does by itself; ``max_tokens`` where that is not known."""
        if self.fixed_ns >= self.slope_ns * self._max_tokens:
            return float(self._max_tokens)
        return max(self.fixed_ns / self.slope_ns, _LEAST_FIXED_TOKENS)

    def learn(self, tokens: int, run_ns: int) -> None:
        """A batch of so many padded tokens ran for so long."""
        self._count = min(self._count + 1, _MEMORY)
        weight = 1 / self._count
        off_tokens, off_ns = tokens - self._mean_tokens, run_ns - self._mean_ns
        self._mean_tokens += weight * off_tokens
        self._mean_ns += weight * off_ns
        self._variance = (1 - weight) * (self._variance + weight * off_tokens * off_tokens)
        self._covariance = (1 - weight) * (self._covariance + weight * off_tokens * off_ns)
        if self._count >= _ENOUGH and self._variance > _SPREAD * self._mean_tokens * self._mean_tokens:
            self.slope_ns = max(self._covariance / self._variance, 0.0)
            self.fixed_ns = max(self._mean_ns - self.slope_ns * self._mean_tokens, 0.0)

    def __repr__(self) -> str:
        return f"<RunTime {self.fixed_ns / 1e6:.3f} ms + {self.slope_ns / 1e3:.3f} µs a token>"


class Company:
    """The items that are likely to join those that wait: the clients just answered may be back any moment.

    They are expected while fewer wait than were there, running or waiting, when the last batch was answered; at the
    pace at which others followed the batches before it. Waiting for one of them when n are there saves the fixed cost f
    of a batch of its own and delays n: more is done in the same time as long as it comes within f / n.
    """

    __slots__ = ("_answered", "_answered_ns", "_crowd", "_followed", "_measured", "_most_ns", "_pace_ns")

    def __init__(self, most_ns: int) -> None:
        self._most_ns = most_ns
        self._answered = self._answered_ns = self._crowd = self._followed = 0
        self._measured = True
        self._pace_ns = float(most_ns)
        """Time from an answer until half as many items have come as were answered, for each of them."""

    def arrived(self, now_ns: int) -> None:
        """One more item waits."""
        self._followed += 1
        if not self._measured and 2 * self._followed >= self._answered:
            self._measure(now_ns)

    def answered(self, count: int, waiting: int, now_ns: int) -> None:
        """A batch of ``count`` is answered, so many others wait."""
        if not self._measured:
            self._measure(now_ns)
        self._answered, self._answered_ns, self._crowd = count, now_ns, count + waiting
        self._followed, self._measured = 0, False

    def until_ns(self, waiting: int, fixed_ns: float) -> int:
        """Until when to wait for more while the engine is free; a time that has passed: not at all."""
        if waiting >= self._crowd or waiting * self._pace_ns >= fixed_ns:
            return 0
        # Twice the time that all should take: by then they do something else.
        return self._answered_ns + min(round(2 * self._answered * self._pace_ns), self._most_ns)

    def _measure(self, now_ns: int) -> None:
        pace_ns = (now_ns - self._answered_ns) / max(1, self._followed)
        self._pace_ns += _FADING * (min(pace_ns, self._most_ns) - self._pace_ns)
        self._measured = True

    def __repr__(self) -> str:
        return f"<Company of {self._crowd}, {self._followed} came since, one in {self._pace_ns / 1e6:.3f} ms>"
