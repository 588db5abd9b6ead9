"""The truth of a profile against what can be worked out by hand."""

from dataclasses import replace

import pytest

from loadstone.sim.profiles import Profile, named
from loadstone.sim.truth import TrueLine, Truth, true_line

SHARP = Profile("sharp", base_s=0.020, max_num_seqs=32)
SOFT = Profile("soft", base_s=0.010, per_decode_seq_s=0.000_5, max_num_seqs=1024)
OUTPUT = 32


@pytest.mark.parametrize("places", [5, 32, 100])
def test_a_sharp_knee_puts_the_gain_line_at_1_18_times_its_place(places: int) -> None:
    truth = Truth(replace(SHARP, max_num_seqs=places), 10, OUTPUT)
    # a slot spends one step more than its request does, so the knee lies at C·(T + 1)/T
    assert truth.gain_line(0.2) == pytest.approx(1.1785 * places * (OUTPUT + 1) / OUTPUT, abs=1 + 0.02 * places)


@pytest.mark.parametrize("min_gain", [0.2, 0.5])
def test_a_soft_knee_puts_the_gain_line_where_the_formula_does(min_gain: float) -> None:
    a, b = (OUTPUT + 1) * SOFT.base_s, (OUTPUT - 1) * SOFT.per_decode_seq_s
    # G(N) = log2 X(√2N) − log2 X(N/√2) with X = N/(a + bN): solve 2(a + bN/√2)/(a + √2bN) = 1 + min_gain
    gain = 1 + min_gain
    expected = (2 - gain) * a / ((gain - 1) * 2**0.5 * b)
    assert Truth(SOFT, 10, OUTPUT).gain_line(min_gain) == pytest.approx(expected, rel=0.02)


def test_throughput_is_n_over_a_plus_bn() -> None:
    truth = Truth(SOFT, 10, OUTPUT)
    for n in (2, 20, 200):
        a, b = (OUTPUT + 1) * SOFT.base_s, (OUTPUT - 1) * SOFT.per_decode_seq_s
        assert truth.at(n).throughput_rps == pytest.approx(n / (a + b * n), rel=0.01)


def test_mean_ttft_beyond_a_cap_is_the_wait_by_littles_law() -> None:
    truth = Truth(SHARP, 10, OUTPUT)
    life_s = OUTPUT * SHARP.base_s
    for n in (40, 64):
        waited_s = n / (32 / life_s) - life_s + SHARP.base_s
        assert truth.at(n).mean_ttft_s == pytest.approx(waited_s, rel=0.02)


def test_a_server_that_refuses_loses_four_requests_for_each_slot_too_many() -> None:
    profile = replace(SOFT, per_decode_seq_s=0.0, refuse_beyond=100)
    truth = Truth(profile, 10, OUTPUT)
    assert truth.at(100).success_share == 1
    assert truth.at(110).success_share == pytest.approx(100 / (100 + 4 * 10), rel=0.03)
    assert truth.largest(lambda level: level.success_share >= 0.95) == 101


def test_a_server_that_hangs_beyond_a_limit_fails_by_slot_time() -> None:
    profile = replace(SOFT, hang_beyond=40)
    truth = Truth(profile, 10, OUTPUT, request_timeout_s=30)
    assert truth.largest(lambda level: level.success_share >= 0.95) == 42


def test_kv_use_grows_to_the_line_and_then_preempts() -> None:
    profile = replace(SHARP, max_num_seqs=256, num_kv_blocks=40 * 34)
    truth = Truth(profile, 512, OUTPUT)
    # of its 33 steps a request waits in one, holds 32 blocks in one, 33 in sixteen and 34 in the rest
    mean_blocks = (32 + 16 * 33 + 15 * 34) / 33
    assert truth.at(20).median_kv_use == pytest.approx(20 * mean_blocks / (40 * 34), rel=0.03)
    line = true_line(profile, 512, OUTPUT)
    assert line.kv == pytest.approx(0.95 * 40, abs=2)
    assert line.binding == "kv"
    assert truth.at(60).preemptions_per_request > 0.01


def test_pace_is_taken_at_its_last_and_stray_errors_count() -> None:
    cold = replace(SHARP, pace=((0.0, 8.0), (20.0, 1.0)))
    assert Truth(cold, 10, OUTPUT).at(8) == Truth(SHARP, 10, OUTPUT).at(8)
    assert Truth(replace(SHARP, error_rate=0.1), 10, OUTPUT).at(8).success_share == pytest.approx(0.9, abs=0.02)


def test_the_line_is_the_smallest_and_gain_binds_only_below_all_others() -> None:
    assert TrueLine(success=50, kv=None, ttft=40, gain=40).binding == "ttft"
    assert TrueLine(success=50, kv=None, ttft=40, gain=39).line == 39
    assert TrueLine(success=None, kv=None, ttft=None, gain=None).binding == "ladder"


@pytest.mark.parametrize(
    ("name", "line", "binding"),
    [
        ("narrow", 5, "gain"),
        ("sharp-knee", 38, "gain"),
        ("ttft-queue", 65, "ttft"),
        ("kv-bound", 49, "kv"),
        ("refusing", 101, "success"),
    ],
)
def test_the_named_profiles_have_their_lines(name: str, line: int, binding: str) -> None:
    truth = true_line(named(name), most=256)
    assert (truth.line, truth.binding) == (line, binding)
