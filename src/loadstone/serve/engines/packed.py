"""Texts of different lengths side by side in one row, so that none is padded to the length of another.

Theory of operation. Only attention looks from one token to others. So the tokens of all texts go through the model as
one row, each with its position in its own text, and attention is computed text by text, those of one length together.
For rows of this kind transformers' models hand on where each text begins (``cu_seq_lens_q``, for flash attention):
that is what the attention here reads. Whether a model really has nothing else in it that mixes tokens or counts
positions in a way of its own, its vectors tell: ``packed`` compares them with those of padded texts.

For CPUs, which compute as much for padding as for a word. A GPU is faster with one large attention than many small.
"""

import logging
from collections.abc import Callable
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

_NAME = "loadstone_packed"
_TOLERANCE = 1e-3
"""Of the largest component. What texts see of each other if a model isn't fit for this is a hundred times as much; the
order of a sum in float32 is a thousandth of it."""

Features = dict[str, Any]
Encode = Callable[[Features], Features]


def packed(encoder: Any, padded: Encode, sample: Features) -> Encode | None:
    """What does as ``padded``, the module around ``encoder`` (of transformers), but without padding; None where it
    cannot. ``sample`` has the features of a few texts of very different lengths, as ``padded`` takes them."""
    own_attention = getattr(encoder.config, "_attn_implementation", None)
    # Coarser numbers than float32 would not tell.
    if own_attention is None or encoder.device.type != "cpu" or encoder.dtype != torch.float32:
        return None
    mask = sample["attention_mask"].bool()
    expected = padded(dict(sample))["token_embeddings"][mask]
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, flash_attention_mask)
    # RoBERTa's positions begin behind that of its padding.
    starts = (0, int(getattr(encoder.config, "pad_token_id", None) or 0) + 1)
    try:
        encoder.set_attn_implementation(_NAME)
        for start in starts:
            encode = _Packed(encoder, start)
            off = (encode(sample)["token_embeddings"][mask] - expected).abs().max()
            if off <= _TOLERANCE * expected.abs().max():
                return encode
    except Exception as error:  # whatever stops a model from this: its texts are padded
        logging.getLogger(__name__).info("texts are padded: %s", error)
    encoder.set_attn_implementation(own_attention)
    return None


def filling(tokens: int) -> int:
    """With how many more a row is computed, 15 or an eighth at most: of tensors that each have another size the
    allocator keeps ever more, a tenth in 5,000 texts."""
    return -tokens % max(16, (1 << tokens.bit_length()) >> 4)


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
    """For transformers: (1, heads, tokens, size) each, (1, tokens, heads, size) back. Raises ValueError for a model
    that masks anything within a text."""
    if attention_mask is not None or sliding_window is not None:
        raise ValueError(f"{type(module).__name__} masks tokens of a text from each other")
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
