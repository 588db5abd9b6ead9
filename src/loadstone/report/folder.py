"""A run folder as the report reads it: ``verdict.json`` for the figures, ``run.toml`` for how they came about."""

import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from loadstone.core.errors import UsageError
from loadstone.core.verdict import RunVerdict

Facts = Mapping[str, Any]
"""``run.toml`` as it stands: a free mapping of scalars, lists and tables."""


class Run(msgspec.Struct, frozen=True):
    """One run folder, read."""

    path: Path
    verdict: RunVerdict
    facts: dict[str, Any]

    def fact(self, key: str) -> Any:
        """What ``run.toml`` says of ``key``: what was found out, else what was asked for; None for neither or ""."""
        values = {name: value for name, value in flat(self.facts).items() if value != ""}
        asked_for = (name for name in values if name.rpartition(".")[2] == key)
        name = next((name for name in (key, f"server.{key}", *asked_for) if name in values), None)
        return None if name is None else values[name]


def read_run(run_dir: Path) -> Run:
    """Read a run folder.

    Raises :class:`UsageError` naming the file that is missing, unreadable or not what it should be.
    """
    if not run_dir.is_dir():
        raise UsageError(f"{run_dir} is not a folder; give the run folder that find or bench wrote")
    verdict_path, facts_path = run_dir / "verdict.json", run_dir / "run.toml"
    if (run_dir / "rate.json").is_file() and not verdict_path.is_file():
        raise UsageError(f"{run_dir} is a run of rate, which has no line; its answer: loadstone report {run_dir}")
    try:
        verdict = msgspec.json.decode(_read(verdict_path), type=RunVerdict)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{verdict_path} is not a verdict of this version ({error}); judge the run again") from error
    try:
        facts = tomllib.loads(_read(facts_path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{facts_path} is not valid TOML ({error}); restore it or measure again") from error
    return Run(run_dir, verdict, facts)


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path`` and rename, so that a full disk leaves what was there before.

    Raises :class:`UsageError` where the folder cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; free space or make the folder writable") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing; the run is not finished or this is not a run folder") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _walk(table: Facts, name: str = "") -> Iterator[tuple[str, str, Any]]:
    """(table, key, value) of each value that is not a table, the outer ones first."""
    for key, value in table.items():
        if not isinstance(value, Mapping):
            yield name, key, value
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{name}.{key}" if name else key)


def flat(facts: Facts) -> dict[str, Any]:
    """Every value of ``facts`` under its dotted name."""
    return {f"{table}.{key}" if table else key: value for table, key, value in _walk(facts)}
