"""``find`` on a server that stands behind a gate: with the admin's key it measures the server, without it the gate."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from processes import CHAT, NO_QUOTAS, Running, chat, fetch, gate_before, loadstone, simulated

KEY = "only-for-the-admin"
NOTE = "a Loadstone gate answers: without --admin-key its own limits are measured, not the server's"


@pytest.fixture(scope="module")
def engine() -> Iterator[Running]:
    with simulated() as engine:
        yield engine


def find(gate: Running, run: Path, levels: str, *more: object) -> tuple[int, str, dict[str, Any]]:
    """Exit status, what it says on standard error, its limits file."""
    small = ("--random-input-len", 32, "--random-output-len", 8, "--max-level-seconds", 1, "--min-gain", 0)
    done = loadstone("find", "--base-url", gate.url, "--levels", levels, *small, "--out", run, *more)
    limits = run / "limits.toml"
    return done.returncode, done.stderr, tomllib.loads(limits.read_text()) if limits.exists() else {}


def test_the_admins_key_lifts_quotas_and_limits(engine: Running, tmp_path: Path) -> None:
    options = ("--max-concurrency", 1, "--max-queue", 0, "--requests-per-minute", 1, "--admin-key", KEY)
    with gate_before(engine, options=options) as gate:
        status, said, limits = find(gate, tmp_path / "run", "2,4", "--admin-key", KEY)
        assert status == 0
        assert NOTE not in said
        assert limits["evidence"]["through_gate"] is False
        assert limits["evidence"]["measured_max_concurrency"] >= 3
        document = fetch(gate.url, "/stats", headers={"X-Loadstone-Admin": KEY}).document
        assert document["refused"] == document["failed"] == 0
        # Nothing was taken from this client's own quota, and its limits hold as before.
        assert [fetch(gate.url, CHAT, chat()).status for _ in range(2)] == [200, 429]


def test_without_it_the_search_stops_at_the_first_refusal_and_says_so(engine: Running, tmp_path: Path) -> None:
    with gate_before(engine, options=(*NO_QUOTAS, "--max-concurrency", 2, "--max-queue", 0)) as gate:
        status, said, limits = find(gate, tmp_path / "run", "2,4,8")
        assert status == 0
        assert NOTE in said
        assert "the gate refuses (queue_full): the search ends, its limit is not the server's" in said
        assert limits["evidence"]["through_gate"] is True
        assert limits["evidence"]["measured_max_concurrency"] <= 2
        assert gate.outcomes()["queue_full"] <= 2
        assert " 8 at once" not in said


def test_a_quota_ends_it_before_anything_can_be_judged(engine: Running, tmp_path: Path) -> None:
    with gate_before(engine) as gate:
        status, said, limits = find(gate, tmp_path / "run", "1,2,4")
        assert (status, limits) == (4, {})
        assert NOTE in said
        assert "the gate refuses (rate_limited)" in said
        assert gate.outcomes()["rate_limited"] == 1
