"""How the tokens of a batch are drawn, for each request as it asked: processors for transformers' continuous batching.

transformers' own divide by a temperature of 0 and sort the whole vocabulary for a top_p of 1.
"""

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)


class Temperature(ContinuousBatchingTemperatureLogitsWarper):  # type: ignore[misc]
    """Each row at its own temperature; at 0 the likeliest token alone is left, the first of equals."""

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """``scores``: [rows, vocabulary]. ``tensor_arg``: temperatures of at least so many rows, as int32."""
        temperatures = _floats(tensor_arg, scores).unsqueeze(-1)
        greedy = temperatures == 0
        likeliest = scores.argmax(dim=-1, keepdim=True)
        alone = torch.full_like(scores, -torch.inf).scatter(-1, likeliest, 0.0)
        return torch.where(greedy, alone, scores / temperatures.masked_fill(greedy, 1.0))


class Nucleus(ContinuousBatchingTopPLogitsWarper):  # type: ignore[misc]
    """Each row at its own top_p. On the CPU a batch in which nobody asks for less than 1 is not sorted."""

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """``scores``: [rows, vocabulary]. ``tensor_arg``: top_p of at least so many rows, as int32."""
        # On a GPU the question would wait for the device, and cannot be asked while a graph is captured.
        if scores.device.type == "cpu" and bool((_floats(tensor_arg, scores) >= 1.0).all()):
            return scores
        result: torch.Tensor = super().__call__(scores, tensor_arg)
        return result


def _floats(tensor_arg: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return tensor_arg[: scores.size(0)].view(dtype=torch.float32)
