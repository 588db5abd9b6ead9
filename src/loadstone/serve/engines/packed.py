"""Texts of different lengths side by side in one row, so that none is padded to the length of another.

Theory of operation. Only attention looks from one token to others. So the tokens of all texts go through the model as
one row, each with its position in its own text, and attention is computed text by text, those of one length together.
For rows of this kind transformers' models hand on where each text begins (``cu_seq_lens_q``, for flash attention):
that is what the attention here reads.

For CPUs, which compute as much for padding as for a word. A GPU is faster with one large attention than many small.
"""

from collections.abc import Callable
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from loadstone.serve.engines.unpadded import exchanged, filling, fit, refuse_masks

Features = dict[str, Any]
Encode = Callable[[Features], Features]


def packed(encoder: Any, padded: Encode, sample: Features) -> Encode | None:
    """What does as ``padded``, the module around ``encoder`` (of transformers), but without padding; None where it
    cannot. ``sample`` has the features of a few texts of very different lengths, as ``padded`` takes them."""
    if not fit(encoder):
        return None
    mask = sample["attention_mask"].bool()
    # RoBERTa's positions begin behind that of its padding.
    starts = (0, int(getattr(encoder.config, "pad_token_id", None) or 0) + 1)
    return exchanged(
        encoder,
        _attention,
        [_Packed(encoder, start) for start in starts],
        lambda encode: encode(sample)["token_embeddings"][mask],
        padded(dict(sample))["token_embeddings"][mask],
    )


class _Packed:
    """The encoder on packed texts; its hidden states are padded again, for the modules that follow."""

    def __init__(self, encoder: Any, first_position: int) -> None:
        self._encoder = encoder
        self._first_position = first_position

    def __call__(self, features: Features) -> Features:
        """``features`` has input_ids and attention_mask, (texts, longest); adds token_embeddings, with zeros for the
        padding."""
        mask = features["attention_mask"].bool()
        ids, lengths = features["input_ids"][mask], mask.sum(dim=1).tolist()
        spare = filling(len(ids))
        if spare:
            lengths.append(spare)
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        positions = torch.cat([torch.arange(length) for length in lengths]) + self._first_position
        hidden = self._encoder(
            input_ids=pad(ids, (0, spare))[None],
            position_ids=positions[None],
            cu_seq_lens_q=ends,
            cu_seq_lens_k=ends,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
        ).last_hidden_state[0]
        rows = hidden.new_zeros(*mask.shape, hidden.shape[-1])
        rows[mask] = hidden[: len(ids)]
        return {**features, "token_embeddings": rows}


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """For transformers: (1, heads, tokens, size) each, (1, tokens, heads, size) back. Raises as ``refuse_masks``."""
    refuse_masks(module, attention_mask, sliding_window)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = torch.empty_like(query)
    begin = 0
    for length, texts in groupby(cu_seq_lens_q.diff().tolist()):
        count = len(list(texts))
        end = begin + count * length
        heads = (tensor[begin:end].unflatten(0, (count, length)).transpose(1, 2) for tensor in (query, key, value))
        seen = scaled_dot_product_attention(*heads, scale=scaling, is_causal=causal, enable_gqa=True)
        out[begin:end] = seen.transpose(1, 2).flatten(0, 1)
        begin = end
    return out[None], None
