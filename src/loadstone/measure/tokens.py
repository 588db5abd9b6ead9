"""Counting tokens: with a tokenizer where one is given, else by the server's ``usage``, else by chunks."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from loadstone.core.errors import UsageError
from loadstone.core.records import RequestRecord
from loadstone.measure.texts import PREFIXES, Sizing, Texts, WordTexts, pick_words
from loadstone.measure.vocabulary import WORDS

_ROUNDS = 12


class Tokenizer:
    """A Hugging Face fast tokenizer (``tokenizer.json``)."""

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    def count(self, text: str, special: bool = False) -> int:
        """Tokens of ``text``; with ``special`` including those that a server adds around a prompt."""
        return len(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def counts(self, texts: list[str], special: bool = False) -> list[int]:
        return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=special)]

    def cut(self, text: str, tokens: int) -> str:
        """The beginning of ``text`` that its first ``tokens`` tokens cover, special tokens not counted."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return text[: offsets[tokens - 1][1]] if tokens > 0 else ""


def load_tokenizer(place: str) -> Tokenizer:
    """The tokenizer at ``place``: a ``tokenizer.json``, a folder that holds one, or a name on the Hugging Face hub.

    Raises :class:`UsageError` where there is none.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError("--tokenizer needs the tokenizers package: pip install 'loadstone[tokenizer]'") from error
    path = Path(place)
    file = path / "tokenizer.json" if path.is_dir() else path
    remedy = "give a tokenizer.json or a folder that holds one, or leave it out: the server's usage is counted by then"
    if not file.is_file() and (place.count("/") != 1 or place.startswith((".", "/"))):
        raise UsageError(f"--tokenizer {place}: no such file ({file}); {remedy}")
    try:
        from_file = tokenizers.Tokenizer.from_file
        return Tokenizer(from_file(os.fspath(file)) if file.is_file() else tokenizers.Tokenizer.from_pretrained(place))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with a file or a name
        raise UsageError(f"--tokenizer {place} cannot be loaded ({error}); {remedy}") from error


def texts_for(tokenizer: Tokenizer, seed: int, prefix_tokens: int = 0) -> Texts:
    """Texts of exactly the wanted length, special tokens included."""
    sizing = exact_sizing(tokenizer)
    if sizing is not None:
        return WordTexts(sizing, seed, prefix_tokens)
    return FittedTexts(tokenizer, seed, prefix_tokens)


def exact_sizing(tokenizer: Tokenizer) -> Sizing | None:
    """The line by which this tokenizer counts our words, None where it follows none.

    Every pair of words is tried: where no pair is counted differently, no text of these words is.
    """
    singles = set(tokenizer.counts(list(WORDS), special=True))
    pairs = set(tokenizer.counts([f"{word} {WORDS[0]}" for word in WORDS], special=True))
    if len(singles) != 1 or len(pairs) != 1:
        return None
    one, two = singles.pop(), pairs.pop()
    sizing = Sizing(overhead=2 * one - two, per_word=two - one)
    every_pair = [" ".join(f"{word} {other}" for other in WORDS) for word in WORDS]
    if set(tokenizer.counts(every_pair, special=True)) != {sizing.tokens_of(2 * len(WORDS))}:
        return None
    texts = WordTexts(sizing, seed=0)
    wanted = range(sizing.tokens_of(8), sizing.tokens_of(10))
    return sizing if all(tokenizer.count(texts.text(0, n, n), special=True) == n for n in wanted) else None


class FittedTexts:
    """Texts for a tokenizer that cuts our words unevenly: cut and filled up until the count is right."""

    def __init__(self, tokenizer: Tokenizer, seed: int, prefix_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._special = tokenizer.count("", special=True)
        self._prefix_tokens = prefix_tokens
        self._prefix = self._fit("", PREFIXES, 0, prefix_tokens) + " " if prefix_tokens else ""

    def text(self, level: int, position: int, tokens: int) -> str:
        return self._fit(self._prefix, level, position, self._prefix_tokens + tokens - self._special)

    def _fit(self, prefix: str, level: int, position: int, tokens: int) -> str:
        words = pick_words(self._seed, level, position, max(1, tokens))
        text = prefix + " ".join(words)
        best, error = text, abs(self._tokenizer.count(text) - tokens)
        for round_number in range(_ROUNDS):
            count = self._tokenizer.count(text)
            if abs(count - tokens) < error:
                best, error = text, abs(count - tokens)
            if error == 0:
                break
            if count > tokens:
                # A cut inside a word may be counted anew, as more: then cut a token earlier, and fill up by letters.
                text = self._tokenizer.cut(text, tokens - round_number // 2)
            else:
                text += " " + "abcdefghijklm"[round_number]
        return best


def fill_output_tokens(
    records: Sequence[RequestRecord], tokenizer: Tokenizer | None
) -> tuple[list[RequestRecord], str]:
    """(records with ``output_tokens`` wherever something came back, where they are from: usage | tokenizer | chunks).

    The tokenizer needs records that kept their ``text``.
    """
    if all(record.output_tokens is not None for record in records if record.ok):
        return list(records), "usage"
    filled = [
        record
        if record.output_tokens is not None
        else msgspec.structs.replace(record, output_tokens=_count(record, tokenizer))
        for record in records
    ]
    return filled, "chunks" if tokenizer is None else "tokenizer"


def _count(record: RequestRecord, tokenizer: Tokenizer | None) -> int:
    return record.chunks if tokenizer is None else tokenizer.count(record.text)
