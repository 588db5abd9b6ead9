"""Which limits are in force."""

from dataclasses import replace
from datetime import UTC, datetime

import msgspec
import pytest

from loadstone.core.errors import UsageError
from loadstone.core.limits import Evidence, Limits, LimitsFile, PerClient, Upstream
from loadstone.core.settings import LimitSettings
from loadstone.hold.configuration import CAUTIOUS, enforce, model_warning

NOW = datetime(2026, 11, 20, tzinfo=UTC)
URL = "http://127.0.0.1:8001"
EVIDENCE = Evidence(
    measured_max_concurrency=200,
    headroom=0.75,
    binding="ttft",
    claim="200 held",
    measured_at="2026-11-01T00:00:00Z",
    expires_at="2026-12-01T00:00:00Z",
    model="Qwen/Qwen3-8B",
    endpoint="chat",
    base_url=URL,
)
MEASURED = LimitsFile(Limits(max_concurrency=150, max_queue=20), [], EVIDENCE)


def test_without_a_file_the_cautious_defaults_hold() -> None:
    enforced = enforce(None, "", LimitSettings(), [URL], NOW)
    assert enforced.limits == CAUTIOUS
    assert (enforced.upstreams[0].url, enforced.upstreams[0].max_concurrency) == (URL, 3)
    assert (enforced.quotas.requests_per_minute, enforced.quotas.requests_per_hour) == (10, 100)
    assert enforced.warnings == ()


def test_a_file_replaces_the_defaults_wholly() -> None:
    enforced = enforce(MEASURED, "limits.toml", LimitSettings(), [URL], NOW)
    assert enforced.limits.max_output_tokens is None
    assert enforced.quotas.requests_per_minute is None
    assert enforced.upstreams[0].max_concurrency == 150


@pytest.mark.parametrize(("total", "shares"), [(3, [2, 1]), (4, [2, 2]), (2, [1, 1])])
def test_replicas_of_one_service_share_its_limit(total: int, shares: list[int]) -> None:
    flags, urls = LimitSettings(max_concurrency=total), [URL, "http://127.0.0.1:8002"]
    plans = enforce(None, "", flags, urls, NOW, together=True).upstreams
    assert [plan.max_concurrency for plan in plans] == shares
    with pytest.raises(UsageError, match="1 in flight for 2 replicas: lower --workers to 1, or raise the limit"):
        enforce(None, "", LimitSettings(max_concurrency=1), urls, NOW, together=True)
    unbound = enforce(None, "", LimitSettings(max_concurrency=0), urls, NOW, together=True).upstreams
    assert [plan.max_concurrency for plan in unbound] == [None, None]


def test_a_limit_of_the_whole_service_is_held_against_the_line_before_it_is_shared() -> None:
    with pytest.raises(UsageError, match="above the measured line of 200"):
        enforce(MEASURED, "f", LimitSettings(max_concurrency=201), [URL, "http://b:1"], NOW, together=True)


def test_a_long_queue_is_no_matter_where_nothing_is_generated() -> None:
    flags = LimitSettings(max_queue=1024)
    assert "before a chat model is long" in enforce(None, "", flags, [URL], NOW).warnings[0]
    assert enforce(None, "", flags, [URL], NOW, chat=False).warnings == ()


@pytest.mark.parametrize(
    ("file", "flags", "standing"),
    [
        (MEASURED, LimitSettings(), 10),
        (MEASURED, LimitSettings(max_queue=20), None),
        (LimitsFile(Limits(max_concurrency=150, max_queue=1), [], EVIDENCE), LimitSettings(), 1),
        (LimitsFile(Limits(max_concurrency=150, max_queue=0), [], EVIDENCE), LimitSettings(), None),
        (LimitsFile(Limits(max_concurrency=150, max_queue=20)), LimitSettings(), None),
        (None, LimitSettings(), None),
    ],
)
def test_only_a_queue_that_was_measured_is_shortened_while_it_stands(
    file: LimitsFile | None, flags: LimitSettings, standing: int | None
) -> None:
    assert enforce(file, "limits.toml", flags, [URL], NOW).standing_queue == standing


