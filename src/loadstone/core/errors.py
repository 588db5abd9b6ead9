"""Every error that a user can cause or meet, each with one line of text that names the thing and the remedy.

::

    LoadstoneError
    ├── UsageError          bad flag, bad file, bad folder                     exit 2
    ├── UnreachableError    the server could not be reached or spoken to       exit 3
    ├── RefusedError        the server answered the first request with a no    exit 1
    └── InvalidLevelError   the generator was the bottleneck                   exit 4
"""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_INVALID = 4
EXIT_INTERRUPTED = 130


class LoadstoneError(Exception):
    """An error with a foreseeable cause: printed as one line, never as a traceback."""

    exit_status = EXIT_FAILED


class UsageError(LoadstoneError):
    """What the user gave cannot be used: a flag, a file, a folder."""

    exit_status = EXIT_USAGE


class UnreachableError(LoadstoneError):
    """No conversation with the server is possible: refused, unknown host, TLS failure, not HTTP."""

    exit_status = EXIT_UNREACHABLE


class RefusedError(LoadstoneError):
    """The server can be reached but answers the first request with an error (401, 404 for the model, …)."""

    exit_status = EXIT_FAILED


class InvalidLevelError(LoadstoneError):
    """No level could be judged because the generator itself was the bottleneck."""

    exit_status = EXIT_INVALID
