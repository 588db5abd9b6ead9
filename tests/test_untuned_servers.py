"""The search against servers that nobody tuned it for, in virtual time, where the true line can be computed."""

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from loadstone.cli.progress import Silent
from loadstone.cli.virtual import BASE_URL, virtual_server
from loadstone.core.errors import EXIT_FAILED, EXIT_OK
from loadstone.core.settings import DataSettings, RuleSettings, ServerSettings
from loadstone.core.verdict import RunVerdict, Verdict
from loadstone.measure.find import FindSettings, exit_status, find
from loadstone.measure.runs import create_run
from loadstone.sim.clock import VirtualClock, run_virtual
from loadstone.sim.profiles import Profile
from loadstone.sim.truth import TrueLine, true_line

PROMPT_TOKENS, OUTPUT_TOKENS = 256, 48
TIMEOUT_S = 30.0
RULES = RuleSettings()
SHARP = Profile("sharp", base_s=0.025, max_num_seqs=12, stream_interval=16)
SOFT = Profile("soft", base_s=0.020, per_decode_seq_s=0.001_3, max_num_seqs=512, stream_interval=16)


def searched(profile: Profile, folder: Path, seed: int = 0, rules: RuleSettings = RULES) -> RunVerdict:
    settings = FindSettings(
        server=ServerSettings(base_url=BASE_URL, request_timeout_s=TIMEOUT_S),
        data=DataSettings(random_input_len=PROMPT_TOKENS, random_output_len=OUTPUT_TOKENS, seed=seed),
        rules=rules,
    )
    run = create_run(str(folder / f"{profile.name}-{seed}"), profile.name, datetime.now(UTC))

    async def main(clock: VirtualClock) -> RunVerdict:
        server = virtual_server(profile, clock, seed, TIMEOUT_S)
        return await find(server, settings, lambda model: run, Silent(), command="find")

    return run_virtual(main)


def truth_of(profile: Profile, most: int = 256) -> TrueLine:
    return true_line(profile, PROMPT_TOKENS, OUTPUT_TOKENS, request_timeout_s=TIMEOUT_S, most=most)


def near(line: int) -> tuple[int, int]:
    """Within the resolution asked for, and one slot where that is less than a slot."""
    return min(line - 1, math.floor(line * 0.95)), max(line + 1, math.ceil(line * 1.05))


HARD = [
    Profile("refuses-beyond", base_s=0.020, per_decode_seq_s=0.000_1, max_num_seqs=256, refuse_beyond=63),
    Profile("short-waiting-line", base_s=0.020, per_decode_seq_s=0.000_05, max_num_seqs=40, max_waiting=3),
    Profile("outliving", base_s=0.015, max_num_seqs=24, max_waiting=3, work_outlives_client=True),
    Profile("small-cache", base_s=0.020, per_decode_seq_s=0.000_2, num_kv_blocks=250),
    Profile("one-at-a-time", base_s=0.010, max_num_seqs=1, max_waiting=0),
    Profile(
        "hangs-beyond", base_s=0.020, per_decode_seq_s=0.000_1, max_num_seqs=256, hang_beyond=30, stream_interval=16
    ),
]


@pytest.mark.parametrize("profile", HARD, ids=lambda profile: profile.name)
def test_a_hard_limit_is_found_and_named(profile: Profile, tmp_path: Path) -> None:
    truth, verdict = truth_of(profile), searched(profile, tmp_path)
    assert truth.line is not None
    assert verdict.measured_max_concurrency is not None
    low, high = near(truth.line)
    assert low <= verdict.measured_max_concurrency <= high
    assert verdict.binding.split(":")[0].replace("resource", "kv") == truth.binding
    assert exit_status(verdict) == EXIT_OK


def test_a_limit_of_the_time_to_first_token(tmp_path: Path) -> None:
    profile = replace(SHARP, name="queueing")
    rules = RuleSettings(max_ttft_ms=400.0, min_gain=0.0)
    line = true_line(profile, PROMPT_TOKENS, OUTPUT_TOKENS, max_ttft_ms=400.0, min_gain=0.0, most=256).ttft
    verdict = searched(profile, tmp_path, rules=rules)
    assert line is not None
    assert verdict.measured_max_concurrency is not None
    low, high = near(line)
    assert low <= verdict.measured_max_concurrency <= high
    assert verdict.binding == "ttft"


KNEES = [
    SHARP,
    SOFT,
    replace(SOFT, name="dip-at-two", pair_factor=2.3),
    replace(SHARP, name="stray-errors", error_rate=0.02),
    replace(SHARP, name="rare-hangs", hang_rate=0.001),
    replace(SHARP, name="cold-start", pace=((0.0, 6.0), (15.0, 1.0))),
]


@pytest.mark.parametrize("profile", KNEES, ids=lambda profile: profile.name)
def test_where_a_doubling_stops_paying(profile: Profile, tmp_path: Path) -> None:
    # Neither stray errors nor rare hangs move the knee.
    truth = truth_of(replace(profile, error_rate=0.0, hang_rate=0.0))
    verdict = searched(profile, tmp_path)
    assert truth.gain is not None
    assert (verdict.binding, exit_status(verdict)) == ("gain", EXIT_OK)
    assert verdict.gain_line is not None
    low, high = near(truth.gain)
    assert verdict.gain_line.low <= high
    assert verdict.gain_line.high >= low


def test_stray_errors_fail_no_level(tmp_path: Path) -> None:
    verdict = searched(replace(SHARP, name="stray-errors", error_rate=0.02), tmp_path, seed=1)
    below = [row for row in verdict.levels if row.concurrency <= SHARP.max_num_seqs]
    assert {row.verdict for row in below} == {Verdict.PASS}
    assert any(row.failures for row in below)


@pytest.mark.parametrize("seed", range(4))
def test_a_broken_server_fails_at_the_first_level(seed: int, tmp_path: Path) -> None:
    verdict = searched(replace(SHARP, name="broken", error_rate=0.30), tmp_path, seed)
    assert (verdict.measured_max_concurrency, verdict.binding) == (None, "success")
    assert exit_status(verdict) == EXIT_FAILED


def test_a_cold_start_is_not_the_first_levels_failure(tmp_path: Path) -> None:
    verdict = searched(replace(SHARP, name="cold-start", pace=((0.0, 30.0), (8.0, 1.0))), tmp_path)
    first = [row for row in verdict.levels if row.concurrency == 1]
    assert first[-1].verdict is Verdict.PASS
    assert verdict.measured_max_concurrency is not None


def test_a_server_that_fails_one_in_ten_fails_at_the_first_level(tmp_path: Path) -> None:
    broken = replace(SHARP, name="broken", error_rate=0.10)
    verdicts = [searched(broken, tmp_path, seed) for seed in range(6)]
    failed = [verdict for verdict in verdicts if verdict.measured_max_concurrency is None]
    # Sixty requests of such a server look good enough once in a few dozen times.
    assert len(failed) >= 5
    assert {verdict.binding for verdict in failed} == {"success"}
    assert {exit_status(verdict) for verdict in failed} == {EXIT_FAILED}
