"""What an engine writes on its standard output and error: in a file, of which the end is kept."""

import os
from pathlib import Path
from typing import BinaryIO

_MOST_BYTES = 4 * 1024 * 1024
_END_BYTES = 64 * 1024


class EngineLog:
    """The engine itself appends to ``path``, so a slow reader never stalls it. Kept are the file and one before it.

    The file is held open here as well: what the engine has written can be read even where somebody deletes it.
    """

    def __init__(self, path: Path, most_bytes: int = _MOST_BYTES) -> None:
        self.path = path
        self._most_bytes = most_bytes
        self._file: BinaryIO | None = None
        self._began = 0

    def __repr__(self) -> str:
        return f"<EngineLog {self.path}>"

    def begin(self) -> BinaryIO:
        """The file, for another run of the engine; what is in it already stays. Raises OSError."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b", buffering=0)
        self._began = self._file.tell()
        self.trim()
        return self._file

    def end(self) -> str:
        """The last 64 KiB of what this run of the engine has written."""
        if self._file is None:
            return ""
        start = max(self._began, self._size() - _END_BYTES)
        return os.pread(self._file.fileno(), _END_BYTES, start).decode(errors="replace")

    def trim(self) -> None:
        """Where it has grown too long, move its end to ``<path>.1``; the engine goes on appending. Raises OSError."""
        if self._file is None or self._size() <= self._most_bytes:
            return
        end = os.pread(self._file.fileno(), self._most_bytes, self._size() - self._most_bytes)
        os.ftruncate(self._file.fileno(), 0)
        self._began = 0
        self.path.with_name(self.path.name + ".1").write_bytes(end)

    def close(self) -> None:
        """Nothing is read any more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _size(self) -> int:
        return 0 if self._file is None else os.fstat(self._file.fileno()).st_size
