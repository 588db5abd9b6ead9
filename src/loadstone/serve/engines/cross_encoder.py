"""Any cross-encoder of sentence-transformers with one label, such as BAAI/bge-reranker-v2-m3."""

import itertools
from collections.abc import Sequence

import torch
from sentence_transformers import CrossEncoder
from tokenizers import Encoding, Tokenizer

from loadstone.core.engine import EngineError
from loadstone.core.errors import UsageError
from loadstone.core.refusals import BadAskError
from loadstone.serve.pairs import Pair, Score, Tokenised, scored, tokens_to_read


class CrossEncoderReranker:
    """``core.engine.Engine`` from pairs to the scores of ``CrossEncoder.predict``, on the GPU where there is one.

    ``limit_tokens`` is the longest pair; None is the model's own limit.
    """

    pads = True

    def __init__(self, model: str, limit_tokens: int | None) -> None:
        self._model = CrossEncoder(model).eval()
        if self._model.num_labels != 1:
            raise UsageError(f"--model {model} has {self._model.num_labels} labels: a reranker has one")
        tokenizer = self._model.tokenizer
        self.limit_tokens: int = min(limit_tokens or self._model.max_seq_length, self._model.max_seq_length)
        self._padding = int(tokenizer.pad_token_id or 0)
        self._segmented = "token_type_ids" in tokenizer.model_input_names
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def prepare(self, item: Pair) -> Tokenised:
        if item.instruction:
            raise BadAskError("this model takes no instruction: leave it out", "instruction")
        encoding = self._tokenizer.encode(item.query, item.document)
        ids, segments = encoding.ids, encoding.type_ids
        if len(ids) > self.limit_tokens or item.max_document_tokens is not None:
            start, end = _document(encoding)
            read = tokens_to_read(
                item,
                document_tokens=end - start,
                other_tokens=len(ids) - (end - start),
                limit_tokens=self.limit_tokens,
            )
            ids, segments = ids[: start + read] + ids[end:], segments[: start + read] + segments[end:]
        return Tokenised(ids, item.document_param, len(ids) < len(encoding.ids), segments)

    def tokens(self, prepared: Tokenised) -> int:
        return len(prepared.ids)

    def run(self, batch: Sequence[Tokenised]) -> list[Score | EngineError]:
        features = {
            "input_ids": _padded([pair.ids for pair in batch], self._padding),
            "attention_mask": _padded([[1] * len(pair.ids) for pair in batch], 0),
        }
        if self._segmented:
            features["token_type_ids"] = _padded([pair.segments or [] for pair in batch], 0)
        there = {name: tensor.to(self._model.device) for name, tensor in features.items()}
        with torch.inference_mode():
            logits = self._model(there)["scores"].float()
            values: list[float] = self._model.activation_fn(logits).reshape(-1).tolist()
        return [scored(value, pair) for value, pair in zip(values, batch, strict=True)]

    def __repr__(self) -> str:
        return f"<CrossEncoderReranker on {self._model.device}, {self.limit_tokens} tokens>"


def _document(encoding: Encoding) -> tuple[int, int]:
    """Where the document's tokens begin and end; control tokens follow it."""
    places = [index for index, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
    return (places[0], places[-1] + 1) if places else (len(encoding.ids), len(encoding.ids))


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    """(rows, longest row), filled up with ``value``."""
    return torch.tensor(list(itertools.zip_longest(*rows, fillvalue=value))).T.contiguous()
