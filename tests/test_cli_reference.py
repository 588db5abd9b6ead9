"""docs/cli.md is what the command line says of itself, and the command line says something of every flag."""

import runpy
from pathlib import Path

import pytest

from loadstone.cli.main import build_app, command_of, known_flags

DOCS = Path(__file__).parent.parent / "docs"
GENERATOR = runpy.run_path(str(DOCS / "generate_cli.py"))
APP = build_app()
VERBS = list(known_flags())


def test_the_reference_is_not_stale() -> None:
    assert (DOCS / "cli.md").read_text("utf-8") == GENERATOR["generate"](), "run: python docs/generate_cli.py"


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_and_flag_is_documented(verb: str) -> None:
    page = (DOCS / "cli.md").read_text("utf-8")
    assert f"## loadstone {verb}\n" in page
    command = command_of(APP, verb)
    assert command.help
    undocumented = [flag.names for flag in GENERATOR["flags_of"](command) if not flag.parameter.help]
    assert undocumented == []
