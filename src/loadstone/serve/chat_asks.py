"""What a client asks a chat engine for: the OpenAI request bodies, read strictly. Pure.

What the engine cannot do is refused by name, never passed over: an answer that ignores half of the question looks
right. Keys that change nothing in the answer (``user``, ``metadata``, …) are let through.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loadstone.core.refusals import BadAskError

MAX_STOPS = 16
_MAX_TEMPERATURE = 2.0

_HARMLESS: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}
"""Keys that would change the answer and that the engine does not have, with the values that ask for nothing."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """In (0, 1]."""


@dataclass(frozen=True)
class TextAsk:
    """One reply that is asked for."""

    prompt: str | list[int] | list[dict[str, str]]
    """A text, token ids, or the messages of a chat (``role`` and ``content``)."""
    model: str | None
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    template_options: Mapping[str, Any]
    """For the chat template, such as Qwen3's ``enable_thinking``."""


def chat_ask(body: Mapping[str, Any], default: Sampling) -> TextAsk:
    """Read the body of ``/v1/chat/completions``. Raises BadAskError."""
    return _ask(body, _messages(body.get("messages")), default, "max_completion_tokens", "max_tokens")


def completion_ask(body: Mapping[str, Any], default: Sampling) -> TextAsk:
    """Read the body of ``/v1/completions``. Raises BadAskError."""
    return _ask(body, _prompt(body.get("prompt")), default, "max_tokens")


def _ask(body: Mapping[str, Any], prompt: Any, default: Sampling, *length_keys: str) -> TextAsk:
    _refuse_unsupported(body)
    sampling = Sampling(
        temperature=_number(body, "temperature", default.temperature, 0.0, _MAX_TEMPERATURE),
        top_p=_top_p(body, default.top_p),
    )
    _check_seed(body, sampling)
    lengths = [length for key in length_keys if (length := _positive(body, key)) is not None]
    return TextAsk(
        prompt=prompt,
        model=_typed(body, "model", str, None, "a string"),
        max_tokens=lengths[0] if lengths else None,
        sampling=sampling,
        stop=_stops(body.get("stop")),
        ignore_eos=_typed(body, "ignore_eos", bool, False, "true or false"),
        stream=_typed(body, "stream", bool, False, "true or false"),
        include_usage=_include_usage(body),
        template_options=_typed(body, "chat_template_kwargs", dict, {}, "an object"),
    )


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    for key, harmless in _HARMLESS.items():
        value = body.get(key)
        if value is not None and not any(_same(value, one) for one in harmless):
            raise BadAskError(f"{key} is not supported by this engine; leave it out", key)


def _same(value: object, other: object) -> bool:
    """Equal as JSON values are: true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _check_seed(body: Mapping[str, Any], sampling: Sampling) -> None:
    """All requests of a batch draw from one generator: a seed of their own is honoured where nothing is drawn."""
    seed = _typed(body, "seed", int, None, "an integer")
    if seed is not None and sampling.temperature > 0:
        raise BadAskError("seed is not supported by this engine; temperature 0 gives the same answer each time", "seed")


def _typed(body: Mapping[str, Any], key: str, kind: type, default: Any, what: str) -> Any:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BadAskError(f"{key} must be {what}", key)
    return value


def _number(body: Mapping[str, Any], key: str, default: float, low: float, high: float) -> float:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadAskError(f"{key} must be a number", key)
    if not low <= value <= high:
        raise BadAskError(f"{key} must lie between {low:g} and {high:g}", key)
    return float(value)


def _top_p(body: Mapping[str, Any], default: float) -> float:
    value = _number(body, "top_p", default, 0.0, 1.0)
    if value == 0.0:
        raise BadAskError("top_p must be above 0; temperature 0 takes the likeliest token", "top_p")
    return value


def _positive(body: Mapping[str, Any], key: str) -> int | None:
    value: int | None = _typed(body, key, int, None, "an integer")
    if value is not None and value < 1:
        raise BadAskError(f"{key} must be at least 1", key)
    return value


def _include_usage(body: Mapping[str, Any]) -> bool:
    options = _typed(body, "stream_options", dict, {}, "an object")
    value = options.get("include_usage")
    if value is not None and not isinstance(value, bool):
        raise BadAskError("stream_options.include_usage must be true or false", "stream_options.include_usage")
    return bool(value)


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise BadAskError("stop must be a string or a list of strings", "stop")
    if "" in stops:
        raise BadAskError("stop must not hold an empty string", "stop")
    if len(stops) > MAX_STOPS:
        raise BadAskError(f"stop holds {len(stops)} strings; at most {MAX_STOPS}", "stop")
    return tuple(stops)


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if not value:
        raise BadAskError("prompt is missing or empty", "prompt")
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    if isinstance(value, list) and len(value) > 1 and all(isinstance(one, str | list) for one in value):
        raise BadAskError(f"prompt holds {len(value)} prompts; send one request for each", "prompt")
    raise BadAskError("prompt must be a string or a list of token ids", "prompt")


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise BadAskError("messages must be a list of at least one message", "messages")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadAskError(f"{where} must be an object", where)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise BadAskError(f"{where}.role must be a string", f"{where}.role")
    return {"role": role, "content": _content(message.get("content"), f"{where}.content")}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadAskError(f"{where} must be a string or a list of parts", where)
    return "\n".join(_part(part, f"{where}[{place}]") for place, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise BadAskError(f'{where} must be a part {{"type": "text", "text": …}}: this model reads text only', where)
