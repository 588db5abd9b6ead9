"""What a gate tells of itself: figures that add up, in bounded memory, as JSON and for Prometheus."""

import json
import math
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from loadstone.core.outcomes import FAILED, REFUSED, Outcome
from loadstone.hold.dashboard import page
from loadstone.hold.latencies import WINDOW_S, Latencies, quantile
from loadstone.hold.resources import Gpu, Machine, Resources, Sampler
from loadstone.hold.status import Status
from loadstone.hold.tallies import Clients, Past, Tally
from made_stats import EVIDENCE, LIMITS, MadeGate, ended, now, upstream

A, B = "http://127.0.0.1:8001", "http://127.0.0.1:8002"
NOTHING = Resources()


def told(status: Status, now_s: float, **fields: object) -> dict:
    return status.stats(now(upstream(A), upstream(B), **fields), now_s, NOTHING)


def test_a_gate_that_nobody_has_asked() -> None:
    stats = told(Status(100.0), 100.0)
    assert stats["received"] == 0
    assert set(stats["outcomes"]) == {str(outcome) for outcome in Outcome}
    assert set(stats["outcomes"].values()) == {0}
    assert (stats["error_rate"], stats["refusal_rate"]) == (0, 0)
    assert stats["latency_s"] == {"n": 0, "mean": None, "p50": None, "p95": None, "p99": None}
    assert stats["last_minute"]["requests_per_s"] == 0
    assert stats["resources"] == {"cpu": None, "memory": None, "gpu": None}
    assert stats["clients"] == {"span_s": 0.0, "busiest": []}


@given(st.lists(st.tuples(st.sampled_from(Outcome), st.booleans()), max_size=60), st.integers(0, 5), st.integers(0, 5))
def test_outcomes_sum_to_what_was_received_and_no_longer_runs(
    ends: list[tuple[Outcome, bool]], in_flight: int, queued: int
) -> None:
    status = Status(0.0)
    for _ in range(len(ends) + in_flight + queued):
        status.received()
    for second, (outcome, admitted) in enumerate(ends):
        status.ended(ended(outcome, upstream=A if admitted else ""), float(second))
    stats = told(status, 60.0, in_flight=in_flight, queued=queued)
    outcomes = stats["outcomes"]
    assert sum(outcomes.values()) == stats["received"] - stats["in_flight"] - stats["queued"]
    failed = outcomes["upstream_error"] + outcomes["request_timeout"]
    assert stats["admitted"] == sum(admitted for _, admitted in ends)
    assert stats["failed"] == failed
    assert stats["error_rate"] == failed / max(stats["admitted"], failed, 1)
    assert stats["refused"] == sum(outcomes[outcome] for outcome in REFUSED)
    assert stats["refusal_rate"] == stats["refused"] / max(1, len(ends))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([Outcome.OK, Outcome.OK, Outcome.CLIENT_GONE, Outcome.QUEUE_FULL, Outcome.UPSTREAM_ERROR]),
            st.sampled_from(["a", "a", "b", ""]),
            st.sampled_from([A, A, B, ""]),
            st.sampled_from([None, 0.5, 2.0]),
            st.sampled_from([0.0, 0.0, 0.0, 0.4, 400.0]),
        ),
        max_size=200,
    )
)
def test_what_is_counted_together_is_what_is_counted_one_by_one(
    ends: list[tuple[Outcome, str, str, float | None, float]],
) -> None:
    together, apart, now_s = Status(0.0), Status(0.0), 0.0
    for tokens, (outcome, client, server, ttft_s, pause_s) in enumerate(ends):
        now_s += pause_s
        figures = {"ttft_s": ttft_s, "latency_s": now_s, "wait_s": pause_s, "output_tokens": tokens}
        one = ended(outcome, client=client, upstream=server, **figures)
        for status in (together, apart):
            status.received()
            status.ended(one, now_s)
        told(apart, now_s)
    assert told(together, now_s) == told(apart, now_s)
    assert together.metrics(now(upstream(A), upstream(B)), now_s) == apart.metrics(now(upstream(A), upstream(B)), now_s)
    assert repr(together) == repr(apart)


