"""What a server says when it says no: one line out of whatever body came with it."""

import re
from typing import Any, Final

import msgspec

_TITLE: Final = re.compile(rb"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_TAG: Final = re.compile(rb"<[^>]*>")


def message_of(body: bytes, limit: int = 200) -> str:
    """The message of an error body on one line of at most ``limit`` characters.

    Known shapes: ``{"error": {"message"}}``, ``{"error": str}``, ``{"message"}``, ``{"detail"}`` (a text or FastAPI's
    list); of HTML the title; else the beginning of the text.
    """
    try:
        said: str | bytes = _of_json(msgspec.json.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError):
        title = _TITLE.search(body)
        said = title[1] if title else _TAG.sub(b" ", body)
    return one_line(said if said else body, limit)


def one_line(text: str | bytes, limit: int) -> str:
    """``text`` without line breaks, cut at ``limit`` characters."""
    if isinstance(text, bytes):
        text = text[: 8 * limit].decode("utf-8", errors="replace")
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _of_json(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "; ".join(said for item in value if (said := _of_json(item)))
    if isinstance(value, dict):
        # "msg" is FastAPI's, inside the list in "detail", with "loc" naming the field.
        for key in ("error", "message", "detail", "msg"):
            if value.get(key) and (said := _of_json(value[key])):
                return said + _place(value)
    return ""


def _place(value: dict[str, Any]) -> str:
    place = value.get("loc")
    return f" ({'.'.join(map(str, place))})" if isinstance(place, list) else ""
