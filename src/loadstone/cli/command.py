"""The command line as it may be written down."""

import shlex
from collections.abc import Sequence

_SECRET_FLAGS = ("--api-key", "--admin-key", "--header")


def shown_command(argv: Sequence[str]) -> str:
    """``argv`` as one line to paste, the values of secrets replaced by ``…``."""
    words = ["loadstone"]
    hidden = False
    for word in argv[1:]:
        flag, equals, _ = word.partition("=")
        if hidden and not word.startswith("--"):
            words.append("…")
        elif flag in _SECRET_FLAGS and equals:
            words.append(f"{flag}=…")
        else:
            words.append(shlex.quote(word))
        hidden = word in _SECRET_FLAGS
    return " ".join(words)
