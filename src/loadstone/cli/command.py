"""The command line as it may be written down."""

import shlex
from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

CommandLine = Annotated[str, Parameter(parse=False)]
"""A parameter that is no flag: ``main`` fills in the command line as it was typed, to be kept in the run folder."""

_SECRET_FLAGS = ("--api-key", "--admin-key", "--header")


def shown_command(tokens: Sequence[str]) -> str:
    """``loadstone`` and its ``tokens`` as one line to paste, the values of secrets replaced by ``…``."""
    words = ["loadstone"]
    hidden = False
    for word in tokens:
        flag, equals, _ = word.partition("=")
        if hidden and not word.startswith("--"):
            words.append("…")
        elif flag in _SECRET_FLAGS and equals:
            words.append(f"{flag}=…")
        else:
            words.append(shlex.quote(word))
        hidden = word in _SECRET_FLAGS
    return " ".join(words)
