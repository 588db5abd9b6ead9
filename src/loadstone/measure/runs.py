"""The run folder: written level by level so that nothing measured is ever lost, read back for judging and resuming.

A level's ``result.json`` is written last and by rename: its presence means that the level stands.
"""

import errno
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tomli_w
import zstandard

from loadstone.core.errors import UsageError
from loadstone.core.limits import LimitsFile, dumps
from loadstone.core.records import RequestRecord
from loadstone.core.verdict import RunVerdict
from loadstone.measure.steady import LevelData, LevelMeta
from loadstone.measure.telemetry import TelemetrySample, summarise_telemetry

RUN_FILE = "run.toml"
VERDICT_FILE = "verdict.json"
LIMITS_FILE = "limits.toml"
_RECORDS = "records.jsonl.zst"
_TELEMETRY = "telemetry.jsonl.zst"
_RESULT = "result.json"

_DISK_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
}

T = TypeVar("T", bound=msgspec.Struct)


def check_out(out: str) -> None:
    """Raises UsageError where the folder ``out`` cannot be used; asks before anything is measured."""
    path = Path(out or "runs")
    try:
        nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        used = bool(out) and path.is_dir() and any(path.iterdir())
    except OSError as error:
        raise UsageError(f"--out {path} cannot be used: {error.strerror}; name another folder") from None
    if not nearest.is_dir():
        raise UsageError(f"--out {path}: {nearest} is a file; name a folder that is empty or does not exist")
    if used:
        raise UsageError(f"--out {path} is not empty; name another folder, or go on with it by --resume {path}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"--out {path} cannot be written: no permission in {nearest}; name another folder")


def create_run(out: str, name: str, now: datetime) -> "RunFolder":
    """Make the folder: exactly ``out``, or ``runs/<time>-<name>``. Raises UsageError where it cannot be used."""
    check_out(out)
    path = Path(out) if out else Path("runs") / f"{now:%Y%m%d-%H%M%S}-{slug(name)}"
    try:
        path.mkdir(parents=True, exist_ok=bool(out))
        (path / "levels").mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written: {error.strerror}; name another folder") from None
    return RunFolder(path)


def open_run(path: str) -> "RunFolder":
    """An existing run. Raises UsageError where ``path`` holds none."""
    folder = RunFolder(Path(path))
    if not (folder.path / RUN_FILE).is_file():
        raise UsageError(f"{path} is not a run folder: it has no {RUN_FILE}")
    return folder


def slug(name: str) -> str:
    """A model's name as part of a folder's: ``Qwen/Qwen3-8B`` → ``qwen3-8b``."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return "".join(c if c.isascii() and (c.isalnum() or c in "._") else "-" for c in last).strip("-.") or "run"


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"<RunFolder {self.path}>"

    # -- writing

    def write_run(self, document: Mapping[str, Any]) -> None:
        """Everything needed to repeat the run."""
        self._replace(self.path / RUN_FILE, tomli_w.dumps(document).encode())

    def write_level(self, data: LevelData, samples: Sequence[TelemetrySample], result: Mapping[str, Any]) -> None:
        """Records and telemetry first, then ``result.json``, which makes the level stand."""
        folder = self._level_folder(data.meta)
        with _disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._write_lines(folder / _RECORDS, data.records)
        self._write_lines(folder / _TELEMETRY, samples)
        document = {**result, "loadstone": {**result.get("loadstone", {}), **msgspec.to_builtins(data.meta)}}
        self._replace(folder / _RESULT, msgspec.json.format(msgspec.json.encode(document)))

    def write_verdict(self, verdict: RunVerdict) -> None:
        self.write_document(VERDICT_FILE, verdict)

    def write_document(self, name: str, document: msgspec.Struct) -> None:
        """One more JSON file of the run."""
        self._replace(self.path / name, msgspec.json.format(msgspec.json.encode(document)))

    def write_limits(self, limits: LimitsFile | None) -> None:
        """None: where nothing passed there are no limits, and none of an earlier verdict must be left."""
        if limits is None:
            (self.path / LIMITS_FILE).unlink(missing_ok=True)
            return
        self._replace(self.path / LIMITS_FILE, dumps(limits).encode())

    def _level_folder(self, meta: LevelMeta) -> Path:
        return self.path / "levels" / f"{meta.ordinal:03d}-c{meta.concurrency}"

    def _write_lines(self, path: Path, items: Sequence[msgspec.Struct]) -> None:
        encoder = msgspec.json.Encoder()
        compressor = zstandard.ZstdCompressor(3, write_checksum=True)
        with _disk_errors(path), path.open("wb") as file:
            with compressor.stream_writer(file, closefd=False) as out:
                for item in items:
                    out.write(encoder.encode(item) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _replace(self, path: Path, data: bytes) -> None:
        """Whole or not at all, even when the power fails."""
        part = path.with_name(path.name + ".part")
        with _disk_errors(path):
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)

    # -- reading

    def read_run(self) -> dict[str, Any]:
        """``run.toml``. Raises UsageError where it cannot be read."""
        path = self.path / RUN_FILE
        try:
            return tomllib.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from None

    def is_of_rate(self) -> bool:
        """A run of ``rate``, whose levels are held to no rules. Raises UsageError as ``read_run`` does."""
        return "rate" in self.read_run().get("settings", {})

    def levels(self) -> list[LevelData]:
        """The levels that stand, in running order. Raises UsageError naming a file that cannot be read."""
        standing = sorted((self.path / "levels").glob(f"*/{_RESULT}"))
        return [self._level(result.parent) for result in standing]

    def _level(self, folder: Path) -> LevelData:
        result = _decoded(folder / _RESULT, _Result)
        if result.loadstone is None:
            raise UsageError(f"{folder / _RESULT} was not written by loadstone: it has no loadstone object")
        records = [*_lines(folder / _RECORDS, RequestRecord)]
        samples = [*_lines(folder / _TELEMETRY, TelemetrySample)]
        meta = result.loadstone
        return LevelData(meta, records, summarise_telemetry(samples, meta.window_start_s, meta.window_end_s))


class _Result(msgspec.Struct):
    loadstone: LevelMeta | None = None


def _decoded(path: Path, kind: type[_Result]) -> _Result:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unreadable(path, str(error)) from None


def _lines(path: Path, kind: type[T]) -> Iterator[T]:
    decoder = msgspec.json.Decoder(kind)
    frame = zstandard.ZstdDecompressor().decompressobj()
    rest = b""
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                *lines, rest = (rest + frame.decompress(piece)).split(b"\n")
                yield from (decoder.decode(line) for line in lines)
    except (OSError, zstandard.ZstdError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unreadable(path, str(error)) from None
    if rest or not frame.eof:
        raise _unreadable(path, "it ends too soon")


def _unreadable(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} cannot be read: {why}; delete its folder to run that level again")


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """A disk that is full or gone stops the run; what was written before stays."""
    try:
        yield
    except OSError as error:
        remedy = _DISK_REMEDIES.get(error.errno or 0, "check the folder")
        raise UsageError(
            f"{path} cannot be written ({error.strerror}); the levels before it stand: {remedy} and go on with --resume"
        ) from None