def test_refusals_are_not_failures() -> None:
    assert not REFUSED & FAILED
    status = Status(0.0)
    for outcome in (Outcome.OK, Outcome.UPSTREAM_ERROR, Outcome.REQUEST_TIMEOUT, Outcome.OK):
        status.ended(ended(outcome, upstream=A), 1.0)
    for outcome in (Outcome.QUEUE_FULL, Outcome.RATE_LIMITED, Outcome.BAD_REQUEST, Outcome.UNAUTHORIZED):
        status.ended(ended(outcome), 1.0)
    stats = told(status, 1.0)
    assert stats["error_rate"] == 2 / 4
    assert stats["refusal_rate"] == 2 / 8


def test_latencies_are_those_of_the_last_minutes() -> None:
    status = Status(0.0)
    status.ended(ended(upstream=A, latency_s=99.0, ttft_s=9.0, wait_s=8.0), 1.0)
    for i in range(1, 101):
        status.ended(ended(upstream=A, latency_s=i / 10, ttft_s=i / 100), WINDOW_S + i / 100)
    status.ended(ended(Outcome.REQUEST_TIMEOUT, upstream=A, latency_s=120.0), WINDOW_S + 1.5)
    stats = told(status, WINDOW_S + 2.0)
    assert stats["latency_s"] == pytest.approx({"n": 100, "mean": 5.05, "p50": 5.05, "p95": 9.505, "p99": 9.901})
    assert stats["ttft_s"]["p50"] == pytest.approx(0.505)
    assert stats["queue_wait_s"] == {"n": 101, "mean": 0.0, "p50": 0.0, "p95": 0.0, "p99": 0.0}


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_quantile_lies_between_its_neighbours(values: list[float], share: float) -> None:
    ordered = sorted(values)
    position = (len(ordered) - 1) * share
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    assert below <= quantile(ordered, share) <= above or quantile(ordered, share) == pytest.approx(below)


def test_recent_latencies_stay_few() -> None:
    latencies = Latencies((1.0, 2.0))
    for i in range(10_000):
        latencies.add(0.001 * i, float(i % 3) + 0.5)
    assert latencies.summary(10.0)["n"] == 2048
    assert latencies.buckets() == [("1.0", 3334.0), ("2.0", 6667.0), ("+Inf", 10_000.0)]
    assert repr(latencies) == "<Latencies 10000 in all, 2048 kept>"


def test_rates_over_the_last_minute_and_while_the_gate_is_young() -> None:
    status = Status(1000.0)
    for i in range(20):
        status.ended(ended(upstream=A, output_tokens=50), 1000.0 + i / 2)
    young = told(status, 1010.0)["last_minute"]
    assert (young["span_s"], young["requests_per_s"], young["output_tokens_per_s"]) == (10.0, 2.0, 100.0)
    for second in range(10, 100):
        status.ended(ended(Outcome.QUEUE_FULL), 1000.0 + second)
    later = told(status, 1100.0)["last_minute"]
    assert later["span_s"] == 60.0
    assert later["ok_per_s"] == 0
    assert later["refused_per_s"] == pytest.approx(1.0, rel=0.02)
    assert told(status, 9999.0)["last_minute"]["requests_per_s"] == 0


def test_shares_of_the_last_five_minutes() -> None:
    status = Status(0.0)
    status.ended(ended(Outcome.UPSTREAM_ERROR, upstream=A), 1.0)
    status.ended(ended(upstream=A), WINDOW_S)
    assert told(status, WINDOW_S)["recent"]["error_rate"] == 0.5
    for i in range(1, 99):
        status.ended(ended(upstream=A), WINDOW_S + i)
    stats = told(status, WINDOW_S + 99)
    assert stats["recent"] == {"window_s": 300.0, "requests": 99, "error_rate": 0.0, "refusal_rate": 0.0}
    assert stats["error_rate"] == 0.01


