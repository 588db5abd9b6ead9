"""Texts into token ids and padded rows, for the embedding engines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loadstone.core.refusals import BadAskError
from loadstone.serve.embed_asks import TextItem

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenisedText:
    """A text as a model takes it, without padding."""

    ids: Sequence[int]
    param: str
    truncated: bool = False

    @property
    def tokens(self) -> int:
        return len(self.ids)


class TextTokens:
    """Tokenises in any number of threads at once; ``max_tokens`` counts special tokens, None is no limit.

    It takes over the Rust tokenizer behind ``tokenizer`` (of transformers) and switches its padding and truncation off
    for good: to switch them for each call, as transformers does, fails while another thread is in it.
    """

    def __init__(self, tokenizer: Any, max_tokens: int | None, vocabulary: int) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._cuts_left = tokenizer.truncation_side == "left"
        self._vocabulary = vocabulary
        self.max_tokens = max_tokens

    def tokenise(self, item: TextItem, *, prompt: str = "") -> TokenisedText:
        """``prompt`` goes before a text, but not before token ids. Raises BadAskError, naming the field."""
        if not isinstance(item.content, str):
            return self._given(item, item.content)
        encoding = self._backend.encode(prompt + item.content)
        excess = too_many(item, len(encoding.ids), self.max_tokens)
        return TokenisedText(self._cut(encoding, excess) if excess else encoding.ids, item.param, excess > 0)

    def _given(self, item: TextItem, ids: tuple[int, ...]) -> TokenisedText:
        strange = next((token for token in ids if not 0 <= token < self._vocabulary), None)
        if strange is not None:
            raise BadAskError(
                f"{item.param}: {strange} is no token of this model, which has {self._vocabulary}", item.param
            )
        excess = too_many(item, len(ids), self.max_tokens)
        return TokenisedText(ids[: len(ids) - excess], item.param, excess > 0)

    def _cut(self, encoding: Any, excess: int) -> list[int]:
        """Without ``excess`` tokens of the text; what the model needs around it stays."""
        text = [at for at, special in enumerate(encoding.special_tokens_mask) if not special]
        out = set(text[:excess] if self._cuts_left else text[-excess:])
        return [token for at, token in enumerate(encoding.ids) if at not in out]


def too_many(item: TextItem, tokens: int, max_tokens: int | None) -> int:
    """How many tokens of ``item`` have to go. Raises BadAskError where there are any and it does not say truncate."""
    excess = 0 if max_tokens is None else max(0, tokens - max_tokens)
    if excess and not item.truncate:
        raise BadAskError(
            f'{item.param} has {tokens} tokens and the model reads {max_tokens}: shorten it, or send "truncate": true '
            "to have its beginning embedded",
            item.param,
        )
    return excess


def padded(rows: Sequence[Sequence[int]], padding: int, side: str, length: int) -> tuple[Ids, Ids]:
    """Token ids (len(rows), length) filled up with ``padding`` on ``side``, left or right, and their mask."""
    ids = np.full((len(rows), length), padding, dtype=np.int64)
    mask = np.zeros_like(ids)
    for at, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[at, place] = row
        mask[at, place] = 1
    return ids, mask
