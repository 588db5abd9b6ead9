"""Texts of a wanted number of tokens, new for each request: random words, counted by a line that has been measured."""

import math
import random
from dataclasses import dataclass
from typing import Protocol

from loadstone.measure.vocabulary import WORDS

PROBES = -1
WARM_UPS = -2
PREFIXES = -3
"""Levels of texts that belong to no level, so that no later prompt is in a prefix cache already."""
_TAIL = "zqxj" * 16
_SPLIT_WORDS = 1.5
"""Tokens per word from which a word is taken to be spelled out, so that single letters are tokens too."""


class Texts(Protocol):
    def text(self, level: int, position: int, tokens: int) -> str:
        """A text of ``tokens`` tokens (the shared prefix comes on top), the same for the same arguments."""
        ...


@dataclass(frozen=True)
class Sizing:
    """tokens = overhead + per_word · words: what a prompt of so many words costs."""

    overhead: float = 0.0
    """Chat template, special tokens, and the space that the first word lacks."""
    per_word: float = 1.0

    def words_for(self, tokens: int) -> tuple[int, int]:
        """(words, letters behind the last word) that come to ``tokens`` tokens, at least one word."""
        words = (tokens - self.overhead) / self.per_word
        if self.per_word < _SPLIT_WORDS:
            return max(1, round(words)), 0
        whole = max(1, math.floor(words + 1e-9))
        rest = round(tokens - self.overhead - self.per_word * whole)
        return whole, min(max(0, rest), len(_TAIL))

    def tokens_of(self, words: int, letters: int = 0) -> int:
        """Tokens that ``words`` words with ``letters`` letters behind the last come to."""
        return round(self.overhead + self.per_word * words) + letters


def sizing_through(few: tuple[int, int], many: tuple[int, int]) -> Sizing:
    """The line through two measured (words, tokens)."""
    per_word = (many[1] - few[1]) / (many[0] - few[0])
    if per_word <= 0:
        return Sizing()
    return Sizing(overhead=few[1] - per_word * few[0], per_word=per_word)


def pick_words(seed: int, level: int, position: int, count: int) -> list[str]:
    """``count`` words, the same for the same arguments.

    Two positions or levels differ within the first three words, neighbours in the first, so that no prefix cache
    serves one request from another's prompt.
    """
    picks = random.Random(f"{seed}/{level}/{position}").randbytes(count)
    head = bytes(((position + 97 * level + seed) & 255, (position >> 8) & 255, level & 255))
    return [WORDS[pick] for pick in head[:count] + picks[3:]]


class WordTexts:
    """Texts sized by a line; some 20 µs for 512 words."""

    def __init__(self, sizing: Sizing, seed: int, prefix_tokens: int = 0) -> None:
        self._sizing = sizing
        self._seed = seed
        self._prefix_tokens = prefix_tokens
        self._prefix = pick_words(seed, PREFIXES, 0, round(prefix_tokens / sizing.per_word))

    def __repr__(self) -> str:
        return f"<WordTexts {self._sizing.overhead:g} + {self._sizing.per_word:g} tokens per word>"

    def text(self, level: int, position: int, tokens: int) -> str:
        words, letters = self._sizing.words_for(self._prefix_tokens + tokens)
        own = pick_words(self._seed, level, position, max(1, words - len(self._prefix)))
        return " ".join(self._prefix + own) + _TAIL[:letters]
