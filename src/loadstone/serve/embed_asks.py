"""Bodies of /embed_text, /embed_image and /v1/embeddings into texts and images to embed. Pure.

A text that is too long for the model is refused, as OpenAI does, unless the request says ``"truncate": true``: a vector
of half a document finds the wrong things, and nobody sees why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadstone.core.refusals import BadAskError

MAX_TEXTS = 2048
"""As OpenAI's. A request is one place in the gate, and holds the engine for as long as all of its texts take."""
MAX_IMAGES = 64
MAX_CHARACTERS = 1_000_000
"""Of one text: several times what the longest models read, and half a second of tokenising."""

_ENCODINGS = ("float", "base64")
_IMAGE_FIELDS = {"image": "data", "images": "data", "url": "url", "urls": "url"}


@dataclass(frozen=True, slots=True)
class TextItem:
    """A text to embed."""

    content: str | tuple[int, ...]
    """Text, or token ids that are taken as they are, special tokens included."""
    param: str
    """Field of the request that it came from, such as ``texts[3]``."""
    truncate: bool = False
    """Read the beginning of a text that is too long, rather than refuse it."""


@dataclass(frozen=True, slots=True)
class ImageItem:
    """An image to embed, as received."""

    data: bytes = field(repr=False)
    param: str


Item = TextItem | ImageItem


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where an image comes from."""

    kind: str
    """data (base64) or url."""
    value: object
    """As received."""
    param: str


@dataclass(frozen=True, slots=True)
class VectorOptions:
    """How the vectors are wanted."""

    normalize: bool = True
    dimensions: int | None = None
    """Keep this many and normalise again; None is all."""
    base64: bool = False
    """Little-endian float32, as OpenAI's SDK asks for, instead of numbers."""


def text_items(body: Mapping[str, Any]) -> list[TextItem]:
    """``{"text": str}`` or ``{"texts": [str]}``. Raises BadAskError, naming the field."""
    name = _one_of(body, ("text", "texts"))
    truncate = _flag(body, "truncate", default=False)
    if name == "text":
        return [TextItem(_text(body[name], name), name, truncate)]
    return [TextItem(_text(text, param), param, truncate) for text, param in _each(body[name], name, MAX_TEXTS)]


def openai_items(body: Mapping[str, Any]) -> list[TextItem]:
    """``{"input": str | [str] | [int] | [[int]]}``. Raises BadAskError, naming the field."""
    given, truncate = body.get("input"), _flag(body, "truncate", default=False)
    if isinstance(given, str) or _is_tokens(given):
        return [TextItem(_content(given, "input"), "input", truncate)]
    return [TextItem(_content(each, param), param, truncate) for each, param in _each(given, "input", MAX_TEXTS)]


def image_sources(body: Mapping[str, Any]) -> list[ImageSource]:
    """``{"image": base64}``, ``{"url": str}``, or ``images`` or ``urls`` with a list of them. Raises BadAskError."""
    name = _one_of(body, tuple(_IMAGE_FIELDS))
    kind = _IMAGE_FIELDS[name]
    if not name.endswith("s"):
        return [ImageSource(kind, body[name], name)]
    return [ImageSource(kind, value, param) for value, param in _each(body[name], name, MAX_IMAGES)]


def vector_options(body: Mapping[str, Any], dim: int) -> VectorOptions:
    """What the body says of the vectors, of which the model gives ``dim`` dimensions. Raises BadAskError."""
    dimensions, encoding = body.get("dimensions"), body.get("encoding_format", "float")
    if dimensions is not None and not (_is_whole(dimensions) and 1 <= dimensions <= dim):
        raise BadAskError(f"dimensions must be a whole number from 1 to {dim}, the model's own", "dimensions")
    if encoding not in _ENCODINGS:
        raise BadAskError(f"encoding_format must be one of {', '.join(_ENCODINGS)}", "encoding_format")
    return VectorOptions(_flag(body, "normalize", default=True), dimensions, encoding == "base64")


def _one_of(body: Mapping[str, Any], names: Sequence[str]) -> str:
    given = [name for name in names if body.get(name) is not None]
    if len(given) != 1:
        also = f", not {' and '.join(given)} together" if given else ""
        raise BadAskError(f"give exactly one of {', '.join(names)}{also}", given[1] if given else names[0])
    return given[0]


def _each(values: object, name: str, most: int) -> list[tuple[Any, str]]:
    """The entries of a list, each with what it is called in an error."""
    if not isinstance(values, list) or not values:
        raise BadAskError(f"{name} must be a list with something in it", name)
    if len(values) > most:
        raise BadAskError(
            f"{name} has {len(values)} entries, and {most} are taken at once: send several requests", name
        )
    return [(value, f"{name}[{index}]") for index, value in enumerate(values)]


def _content(value: object, param: str) -> str | tuple[int, ...]:
    if isinstance(value, list) and value and all(_is_whole(token) for token in value):
        return tuple(value)
    if isinstance(value, list):
        raise BadAskError(f"{param} must be a text or a list of token ids", param)
    return _text(value, param)


def _text(value: object, param: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadAskError(f"{param} must be a text that is not empty", param)
    if len(value) > MAX_CHARACTERS:
        raise BadAskError(f"{param} has {len(value)} characters; at most {MAX_CHARACTERS} are read", param)
    return value


def _is_tokens(value: object) -> bool:
    """A list of numbers is one text, as token ids; OpenAI's API reads it so."""
    return isinstance(value, list) and bool(value) and _is_whole(value[0])


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flag(body: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BadAskError(f"{name} must be true or false", name)
    return value
