"""Runs the scripts and clients of ``examples/services`` as a user does, and reads what they print."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from processes import clean

SERVICES = Path(__file__).parent.parent / "examples" / "services"
_LONGEST_S = 120


def example(name: str, url: str, *arguments: str, **variables: str) -> str:
    """What ``name`` prints about the service at ``url``; its exit status must be 0."""
    interpreter = sys.executable if name.endswith(".py") else found("bash")
    return run(interpreter, SERVICES / name, *arguments, URL=url, LOADSTONE_URL=url, **variables)


def run(program: str, *words: object, **variables: str) -> str:
    """What a program prints; its exit status must be 0."""
    done = subprocess.run(
        [found(program), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=_LONGEST_S,
        env=clean() | variables,
        cwd=SERVICES,
        check=False,
    )
    assert done.returncode == 0, f"{program} ends with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def found(program: str) -> str:
    path = shutil.which(program)
    assert path, f"{program} is not on PATH; Debian's packages are apache2-utils, curl and wrk"
    return path


def figure(told: str, name: str) -> int:
    """A count that ab prints; those of errors are left out where there are none."""
    match = re.search(rf"^{name}:\s+(\d+)", told, re.MULTILINE)
    return int(match.group(1)) if match else 0


def check_wrk(told: str) -> None:
    """wrk has been answered, and never badly; ``told`` may say something of other programs before."""
    told = told[told.index("Running ") :]
    match = re.search(r"(\d+) requests in", told)
    assert match, told
    assert int(match.group(1)) > 0
    assert "Socket errors" not in told
    assert "Non-2xx" not in told