@given(st.lists(st.floats(0, 30), max_size=80))
def test_growth_is_what_a_list_of_all_would_say(gaps_s: list[float]) -> None:
    past, tally, now_s, ends = Past(100), Tally(), 0.0, []
    for gap_s in gaps_s:
        now_s += gap_s
        if now_s >= past.next_mark_s:
            past.mark(now_s, tally)
        tally.add(Outcome.OK, True, 1)
        ends.append(now_s)
    for span_s in (10, 100):
        expected = sum(end_s >= int(now_s) - span_s for end_s in ends)
        assert past.growth(tally, span_s, now_s).requests == expected


def test_counts_by_upstream() -> None:
    status = Status(0.0)
    status.ended(ended(upstream=A, output_tokens=7), 1.0)
    status.ended(ended(Outcome.UPSTREAM_ERROR, upstream=B), 1.0)
    status.ended(ended(Outcome.QUEUE_FULL), 1.0)
    down = upstream(B, up=False, state="down", reason="connection refused", in_flight=0)
    first, second = status.stats(now(upstream(A, in_flight=2), down), 2.0, NOTHING)["upstreams"]
    counts = {"requests": 1, "ok": 1, "refused": 0, "failed": 0, "output_tokens": 7}
    here = {"name": A, "up": True, "state": "up", "in_flight": 2, "limit": 3, "configured_limit": 3, "weight": 1.0}
    assert first == here | {"reason": "", "kv_use": None} | counts
    assert (second["failed"], second["reason"]) == (1, "connection refused")


def test_a_crowd_of_clients_hides_no_busy_one_and_takes_no_memory() -> None:
    clients = Clients(300.0, 0.0)
    for i in range(100_000):
        clients.at(f"crowd-{i}", 10.0).add(Outcome.OK, True, 1)
        if i % 50 == 0:
            clients.at("busy", 10.0).add(Outcome.OK, True, 1)
    (name, tally), *others = clients.busiest(20, 11.0)
    assert (name, tally.requests, len(others)) == ("busy", 2000, 19)
    assert repr(clients).endswith("now>")
    assert len(clients.busiest(100_000, 11.0)) <= 1024


def test_who_asked_may_be_unknown() -> None:
    status = Status(0.0)
    status.ended(ended(Outcome.BAD_REQUEST, client=""), 1.0)
    stats = told(status, 1.0)
    assert stats["outcomes"]["bad_request"] == 1
    assert stats["clients"]["busiest"] == []


def test_clients_of_long_ago_are_forgotten() -> None:
    clients = Clients(300.0, 0.0)
    for _ in range(5):
        clients.at("old", 10.0).add(Outcome.OK, True, 1)
    clients.at("new", 310.0).add(Outcome.OK, True, 1)
    assert [name for name, _ in clients.busiest(9, 320.0)] == ["old", "new"]
    assert clients.since_s == 0.0
    assert [name for name, _ in clients.busiest(9, 620.0)] == ["new"]
    assert clients.since_s == 310.0
    assert clients.busiest(9, 9999.0) == []
    assert clients.since_s == 9999.0


@pytest.mark.parametrize("scene", ["empty", "busy", "troubled"])
def test_the_document_is_plain_json(scene: str) -> None:
    gate = MadeGate(scene)
    stats = [gate.stats() for _ in range(30)][-1]
    again = json.loads(msgspec.json.encode(stats))
    assert again == stats
    assert sum(again["outcomes"].values()) == again["received"] - again["in_flight"] - again["queued"]


@pytest.mark.parametrize(
    ("up", "draining", "status", "word"),
    [(True, False, 200, "ok"), (False, False, 503, "no upstream is up"), (True, True, 503, "draining")],
)
def test_health(up: bool, draining: bool, status: int, word: str) -> None:
    one = upstream(A, up=up, state="up" if up else "down")
    code, document = Status(0.0).health(now(one, upstream(B, up=False), draining=draining, warnings=("old",)))
    assert (code, document["status"]) == (status, word)
    assert document["limits"] == LIMITS
    assert document["warnings"] == ["old"]
    assert [one["name"] for one in document["upstreams"]] == [A, B]


