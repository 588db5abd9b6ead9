"""What is read of the JSON that passes by; everything else in it is skipped by the parser."""

from typing import Annotated

import msgspec

ABSENT = msgspec.Raw()

_Tokens = Annotated[int, msgspec.Meta(ge=0)]
_Choices = Annotated[int, msgspec.Meta(ge=1, le=1024)]


class Ask(msgspec.Struct):
    """The few keys of a request that cost something."""

    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    max_output_tokens: _Tokens | None = None
    n_predict: _Tokens | None = None
    min_tokens: _Tokens | None = None
    n: _Choices | None = None
    best_of: _Choices | None = None
    messages: msgspec.Raw = ABSENT
    prompt: msgspec.Raw = ABSENT


class Usage(msgspec.Struct):
    """What a server counted."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class Reply(msgspec.Struct):
    """A reply, or an event of one."""

    usage: Usage | None = None


class Model(msgspec.Struct):
    """One that a server has."""

    id: str


class Models(msgspec.Struct):
    """What GET /v1/models answers."""

    data: list[Model]


# All of them raise msgspec.DecodeError, or UnicodeDecodeError.
decode_ask = msgspec.json.Decoder(Ask).decode
decode_reply = msgspec.json.Decoder(Reply).decode
decode_models = msgspec.json.Decoder(Models).decode
