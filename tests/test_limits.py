"""``limits.toml`` in and out, and the limits that follow from a measurement."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.errors import UsageError
from loadstone.core.limits import (
    Evidence,
    EvidenceLevel,
    Limits,
    LimitsFile,
    PerClient,
    Upstream,
    derive_limits,
    dumps,
    loads,
    recommend,
)

EXAMPLE = """\
schema = 1
[limits]
max_concurrency = 150
max_queue = 20
queue_timeout_s = 30.0
request_timeout_s = 120.0
max_output_tokens = 512
default_output_tokens = 100
max_tokens_in_flight = 60000
[limits.per_client]
requests_per_minute = 10
requests_per_hour = 100
tokens_per_minute = 20000
[[upstream]]
url = "http://127.0.0.1:8001"
max_concurrency = 3
weight = 1.0
[evidence]
measured_max_concurrency = 200
headroom = 0.75
binding = "ttft"
claim = "200 held: n = 2000, success 100 %, mean TTFT 640 ± 9 ms; 210 failed: 1104 ± 21 ms"
throughput_rps = 12.3
measured_at = "2026-11-20T10:00:00Z"
expires_at = "2026-12-20T10:00:00Z"
model = "Qwen/Qwen3-8B"
endpoint = "chat"
base_url = "http://127.0.0.1:8001"
through_gate = false
run = "runs/20261120-100000-qwen3-8b"
[[evidence.level]]
concurrency = 150
throughput_rps = 12.3
ttft_p50_ms = 210.0
ttft_p99_ms = 640.0
itl_p50_ms = 31.0
e2el_mean_ms = 4200.0
"""


def test_the_documented_example_comes_back_letter_by_letter() -> None:
    file = loads(EXAMPLE, "limits.toml")
    assert file.limits.max_concurrency == 150
    assert file.limits.per_client == PerClient(10, 100, 20000)
    assert file.upstreams == [Upstream("http://127.0.0.1:8001", 3)]
    assert file.evidence is not None
    assert file.evidence.levels[0].itl_p50_ms == 31.0
    assert dumps(file) == EXAMPLE


def test_an_absent_key_is_no_bound() -> None:
    file = loads("schema = 1\n", "limits.toml")
    assert file == LimitsFile()
    assert file.limits.max_concurrency is None
    assert dumps(file) == "schema = 1\n[limits]\n"


def test_whole_numbers_serve_as_seconds() -> None:
    assert loads("schema = 1\n[limits]\nqueue_timeout_s = 30\n", "x").limits.queue_timeout_s == 30.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "my.toml has no schema; this version of loadstone reads schema = 1"),
        ("schema = 2", "my.toml has schema = 2; this version of loadstone reads schema = 1"),
        ("schema = true", "my.toml has schema = True; this version of loadstone reads schema = 1"),
        ("schema = 1\nfoo = 1", "my.toml: unknown key `foo`"),
        ("schema = 1\n[limits]\nmax_q = 3", "my.toml: limits: unknown key `max_q`"),
        ("schema = 1\n[limits.per_client]\nper_day = 3", "my.toml: limits.per_client: unknown key `per_day`"),
        ("schema = 1\n[[upstream]]\nweight = 1.0", "my.toml: upstream[0]: missing key `url`"),
        ("schema = 1\n[limits]\nmax_queue = -1", "my.toml: limits.max_queue: Expected `int` >= 0"),
        ("schema = 1\n[limits]\nmax_concurrency = 0", "my.toml: limits.max_concurrency: Expected `int` >= 1"),
        ("schema = 1\n[limits]\nqueue_timeout_s = nan", "my.toml: limits.queue_timeout_s: Expected `float` > 0.0"),
        ("schema = 1\n[limits]\nmax_queue = 'a'", "my.toml: limits.max_queue: Expected `int | null`, got `str`"),
    ],
)
def test_an_error_names_file_and_key(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        loads(text, "my.toml")
    assert str(caught.value) == said


def test_text_that_is_not_toml() -> None:
    with pytest.raises(UsageError, match=r"^my\.toml is not TOML: .*line 2"):
        loads("schema = 1\n[limits\n", "my.toml")


@pytest.mark.parametrize("time", ["yesterday", "2026-11-20", "2026-11-20 10:00:00"])
def test_a_time_that_is_not_rfc_3339(time: str) -> None:
    with pytest.raises(UsageError, match=r"evidence\.measured_at"):
        loads(EXAMPLE.replace("2026-11-20T10:00:00Z", time), "limits.toml")


positive = st.integers(1, 2**53)
seconds = st.floats(1e-6, 1e9)
figures = st.floats(0, 1e12)
times = st.datetimes(timezones=st.none()).map(lambda at: at.strftime("%Y-%m-%dT%H:%M:%SZ").zfill(20))
levels = st.builds(EvidenceLevel, positive, figures, *[st.none() | figures] * 4)
files = st.builds(
    LimitsFile,
    st.builds(
        Limits,
        st.none() | positive,
        st.none() | st.integers(0, 10**6),
        st.none() | seconds,
        st.none() | seconds,
        st.none() | positive,
        st.none() | positive,
        st.none() | positive,
        st.none() | st.builds(PerClient, st.none() | positive, st.none() | positive, st.none() | positive),
    ),
    st.lists(st.builds(Upstream, st.text(), st.none() | positive, seconds), max_size=3),
    st.none()
    | st.builds(
        Evidence,
        measured_max_concurrency=positive,
        headroom=st.floats(0.01, 1.0),
        binding=st.text(),
        claim=st.text(),
        throughput_rps=st.none() | figures,
        measured_at=times,
        expires_at=times,
        model=st.text(),
        endpoint=st.sampled_from(["chat", "embeddings"]),
        base_url=st.text(),
        through_gate=st.booleans(),
        run=st.none() | st.text(),
        levels=st.lists(levels, max_size=3),
    ),
)


@given(files)
def test_what_is_written_is_read_back(file: LimitsFile) -> None:
    text = dumps(file)
    assert tomllib.loads(text)["schema"] == 1
    assert loads(text, "limits.toml") == file


@pytest.mark.parametrize(
    ("measured", "limit"),
    [(1, 1), (2, 1), (3, 2), (4, 3), (5, 4), (6, 4), (7, 5), (9, 7), (10, 7), (200, 150), (227, 170), (1000, 750)],
)
def test_recommend(measured: int, limit: int) -> None:
    assert recommend(measured) == limit


@pytest.mark.parametrize(("headroom", "limit"), [(1.0, 100), (0.5, 50), (0.98, 98), (0.05, 5)])
def test_recommend_with_another_headroom(headroom: float, limit: int) -> None:
    assert recommend(100, headroom) == limit


@given(st.integers(1, 10_000), st.floats(0.01, 1.0))
def test_a_recommendation_never_exceeds_the_band(measured: int, headroom: float) -> None:
    limit = recommend(measured, headroom)
    assert 1 <= limit <= max(1, min(headroom + 0.05, 1.0) * measured + 1e-6)


def test_queue_from_the_curve() -> None:
    limits = derive_limits(150, throughput_rps=12.0, wait_s=0.5, p99_latency_s=8.0, chat=True)
    assert limits == Limits(max_concurrency=150, max_queue=6, queue_timeout_s=0.976)


def test_a_chat_queue_is_never_longer_than_twenty() -> None:
    chat = derive_limits(150, throughput_rps=100.0, wait_s=2.0, p99_latency_s=8.0, chat=True)
    embeddings = derive_limits(150, throughput_rps=100.0, wait_s=2.0, p99_latency_s=8.0, chat=False)
    assert (chat.max_queue, embeddings.max_queue) == (20, 200)


def test_the_queue_leaves_time_for_the_answer() -> None:
    limits = derive_limits(9, throughput_rps=2.0, wait_s=30.0, p99_latency_s=110.0, chat=True, request_timeout_s=120.0)
    assert limits.queue_timeout_s == 10.0
    assert limits.request_timeout_s == 120.0


@pytest.mark.parametrize(("wait_s", "p99_s", "request_s"), [(-0.3, 1.0, None), (0.0, 1.0, None), (2.0, 130.0, 120.0)])
def test_no_room_to_wait(wait_s: float, p99_s: float, request_s: float | None) -> None:
    limits = derive_limits(9, 1.0, wait_s, p99_s, chat=True, request_timeout_s=request_s)
    assert limits.queue_timeout_s == 0.1
    assert limits.max_queue == max(0, int(wait_s))


def test_without_throughput_no_queue_is_derived() -> None:
    assert derive_limits(1, 0.0, 0.5, 1.0, chat=True) == Limits(max_concurrency=1)
