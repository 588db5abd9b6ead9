"""A JSON line for each request, with everything needed to ask why it took so long or was refused. No secrets."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import msgspec

from loadstone.core.errors import UsageError
from loadstone.hold.relay import Finished, Relay

_encode = msgspec.json.Encoder().encode


class AccessLog:
    """Appends to a file, line by line, so that ``tail -f`` and log rotation by copy work."""

    def __init__(self, path: str) -> None:
        """``-`` is standard output. Raises UsageError where the file cannot be opened."""
        self._path = path
        self._file: IO[bytes] = sys.stdout.buffer
        try:
            if path != "-":
                self._file = Path(path).open("ab", buffering=0)  # noqa: SIM115  # closed by close()
        except OSError as error:
            raise UsageError(f"--access-log {path} cannot be written: {error.strerror}") from None

    def __repr__(self) -> str:
        return f"<AccessLog {self._path}>"

    def write(self, relay: Relay, finished: Finished) -> None:
        """One line. Times in seconds."""
        since_ns = relay.arrived_ns
        asked, account = relay.asked, relay.account
        line = {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": relay.request_id.decode("ascii", "replace"),
            "client": account.client,
            "address": account.address,
            "method": asked.method,
            "path": asked.target.partition(b"?")[0].decode("latin-1"),
            "outcome": finished.outcome.value,
            "status": relay.status,
            "upstream": relay.upstream_name,
            "attempts": relay.attempts,
            "wait_s": _seconds((relay.granted_ns or finished.ended_ns) - since_ns),
            "ttft_s": _seconds(relay.first_ns - since_ns) if relay.first_ns else None,
            "total_s": _seconds(finished.ended_ns - since_ns),
            "tokens": finished.tokens,
            "output_tokens": finished.output_tokens,
            "error": relay.error,
        }
        self._file.write(_encode(line) + b"\n")
        if self._path == "-":
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._path != "-":
            self._file.close()


def _seconds(ns: int) -> float:
    return round(ns / 1e9, 6)
