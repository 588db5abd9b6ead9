"""Any sentence-transformers model, with the vectors that its ``encode`` gives.

``encode`` tokenises on the thread that computes. Here most models' texts are tokenised beforehand, on other threads,
and only padded before the modules run; models that prepare texts in a way of their own do it themselves, as in
``encode``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from loadstone.core.engine import EngineError
from loadstone.core.errors import UsageError
from loadstone.core.refusals import BadAskError
from loadstone.serve.embed_asks import Item, TextItem
from loadstone.serve.embed_vectors import Embedding, embeddings
from loadstone.serve.engines.loading import loading, quantize, text_limit
from loadstone.serve.engines.packed import packed
from loadstone.serve.engines.text_tokens import TextTokens, TokenisedText, padded, too_many

_WARM = "the model is warm when it has read this"
_SAMPLE = TextItem(_WARM, "")
_LONG_SAMPLE = 24
"""So many times that text: more than the windows in which some models look around."""


@dataclass(frozen=True, slots=True)
class CountedText:
    """A text that the model tokenises itself."""

    text: str
    param: str
    tokens: int
    truncated: bool


class SentenceEngine:
    """``core.engine.Engine`` from texts to embeddings, on the GPU where there is one; loaded and warm when made.

    ``max_model_len`` is the longest text in tokens, None the model's own limit. Raises UsageError.
    """

    takes_images = False

    def __init__(self, model: str, *, quantization: str = "none", max_model_len: int | None = None) -> None:
        with loading(model):
            self._model = SentenceTransformer(model).eval()
        self.max_tokens = text_limit(model, _own_limit(self._model), max_model_len)
        if max_model_len is not None:
            self._model.max_seq_length = max_model_len
        plain = _is_plain(self._model[0])
        self._texts: _Texts = _Tokenised(self._model, self.max_tokens) if plain else _Whole(self._model)
        self._modules = list(self._model)
        if plain:
            self._modules[0] = self._packed() or self._modules[0]
        self.pads = self._modules[0] is self._model[0]
        quantize(self._model, quantization)  # in place, and last: packing is judged by exact numbers
        warm = self.run([self.prepare(_SAMPLE)])[0]
        if isinstance(warm, EngineError):
            raise UsageError(f"--model {model} gives vectors with NaN in them: its weights are damaged")
        self.dim = warm.vector.size

    def _packed(self) -> Any:
        """In the place of the first module; None where texts have to be padded."""
        lengths = [1, _LONG_SAMPLE, 1, _LONG_SAMPLE // 3]
        texts = [self.prepare(TextItem(" ".join([_WARM] * length), "", truncate=True)) for length in lengths]
        with torch.inference_mode():
            return packed(self._model[0].model, self._model[0], self._texts.features(texts))

    def prepare(self, item: Item) -> Any:
        if not isinstance(item, TextItem):
            raise BadAskError("this model embeds texts only", item.param)
        return self._texts.prepare(item)

    def tokens(self, prepared: Any) -> int:
        count: int = prepared.tokens
        return max(1, count)

    def run(self, batch: Sequence[Any]) -> list[Embedding | EngineError]:
        features = {
            name: value.to(self._model.device) if isinstance(value, torch.Tensor) else value
            for name, value in self._texts.features(batch).items()
        }
        with torch.inference_mode():
            for module in self._modules:
                features = module(features)
            vectors = features["sentence_embedding"][:, : self._model.truncate_dim]
        return embeddings(vectors.float().cpu().numpy(), batch)

    def __repr__(self) -> str:
        return f"<SentenceEngine on {self._model.device}, {self.dim} dimensions, {self.max_tokens} tokens>"


class _Texts(Protocol):
    """How texts reach the modules."""

    def prepare(self, item: TextItem) -> Any: ...

    def features(self, batch: Sequence[Any]) -> dict[str, Any]: ...


class _Tokenised:
    """Tokenised on the threads that prepare."""

    def __init__(self, model: SentenceTransformer, max_tokens: int | None) -> None:
        tokenizer = model.tokenizer
        self._prompt = _default_prompt(model)
        # Pooling may leave the prompt out; how long it is, the module itself knows best.
        features = model.preprocess([_SAMPLE.content], prompt=self._prompt)
        self._fixed = {name: features[name] for name in ("modality", "prompt_length") if name in features}
        self._padding, self._side = int(tokenizer.pad_token_id or 0), tokenizer.padding_side
        self._segmented = "token_type_ids" in features
        self._tokens = TextTokens(tokenizer, max_tokens, len(tokenizer))

    def prepare(self, item: TextItem) -> TokenisedText:
        return self._tokens.tokenise(item, prompt=self._prompt)

    def features(self, batch: Sequence[TokenisedText]) -> dict[str, Any]:
        length = max(text.tokens for text in batch)
        ids, mask = padded([text.ids for text in batch], self._padding, self._side, length)
        features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask), **self._fixed}
        if self._segmented:
            features["token_type_ids"] = torch.zeros(ids.shape, dtype=torch.long)
        return features


class _Whole:
    """Tokenised by the model's first module, as it sees fit; beforehand it is only asked how long a text is."""

    def __init__(self, model: SentenceTransformer) -> None:
        self._model = model
        self._prompt = _default_prompt(model)
        self._limit = _own_limit(model)

    def prepare(self, item: TextItem) -> CountedText:
        if not isinstance(item.content, str):
            raise BadAskError(f"{item.param}: this model takes texts, not token ids", item.param)
        ids = self._model.preprocess([item.content], prompt=self._prompt)["input_ids"]
        # It cuts in silence, at the limit: a text of just that length cannot be told from a longer one.
        full = self._limit is not None and ids.shape[-1] >= self._limit
        if full:
            too_many(item, ids.shape[-1] + 1, self._limit)
        return CountedText(item.content, item.param, ids.shape[-1], full)

    def features(self, batch: Sequence[CountedText]) -> dict[str, Any]:
        features: dict[str, Any] = self._model.preprocess([text.text for text in batch], prompt=self._prompt)
        return features


def _default_prompt(model: SentenceTransformer) -> str:
    """What ``encode`` puts before every text."""
    return str(model.prompts.get(model.default_prompt_name) or "")


def _own_limit(model: SentenceTransformer) -> int | None:
    limit = model.max_seq_length
    # transformers writes 1e30 for "none", a static embedding infinity.
    return None if limit is None or math.isinf(limit) or limit > 1e9 else int(limit)


def _is_plain(module: Any) -> bool:
    """A transformer that reads a text's tokens and nothing else."""
    return (
        isinstance(module, Transformer)
        and module.transformer_task == "feature-extraction"
        and set(module.modality_config) == {"text"}
        and not module.processing_kwargs
        and getattr(module.tokenizer, "is_fast", False)
    )
