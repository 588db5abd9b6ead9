"""The operators' guide sets limits by environment variables; they work as they stand there."""

import pytest

from processes import gate_before

NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize("name", ["MAX_CONCURRENT", "LOADSTONE_MAX_CONCURRENCY"])
def test_the_limit_of_a_scenario(name: str) -> None:
    with gate_before(NOWHERE, **{name: "2"}) as gate:
        assert gate.stats()["limits"]["max_concurrency"] == 2


def test_a_flag_beats_it() -> None:
    with gate_before(NOWHERE, options=("--max-concurrency", 4), MAX_CONCURRENT="2") as gate:
        assert gate.stats()["limits"]["max_concurrency"] == 4


def test_the_documents_own_limits_where_nothing_is_set() -> None:
    with gate_before(NOWHERE) as gate:
        limits = gate.stats()["limits"]
        assert (limits["max_concurrency"], limits["max_queue"], limits["request_timeout_s"]) == (3, 10, 120)
        assert (limits["max_output_tokens"], limits["default_output_tokens"]) == (512, 100)
        assert (limits["per_client"]["requests_per_minute"], limits["per_client"]["requests_per_hour"]) == (10, 100)
