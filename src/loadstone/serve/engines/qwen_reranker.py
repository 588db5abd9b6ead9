"""Qwen3-Reranker on transformers.

The official score is sigmoid(logit of "yes" − logit of "no") at the last position. Both logits are linear in the last
hidden state, so one vector, the difference of the two rows of the head, stands for the whole vocabulary. No position of
a causal model sees what follows it: so prompts share what they begin with, or are padded behind their end, and a score
is the same in every batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from loadstone.core.engine import EngineError
from loadstone.serve.engines.qwen_prompt import QwenPrompt
from loadstone.serve.engines.shared_prefix import sharing
from loadstone.serve.pairs import Pair, Score, Tokenised, scored
from loadstone.serve.prefix_row import Tokens


class QwenReranker:
    """``core.engine.Engine`` from pairs to scores, on the GPU where there is one.

    ``original``: the checkpoint is the published language model, not one converted to a classifier.
    """

    def __init__(self, model: str, prompt: QwenPrompt, *, original: bool) -> None:
        self._prompt = prompt
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # On a CPU half precision is slower than single, where the processor has it at all.
        dtype = "auto" if self._device.type == "cuda" else torch.float32
        kind = AutoModelForCausalLM if original else AutoModelForSequenceClassification
        whole = kind.from_pretrained(model, dtype=dtype).to(self._device).eval()
        self._head = _difference(whole, prompt) if original else whole.score.weight[0].float()
        self._model = whole.model
        with torch.inference_mode():
            shared = sharing(self._model, self._padded)
        self._last_hidden = shared or self._padded
        self.pads = shared is None

    def prepare(self, item: Pair) -> Tokenised:
        return self._prompt.tokenise(item)

    def tokens(self, prepared: Tokenised) -> int:
        return len(prepared.ids)

    def run(self, batch: Sequence[Tokenised]) -> list[Score | EngineError]:
        with torch.inference_mode():
            last = self._last_hidden([pair.ids for pair in batch]).float()
            values: list[float] = torch.sigmoid(last @ self._head).tolist()
        return [scored(value, pair) for value, pair in zip(values, batch, strict=True)]

    def _padded(self, texts: Sequence[Tokens]) -> torch.Tensor:
        """The hidden state behind the last token of each text, (texts, size)."""
        lengths = torch.tensor([len(text) for text in texts])
        ids = torch.zeros(len(texts), int(lengths.max()), dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        hidden = self._model(input_ids=ids.to(self._device), use_cache=False).last_hidden_state
        last: torch.Tensor = hidden[torch.arange(len(texts)), lengths - 1]
        return last

    def __repr__(self) -> str:
        return f"<QwenReranker on {self._device}, {self._prompt!r}>"


def _difference(whole: Any, prompt: QwenPrompt) -> torch.Tensor:
    no, yes = prompt.answers()
    rows = whole.get_output_embeddings().weight.detach().float()
    difference: torch.Tensor = rows[yes] - rows[no]
    return difference
