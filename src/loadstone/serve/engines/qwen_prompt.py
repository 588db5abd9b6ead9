"""Qwen3-Reranker's prompt in tokens: the same for every engine that runs the model."""

from collections.abc import Sequence
from typing import Any

from loadstone.core.errors import UsageError
from loadstone.serve import prompts
from loadstone.serve.pairs import Pair, Tokenised, tokens_to_read


class QwenPrompt:
    """Tokenises pairs for Qwen3-Reranker, at most ``limit_tokens`` for each, prompt included.

    ``tokenizer`` is a ``tokenizers.Tokenizer`` of its own: it is changed. What looks like a control token in a query
    or a document is taken as plain text, so that no document can end its turn and answer for the model.
    """

    def __init__(self, tokenizer: Any, limit_tokens: int) -> None:
        self.limit_tokens = limit_tokens
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._prefix = self._encode(prompts.PREFIX).ids
        self._suffix = self._encode(prompts.SUFFIX).ids
        self._around = len(self._prefix) + len(self._suffix)
        tokenizer.encode_special_tokens = True

    def tokenise(self, pair: Pair) -> Tokenised:
        """Raises BadAskError where the pair is too long."""
        head = prompts.before_document(pair.query, pair.instruction)
        encoding = self._encode(head + pair.document)
        ids: list[int] = encoding.ids
        tokens = len(ids)
        if self._around + tokens > self.limit_tokens or pair.max_document_tokens is not None:
            start = _first_behind(len(head), encoding.offsets)
            read = tokens_to_read(
                pair,
                document_tokens=tokens - start,
                other_tokens=self._around + start,
                limit_tokens=self.limit_tokens,
            )
            ids = ids[: start + read]
        return Tokenised([*self._prefix, *ids, *self._suffix], pair.document_param, truncated=len(ids) < tokens)

    def answers(self) -> tuple[int, int]:
        """The tokens of "no" and "yes". Raises UsageError where the tokenizer lacks one."""
        no, yes = (self._tokenizer.token_to_id(word) for word in (prompts.NO, prompts.YES))
        if no is None or yes is None:
            raise UsageError('the tokenizer has no token "yes" or "no": this is not a Qwen3-Reranker')
        return no, yes

    def _encode(self, text: str) -> Any:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def __repr__(self) -> str:
        return f"<QwenPrompt {self._around} of {self.limit_tokens} tokens>"


def _first_behind(place: int, offsets: Sequence[tuple[int, int]]) -> int:
    """The first token that reaches beyond ``place`` in the text."""
    return next((index for index, (_, end) in enumerate(offsets) if end > place), len(offsets))
