"""schemathesis against the gate's own description of its own endpoints, in every state that they can tell of."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import CHAT, Running, chat, clean, fetch, gate_before, open_reply, simulated, until

SCHEMATHESIS = Path(sys.executable).parent / "schemathesis"
CONFIGURATION = Path(__file__).parent / "schemathesis.toml"
ENDLESS = 1_000_000
KEY = "only-for-the-admin"


@pytest.fixture(scope="module")
def engine() -> Iterator[Running]:
    with simulated() as engine:
        yield engine


def conforms(gate: Running, folder: Path, *options: str) -> None:
    """Every check that schemathesis knows, at each endpoint of the description."""
    command = [SCHEMATHESIS, "--no-color", "--config-file", CONFIGURATION, "run", f"{gate.url}/openapi.json"]
    done = subprocess.run(
        [*command, "--checks", "all", "--seed", "1", "--max-examples", "20", *options],
        cwd=folder,
        env=clean(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "Tested: 4" in done.stdout
    assert "✅  Coverage" in done.stdout
    assert "✅  Fuzzing" in done.stdout


def test_a_gate_that_has_just_begun(engine: Running, tmp_path: Path) -> None:
    with gate_before(engine) as gate:
        conforms(gate, tmp_path)


def test_a_gate_that_is_full_and_has_refused(engine: Running, tmp_path: Path) -> None:
    options = ("--max-concurrency", 1, "--max-queue", 0, "--max-output-tokens", 0, "--requests-per-minute", 2)
    with gate_before(engine, options=options) as gate:
        statuses = [fetch(gate.url, CHAT, chat(tokens)).status for tokens in (4, -1)]
        with open_reply(gate.url, CHAT, chat(ENDLESS, stream=True)) as stream:
            assert stream.readline().startswith(b"data: ")
            statuses += [fetch(gate.url, CHAT, chat()).status]
            assert statuses == [200, 400, 429]
            conforms(gate, tmp_path)


def test_a_gate_without_an_upstream_that_is_up(tmp_path: Path) -> None:
    with gate_before("http://127.0.0.1:9") as gate:
        until(lambda: fetch(gate.url, "/health").status == 503)
        conforms(gate, tmp_path, "--exclude-checks", "not_a_server_error")


def test_a_gate_with_an_admins_key(engine: Running, tmp_path: Path) -> None:
    with gate_before(engine, options=("--admin-key", KEY)) as gate:
        assert fetch(gate.url, "/stats").status == 401
        conforms(gate, tmp_path, "--header", f"X-Loadstone-Admin: {KEY}")
        conforms(gate, tmp_path, "--auth", f"anyone:{KEY}")
