"""Writes docs/cli.md from the command line itself: ``python docs/generate_cli.py``."""

import inspect
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

from cyclopts import App
from cyclopts.argument import Argument

from loadstone.cli.main import build_app, command_of, known_flags
from loadstone.cli.presets import HELP as PRESET_HELP

PAGE = Path(__file__).with_name("cli.md")

_INTRO = """\
# Commands

Written by `docs/generate_cli.py` from the command line itself; do not edit.

Every flag is equally an environment variable, `LOADSTONE_<FLAG>` (`--base-url` is `LOADSTONE_BASE_URL`), and a key of
`--config FILE` or of `loadstone.toml` in the current folder (`base-url = "http://127.0.0.1:8000"`). A flag beats the
environment, which beats the file, which beats a preset. Keys of the top level hold for every command that has such a
flag; those of a table named like a command (`[find]`) for that command alone, and they beat the top level.
`--api-key` is taken from `OPENAI_API_KEY` as well.

Exit status: 0 found or passed · 1 the server failed the rules at the first level, the target was never reached, or the
second run is worse · 2 usage or bad input · 3 the server could not be reached · 4 INVALID, the generator was the
bottleneck · 130 interrupted, with everything measured on disk.
"""


def generate() -> str:
    """The whole page."""
    app = build_app()
    sections = (line for verb in known_flags() for line in _section(verb, command_of(app, verb)))
    return "\n".join([_INTRO, *sections, "## Presets\n", PRESET_HELP])


def flags_of(command: App) -> list[Argument]:
    """The flags and positional arguments of one command, in their order."""
    return [argument for argument in command.assemble_argument_collection(parse_docstring=True) if argument.show]


def _section(verb: str, command: App) -> Iterator[str]:
    yield f"## loadstone {verb}\n"
    yield f"{_summary(command)}\n"
    groups: dict[str, list[Argument]] = {}
    for argument in flags_of(command):
        groups.setdefault(_group(argument), []).append(argument)
    for group, arguments in groups.items():
        if group:
            yield f"**{group}**\n"
        yield "| flag | default | |\n| --- | --- | --- |"
        yield from (_row(argument) for argument in arguments)
        yield ""


def _summary(command: App) -> str:
    """The docstring of the command's function, up to its parameters."""
    text = inspect.getdoc(command.default_command) or ""
    return text.partition("\nParameters\n")[0].strip()


def _group(argument: Argument) -> str:
    """Empty for the groups that cyclopts makes by itself."""
    groups = typing.cast(Sequence[typing.Any], argument.parameter.group)
    name = str(groups[0].name)
    return "" if name in ("Arguments", "Parameters") else name


def _row(argument: Argument) -> str:
    name = argument.names[0]
    if argument.index is not None:
        name = name.removeprefix("--").replace("-", "_").upper()
    text = (argument.parameter.help or "").strip().replace("<", r"\<").replace("|", r"\|")
    return f"| `{name}` | {_default(argument)} | {text} |"


def _default(argument: Argument) -> str:
    default = argument.field_info.default
    if argument.required:
        return "required"
    if default is None or default is False or default in ("", ()):
        return ""
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(generate(), encoding="utf-8")
