"""What the README tells people to type: each command is understood, and those marked for it run."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadstone.cli.main import build_app
from loadstone.cli.presets import MeasuredRun, expand
from loadstone.core.errors import EXIT_OK

ROOT = Path(__file__).parent.parent
PAGES = (
    *("README.md", "examples/README.md", "docs/method.md", "docs/design.md"),
    *("docs/gate.md", "docs/services.md", "docs/chat-engines.md"),
)
MARKED = re.compile(r"^<!-- run -->\n```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```(sh|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(loadstone \w+ [^`…]+)`")
LINK = re.compile(r"\]\(([^)#:]+)\)")
PLACEHOLDERS = {"http://host:port": "http://127.0.0.1:1"}


def commands_of(text: str) -> Iterator[str]:
    """Every ``loadstone …`` command of a page, in fences and within sentences."""
    for kind, block in FENCED.findall(text):
        prompt = "$ " if kind == "console" else ""
        lines = (line.removeprefix(prompt) for line in block.splitlines() if line.startswith(f"{prompt}loadstone "))
        yield from (line.partition(" &")[0] for line in lines)
    for command in INLINE.findall(text):
        yield command.replace("\n", " ")


def all_commands() -> list[str]:
    found = {command for page in PAGES for command in commands_of((ROOT / page).read_text("utf-8"))}
    found |= {command for script in (ROOT / "examples").glob("*.sh") for command in script_commands(script)}
    return sorted(found)


def script_commands(script: Path) -> Iterator[str]:
    """The commands of a shell script, its variables replaced by their defaults or by 1."""
    text = script.read_text("utf-8").replace("\\\n", " ")
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    text = re.sub(r"\$\(\(.*?\)\)|\$\{?\w+\}?", "1", text)
    for line in text.splitlines():
        if line.strip().startswith("loadstone "):
            yield " ".join(line.partition("2>&1")[0].split())


def test_there_are_commands_to_check() -> None:
    verbs = {command.split()[1] for command in all_commands()}
    assert verbs >= {"bench", "compare", "find", "judge", "rate", "report", "sim"}


@pytest.mark.parametrize("command", all_commands())
def test_every_command_is_understood(command: str) -> None:
    for placeholder, value in PLACEHOLDERS.items():
        command = command.replace(placeholder, value)
    run = MeasuredRun(line=100, throughput_rps=10.0, workload={})
    tokens = expand(shlex.split(command)[1:], lambda folder: run).tokens
    build_app().parse_args(tokens, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_somewhere(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text("utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_marked_commands_of_the_readme_run(tmp_path: Path) -> None:
    """In their order, in one folder, against the simulator; the search is cut down to one level."""
    blocks = MARKED.findall((ROOT / "README.md").read_text("utf-8"))
    commands = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    simulator = [sys.executable, "-m", "loadstone", "sim", "--profile", "wide"]
    with subprocess.Popen(simulator, stdout=subprocess.PIPE, text=True) as sim:
        try:
            assert sim.stdout is not None
            base_url = sim.stdout.readline().split()[4]
            settings = {"LOADSTONE_BASE_URL": base_url, "LOADSTONE_LEVELS": "10"}
            statuses = {command: status_of(command, tmp_path, settings) for command in commands}
        finally:
            sim.terminate()
    assert statuses == dict.fromkeys(commands, EXIT_OK)


def status_of(command: str, folder: Path, settings: dict[str, str]) -> int:
    words = [sys.executable, "-m", *shlex.split(command)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LOADSTONE_")}
    return subprocess.run(words, cwd=folder, env=clean | settings, stdout=subprocess.DEVNULL).returncode
