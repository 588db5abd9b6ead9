"""What models have in common that compute texts in one row, unpadded, through an attention of ours.

Whether a model really has nothing else in it that mixes tokens or counts positions in a way of its own, its numbers
tell: ``exchanged`` compares them with those of padded texts. No list says which models can do that.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

_TOLERANCE = 1e-3
"""Of the largest component. What texts see of each other if a model isn't fit for this is a hundred times as much; the
order of a sum in float32 is a thousandth of it."""

W = TypeVar("W")


def fit(model: Any) -> bool:
    """``model`` (of transformers) is on a CPU, where padding costs as much as words, in numbers fine enough to tell."""
    own_attention = getattr(model.config, "_attn_implementation", None)
    return own_attention is not None and model.device.type == "cpu" and model.dtype == torch.float32


def exchanged(
    model: Any, attention: Callable[..., Any], ways: Iterable[W], numbers: Callable[[W], Tensor], expected: Tensor
) -> W | None:
    """The first of the ``ways`` to compute whose ``numbers`` are as ``expected`` with ``attention`` in the place of the
    model's own, which it keeps then; None where there is none, and the model is as it was."""
    own_attention = model.config._attn_implementation
    name = f"loadstone_{attention.__module__.rpartition('.')[2]}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, flash_attention_mask)
    try:
        model.set_attn_implementation(name)
        for way in ways:
            if (numbers(way) - expected).abs().max() <= _TOLERANCE * expected.abs().max():
                return way
    except Exception as error:  # whatever stops a model from this: its texts are padded
        logging.getLogger(__name__).info("texts are padded: %s", error)
    model.set_attn_implementation(own_attention)
    return None


def refuse_masks(module: Any, attention_mask: Tensor | None, sliding_window: int | None) -> None:
    """Raises ValueError for a model that masks anything within a text."""
    if attention_mask is not None or sliding_window is not None:
        raise ValueError(f"{type(module).__name__} masks tokens of a text from each other")


def filling(tokens: int) -> int:
    """With how many more a row is computed, 15 or an eighth at most: of tensors that each have another size the
    allocator keeps ever more, a tenth in 5,000 texts."""
    return -tokens % max(16, (1 << tokens.bit_length()) >> 4)
