"""``--config FILE`` or ``loadstone.toml``: what it says for one verb. No key of it is passed over in silence.

Keys of the top level hold for every verb that knows them; those of a table named like a verb hold for that verb alone
and beat the top level. A flag beats the environment, which beats the file.
"""

import os
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadstone.core.errors import UsageError

CONFIG_FILE = "loadstone.toml"
ENV_PREFIX = "LOADSTONE_"
_CONCURRENCY = {"MAX_CONCURRENT": "max-concurrency"}
_SERVICE = _CONCURRENCY | {
    name: name.lower().replace("_", "-")
    for name in (
        "WORKERS",
        "THREADS",
        "MAX_NUM_SEQS",
        "MAX_NUM_BATCHED_TOKENS",
        "GPU_MEMORY_UTILIZATION",
        "MAX_WORKERS",
        "TENSOR_PARALLEL_SIZE",
    )
}
SHORT_NAMES = {
    "gate": _CONCURRENCY,
    "serve chat": _SERVICE,
    "serve rerank": _SERVICE | {"MODEL_SIZE": "model-size"},
    "serve embed": _SERVICE,
}
"""Environment variables of the deployment guides that work as they stand there, by verb."""
_NEAR = 0.75
"""From this likeness on a key is taken for a misspelt one."""

Flags = Mapping[str, bool]
"""A verb's flags without their dashes, and whether they take several values."""


@dataclass(frozen=True)
class Config:
    """A configuration file; empty where there is none."""

    path: Path = Path(CONFIG_FILE)
    document: Mapping[str, Any] = field(default_factory=dict)

    def settings_of(self, verb: str, known: Mapping[str, Flags]) -> dict[str, Any]:
        """What the file says for ``verb``, by the names of its flags. Raises UsageError for a key that no verb has."""
        every = {name for flags in known.values() for name in flags}
        tables = dict(_tables(self.document, known))
        common = {key: value for key, value in self.document.items() if not isinstance(value, Mapping)}
        self._check(common, every, "no command knows")
        for name, table in tables.items():
            if name not in known:
                raise UsageError(f"{self.path}: no command is called [{name}]; there are {', '.join(known)}")
            self._check(table, known[name], f"loadstone {name} does not know")
        found = {_name(key): value for settings in (common, tables.get(verb, {})) for key, value in settings.items()}
        flags = known[verb]
        return {name: _value(value, several=flags[name]) for name, value in found.items() if name in flags}

    def _check(self, settings: Mapping[str, Any], known: Collection[str], complaint: str) -> None:
        for key, value in settings.items():
            if _name(key) not in known or isinstance(value, Mapping):
                # Imported where it is needed, so that --help stays quick.
                from difflib import get_close_matches

                near = get_close_matches(_name(key), known, 1, _NEAR)
                meant = "".join(f"; did you mean {name}?" for name in near)
                raise UsageError(f"{self.path}: {complaint} the key {key}{meant}")


def _tables(document: Mapping[str, Any], known: Collection[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What the file says by verbs; ``[serve.chat]`` is the table of ``serve chat``."""
    for key, value in document.items():
        group = any(verb.startswith(f"{key} ") for verb in known)
        if group and isinstance(value, Mapping):
            yield from ((f"{key} {name}", inner) for name, inner in value.items() if isinstance(inner, Mapping))
            value = {name: inner for name, inner in value.items() if not isinstance(inner, Mapping)}
            if not value:
                continue
        if isinstance(value, Mapping):
            yield key, value


def _name(key: str) -> str:
    return key.replace("_", "-")


def _value(value: Any, *, several: bool) -> Any:
    """A list for a flag of one value, such as ``levels = [1, 2, 5]``, stands for its text."""
    return ",".join(map(str, value)) if isinstance(value, list) and not several else value


def from_environment() -> dict[str, str]:
    """What the environment says, by the names of flags."""
    given = {key.removeprefix(ENV_PREFIX): value for key, value in os.environ.items() if key.startswith(ENV_PREFIX)}
    return {_name(key.lower()): value for key, value in given.items()}


def from_short_names(verb: str) -> dict[str, str]:
    """What the environment says for ``verb`` by the names of the deployment guides, by the names of flags."""
    names = SHORT_NAMES.get(verb, {})
    return {flag: os.environ[name] for name, flag in names.items() if os.environ.get(name)}


def take_config(tokens: list[str]) -> Config:
    """The file that ``--config`` names, taken out of ``tokens``, else the one in the current folder.

    Raises UsageError where it cannot be read.
    """
    for position, token in enumerate(tokens):
        if token == "--config":
            _, *rest = tokens[position : position + 2]
            if not rest:
                raise UsageError("--config needs a file")
            del tokens[position : position + 2]
            return _read(Path(rest[0]))
        if token.startswith("--config="):
            del tokens[position]
            return _read(Path(token.removeprefix("--config=")))
    return _read(Path(CONFIG_FILE)) if Path(CONFIG_FILE).is_file() else Config()


def _read(path: Path) -> Config:
    try:
        return Config(path, tomllib.loads(path.read_text("utf-8")))
    except OSError as error:
        raise UsageError(f"configuration file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"configuration file {path} cannot be read: {error}") from None