def test_a_flag_beats_the_file_and_zero_is_no_bound() -> None:
    flags = LimitSettings(max_concurrency=10, max_queue=0, requests_per_minute=5, request_timeout_s=0)
    enforced = enforce(MEASURED, "limits.toml", flags, [URL], NOW)
    assert enforced.upstreams[0].max_concurrency == 10
    assert enforced.limits.max_queue == 0
    assert enforced.limits.request_timeout_s is None
    assert enforced.limits.per_client == PerClient(requests_per_minute=5)
    defaults = enforce(None, "", LimitSettings(requests_per_minute=0, requests_per_hour=0), [URL], NOW)
    assert defaults.limits.per_client == PerClient()


def test_upstreams_of_the_file_keep_their_own_limit_and_flags_add_to_them() -> None:
    file = LimitsFile(
        Limits(max_concurrency=8), [Upstream("http://a:1/", max_concurrency=3, weight=2.0), Upstream("http://b:1")]
    )
    plans = enforce(file, "f", LimitSettings(), ["http://b:1", "http://c:1"], NOW).upstreams
    assert [(p.url, p.max_concurrency, p.weight) for p in plans] == [
        ("http://a:1", 3, 2.0),
        ("http://b:1", 8, 1.0),
        ("http://c:1", 8, 1.0),
    ]
    assert {p.max_concurrency for p in enforce(file, "f", LimitSettings(max_concurrency=5), [], NOW).upstreams} == {5}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (LimitSettings(max_concurrency=201), "above the measured line of 200"),
        (LimitSettings(max_concurrency=0), "above the measured line of 200"),
        (LimitSettings(max_queue=-1), "--max-queue -1 must be at least 0"),
        (LimitSettings(request_timeout_s=-1.0), "--request-timeout-s -1 must be at least 0"),
    ],
)
def test_limits_that_make_no_sense_are_refused(flags: LimitSettings, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        enforce(MEASURED, "limits.toml", flags, [URL], NOW)


def test_force_insists() -> None:
    flags = LimitSettings(max_concurrency=500, force=True)
    assert enforce(MEASURED, "limits.toml", flags, [URL], NOW).upstreams[0].max_concurrency == 500


@pytest.mark.parametrize("url", ["", "127.0.0.1:8001", "ftp://x", "http://", "http://u:p@h"])
def test_a_bad_upstream_is_named(url: str) -> None:
    with pytest.raises(UsageError, match="--upstream"):
        enforce(None, "", LimitSettings(), [url], NOW)


def test_no_upstream_at_all_says_what_to_give() -> None:
    with pytest.raises(UsageError, match="--upstream http://HOST:PORT"):
        enforce(None, "", LimitSettings(), [], NOW)


def warnings(evidence: Evidence | None = EVIDENCE, **limits: int) -> str:
    file = LimitsFile(msgspec.structs.replace(MEASURED.limits, **limits), [], evidence)
    return "\n".join(enforce(file, "limits.toml", LimitSettings(), [URL], NOW).warnings)


def test_doubtful_limits_are_warned_of() -> None:
    assert warnings() == ""
    assert "expired on 2026-11-19" in warnings(msgspec.structs.replace(EVIDENCE, expires_at="2026-11-19T00:00:00Z"))
    assert "measured through a gate" in warnings(msgspec.structs.replace(EVIDENCE, through_gate=True))
    assert "a queue of 50" in warnings(max_queue=50)
    assert "a queue of 50" not in warnings(msgspec.structs.replace(EVIDENCE, endpoint="embeddings"), max_queue=50)


def test_another_model_is_warned_of() -> None:
    assert model_warning(EVIDENCE, URL, ["Qwen/Qwen3-8B", "lora"]) == ""
    assert model_warning(EVIDENCE, URL, []) == ""
    assert model_warning(None, URL, ["other"]) == ""
    assert "measured for Qwen/Qwen3-8B, but http://127.0.0.1:8001 serves other" in model_warning(
        EVIDENCE, URL, ["other"]
    )


def test_the_documents_that_pages_show() -> None:
    enforced = enforce(MEASURED, "limits.toml", LimitSettings(), [URL], NOW)
    assert enforced.limits_document()["per_client"] == {
        "requests_per_minute": None,
        "requests_per_hour": None,
        "tokens_per_minute": None,
    }
    evidence = enforced.evidence_document()
    assert evidence is not None
    assert "level" not in evidence
    assert replace(enforced, evidence=None).evidence_document() is None
