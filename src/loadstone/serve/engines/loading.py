"""What the embedding engines share in loading a model."""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from loadstone.core.errors import UsageError

QUANTIZATIONS = ("none", "int8")


@contextlib.contextmanager
def loading(model: str) -> Iterator[None]:
    """Turns what libraries raise for a model that is not there or not whole into a UsageError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"--model {model} cannot be loaded ({reason[0]}); give the folder of a local copy") from error


def quantize(model: Any, quantization: str) -> None:
    """Make the linear layers of a torch module int8, weights and activations, in place. Raises UsageError.

    Activations are quantised as they come, which on the CPU is 1.5 to 2 × as fast as float. On MiniLM texts of three
    words and more keep their vectors (cosine at least 0.991 in 490 texts), but 4 % of single words fall below 0.99, the
    worst of 300 to 0.978. Int8 weights alone stay above 0.996 and gain no time; torch's own falls to 0.96 at best.
    """
    if quantization not in QUANTIZATIONS:
        raise UsageError(f"--quantization {quantization}: the embedding engines have {' and '.join(QUANTIZATIONS)}")
    if quantization == "none":
        return
    if importlib.util.find_spec("torchao") is None:
        raise UsageError("--quantization int8 needs the torchao package: pip install torchao")
    torchao = importlib.import_module("torchao.quantization")
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())


def text_limit(model: str, own: int | None, asked: int | None) -> int | None:
    """Longest text in tokens: the model's own limit, or the shorter one asked for. Raises UsageError."""
    if asked is not None and own is not None and asked > own:
        raise UsageError(f"--max-model-len {asked}: {model} reads {own} tokens at most; lower it or leave it out")
    return asked if asked is not None else own
