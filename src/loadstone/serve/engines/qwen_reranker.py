"""Qwen3-Reranker on transformers.

The official score is sigmoid(logit of "yes" − logit of "no") at the last position. Both logits are linear in the last
hidden state, so one vector, the difference of the two rows of the head, stands for the whole vocabulary. Sequences are
padded behind their end: no position of a causal model sees what follows it, so a score is the same in every batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from loadstone.core.engine import EngineError
from loadstone.serve.engines.qwen_prompt import QwenPrompt
from loadstone.serve.pairs import Pair, Score, Tokenised, scored


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

    def prepare(self, item: Pair) -> Tokenised:
        return self._prompt.tokenise(item)

    def tokens(self, prepared: Tokenised) -> int:
        return len(prepared.ids)

    def run(self, batch: Sequence[Tokenised]) -> list[Score | EngineError]:
        lengths = torch.tensor([len(pair.ids) for pair in batch])
        ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)
        for row, pair in zip(ids, batch, strict=True):
            row[: len(pair.ids)] = torch.tensor(pair.ids)
        with torch.inference_mode():
            hidden = self._model(input_ids=ids.to(self._device), use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(batch)), lengths - 1].float()
            values: list[float] = torch.sigmoid(last @ self._head).tolist()
        return [scored(value, pair) for value, pair in zip(values, batch, strict=True)]

    def __repr__(self) -> str:
        return f"<QwenReranker on {self._device}, {self._prompt!r}>"


def _difference(whole: Any, prompt: QwenPrompt) -> torch.Tensor:
    no, yes = prompt.answers()
    rows = whole.get_output_embeddings().weight.detach().float()
    difference: torch.Tensor = rows[yes] - rows[no]
    return difference
