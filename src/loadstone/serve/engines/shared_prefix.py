"""A causal model on texts that begin alike: what they share is computed once (``serve.prefix_row``), nothing is padded.

For CPUs, which are busy with the arithmetic; a GPU is faster with one large attention, and vLLM on it keeps shared
beginnings by itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from loadstone.serve.engines.unpadded import exchanged, filling, fit, refuse_masks
from loadstone.serve.prefix_row import Block, Tokens, row_of

LastHidden = Callable[[Sequence[Tokens]], Tensor]
"""From texts to the hidden state behind the last token of each, (texts, size)."""


def sharing(model: Any, padded: LastHidden) -> LastHidden | None:
    """What does as ``padded``, around ``model`` (of transformers), but computes shared beginnings once; None where it
    cannot."""
    if not fit(model):
        return None
    sample = _sample(model.config.vocab_size)
    return exchanged(model, _attention, [_Sharing(model)], lambda share: share(sample), padded(sample))


def _sample(vocabulary: int) -> list[list[int]]:
    """Texts of which all begin alike, and some for longer."""
    words = [7919 * place % vocabulary for place in range(64)]
    return [words[:20] + words[20 + 10 * group :][:12] + words[40:][:own] for group in (0, 1) for own in (1, 3, 20)]


class _Sharing:
    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, texts: Sequence[Tokens]) -> Tensor:
        row = row_of(texts)
        begin = len(row.ids)
        if spare := filling(begin):
            row.add([0] * spare, 0, 0)
            row.blocks.append(Block(begin, begin + spare, ()))
        owners = torch.tensor(row.owners)
        hidden = self._model(
            input_ids=torch.tensor(row.ids)[None],
            position_ids=torch.tensor(row.positions)[None],
            use_cache=False,
            blocks=[_attended(block, owners) for block in row.blocks],
        ).last_hidden_state[0]
        last: Tensor = hidden[torch.tensor(row.lasts)]
        return last


class _Attended(NamedTuple):
    """A block as attention is computed for it."""

    tokens: slice
    keys: slice | Tensor
    """Which tokens of the row it attends to."""
    mask: Tensor | None
    """(tokens, keys): 0 where one sees the other, else minus infinity; None where each sees all before it."""


def _attended(block: Block, owners: Tensor) -> _Attended:
    span = slice(block.begin, block.end)
    its = owners[span]
    if not block.shared and bool((its == its[0]).all()):
        return _Attended(span, span, None)
    tokens = torch.arange(block.begin, block.end)
    keys = torch.cat([*(torch.arange(*shared) for shared in block.shared), tokens])
    theirs = owners[keys]
    # As Row.sees.
    seen = (keys <= tokens[:, None]) & ((theirs == 0) | (theirs == its[:, None]))
    mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
    return _Attended(span, keys, mask)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    blocks: Sequence[_Attended],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """For transformers: (1, heads, tokens, size) each, (1, tokens, heads, size) back. Raises as ``refuse_masks``."""
    refuse_masks(module, attention_mask, sliding_window)
    out = query.new_empty(query.shape)
    for tokens, keys, mask in blocks:
        heads = query[:, :, tokens], key[:, :, keys], value[:, :, keys]
        out[:, :, tokens] = scaled_dot_product_attention(
            *heads, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
    return out.transpose(1, 2), None