def scraped(status: Status, **fields: object) -> dict[str, float]:
    """Every sample by its name and label values."""
    text = status.metrics(now(upstream(A, in_flight=2), upstream(B, limit=None, up=False), **fields), 60.0).decode()
    return {
        " ".join((sample.name, *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics() -> None:
    status = Status(0.0)
    for _ in range(5):
        status.received()
    status.ended(ended(upstream=A, latency_s=2.0, ttft_s=0.3, wait_s=0.02, output_tokens=80), 1.0)
    status.ended(ended(Outcome.REQUEST_TIMEOUT, upstream=B, latency_s=120.0), 1.0)
    status.ended(ended(Outcome.QUEUE_FULL), 1.0)
    samples = scraped(status, queued=0, evidence=EVIDENCE)
    prefix = "loadstone_gate_"
    expected = {
        "received_total": 5,
        "requests_total ok": 1,
        "requests_total queue_full": 1,
        "requests_total client_gone": 0,
        "refused_total queue_full": 1,
        "output_tokens_total": 80,
        "in_flight": 2,
        "queued": 0,
        "oldest_in_flight_seconds": 0,
        "uptime_seconds": 60,
        f"upstream_up {A}": 1,
        f"upstream_up {B}": 0,
        f"upstream_in_flight {A}": 2,
        f"upstream_limit {A}": 3,
        f"upstream_requests_total {B}": 1,
        f"upstream_errors_total {B}": 1,
        "limits max_concurrency": 3,
        "limits per_client.requests_per_hour": 100,
        "ttft_seconds_bucket 0.2": 0,
        "ttft_seconds_bucket 0.4": 1,
        "ttft_seconds_sum": 0.3,
        "request_seconds_count": 1,
        "request_seconds_bucket 2.5": 1,
        "queue_wait_seconds_count": 2,
        "queue_wait_seconds_bucket +Inf": 2,
    }
    assert {name: samples[prefix + name] for name in expected} == expected
    for absent in (f"upstream_limit {B}", "limits max_tokens_in_flight", "refused_total ok"):
        assert prefix + absent not in samples


def test_this_machine() -> None:
    machine = Machine()
    machine.read()
    reading = machine.read()
    assert reading.cpu is not None
    assert 0 <= reading.cpu <= 1
    assert reading.memory is not None
    assert 0 < reading.memory < 1


def test_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def utilisation(device: int) -> object:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda i: i)
    memory = lambda device: type("Memory", (), {"used": 30 * (device + 1), "total": 80})  # noqa: E731
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", utilisation)
    machine = Machine()
    assert repr(machine) == "<Machine, 2 accelerators>"
    assert machine.read().gpu == Gpu(0.75, None)


def test_the_sampler_reads_in_the_background() -> None:
    sampler = Sampler(period_s=0.001)
    assert sampler.latest == Resources()
    assert repr(sampler).startswith("<Sampler stopped")
    sampler.start()
    try:
        while sampler.latest == Resources() and "running" in repr(sampler):
            time.sleep(0)
    finally:
        sampler.stop()
    assert sampler.latest.memory is not None
    assert repr(sampler).startswith("<Sampler stopped")
    Sampler().stop()


def test_the_page_is_whole_and_asks_for_nothing_from_elsewhere() -> None:
    for path in ("/ui", "/ui/", "/ui/style.css", "/ui/app.js", "/ui/view.js", "/ui/chart.js"):
        found = page(path)
        assert found is not None
        kind, body = found
        assert kind.endswith(b"charset=utf-8")
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"https://" not in body
        assert b"innerHTML" not in body
    document = page("/ui")
    assert document is not None
    assert b"style=" not in document[1], "the page's own policy forbids it"
    for unknown in ("/ui/../status.py", "/ui/none.js", "/uix", ""):
        assert page(unknown) is None
