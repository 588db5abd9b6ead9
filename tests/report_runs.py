"""Run folders for the tests of the report: built from verdicts, written as find writes them."""

import math
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from loadstone.core.verdict import (
    BestEfficiency,
    ClientFigures,
    Finding,
    GainLine,
    LevelKind,
    LevelRow,
    RunVerdict,
    Verdict,
)

FACTS: dict[str, Any] = {
    "command": "loadstone find --base-url http://127.0.0.1:8001 --model Qwen/Qwen3-8B --out runs/example",
    "created_at": "2026-11-20T10:00:00Z",
    "loadstone": "0.1.0",
    "python": "3.11.9",
    "machine": "x86_64, 16 cores",
    "settings": {
        "server": {"base_url": "http://127.0.0.1:8001", "endpoint": "chat", "model": "", "header": []},
        "data": {"dataset_name": "random", "random_input_len": 512, "random_output_len": 128, "seed": 0},
        "rules": {"min_success": 0.95, "max_ttft_ms": 1000.0, "ttft_stat": "mean", "max_e2el_ms": 0.0},
        "ladder": {"levels": "1,2,5,10,20,50,100,200,500,1000"},
    },
    "workload": {"notes": ["lengths calibrated from the server's usage"]},
    "server": {"base_url": "http://127.0.0.1:8001", "model": "Qwen/Qwen3-8B", "endpoint": "chat", "first_e2el_s": 2.31},
}


def level(ordinal: int, n: int, verdict: Verdict = Verdict.PASS, **changes: object) -> LevelRow:
    """A level of a server like vLLM: batching pays until about 200 streams, then TTFT climbs."""
    throughput = 0.31 * n / (1 + 0.004 * (n - 1) + 6e-6 * n * (n - 1))
    ttft = 42 + 0.9 * n + 90 * math.expm1(max(0.0, n - 120) / 45)
    itl = 18 + 0.06 * n
    row = LevelRow(
        ordinal=ordinal,
        kind=LevelKind.LADDER,
        concurrency=n,
        verdict=verdict,
        rule="",
        reason=f"every rule holds; mean TTFT {ttft:.0f} ± {ttft / 50:.0f} ms against 1000 ms",
        requests=8 * n,
        success_rate=1.0,
        error_rate=0.0,
        throughput_rps=throughput,
        throughput_low_rps=throughput * 0.97,
        throughput_high_rps=throughput * 1.03,
        output_tps=throughput * 128,
        mean_ttft_ms=ttft,
        ttft_low_ms=ttft * 0.98,
        ttft_high_ms=ttft * 1.02,
        p50_ttft_ms=ttft * 0.9,
        p95_ttft_ms=ttft * 1.6,
        p99_ttft_ms=ttft * 2.3,
        mean_e2el_ms=ttft + 127 * itl,
        p50_e2el_ms=ttft + 126 * itl,
        p95_e2el_ms=ttft + 135 * itl,
        p99_e2el_ms=ttft + 142 * itl,
        mean_itl_ms=itl,
        p50_itl_ms=itl * 0.97,
        p95_itl_ms=itl * 1.4,
        p99_itl_ms=itl * 2.1,
        duration_s=21.5,
        server={"kv_use": min(0.99, n / 260), "running": float(n), "waiting": max(0.0, n - 180.0), "preemptions": 0.0},
        client=ClientFigures(0.4 + n / 500, 0.0004, 0.02, 0.03 + n / 2000, 0.01, True),
        findings=[Finding("success", Verdict.PASS, "100 % [99.5–100] of 2,000 succeeded against 95 %")],
    )
    return msgspec.structs.replace(row, **changes)


def failed(ordinal: int, n: int, rule: str = "ttft", **changes: object) -> LevelRow:
    row = level(ordinal, n, Verdict.FAIL)
    reason = f"mean TTFT {row.mean_ttft_ms:.0f} ± 21 ms is over 1000 ms"
    if rule == "success":
        reason = "31 % [21–44] of 61 succeeded, fewer than 95 %"
    finding = Finding(rule, Verdict.FAIL, reason)
    return msgspec.structs.replace(row, rule=rule, reason=reason, findings=[*row.findings, finding], **changes)


EARLY: dict[str, object] = {
    "stopped_early": True,
    "throughput_rps": None,
    "throughput_low_rps": None,
    "throughput_high_rps": None,
    "requests": 61,
}


def vllm_like() -> RunVerdict:
    """A search as it should go: ladder, bisection, confirmation, TTFT binds."""
    ladder = [level(i, n) for i, n in enumerate((1, 2, 5, 10, 20, 50, 100, 200))]
    return RunVerdict(
        measured_max_concurrency=220,
        recommended_concurrency=165,
        half_of_failing=250,
        binding="ttft",
        claim="220 held: n = 2,200, success 100 %, mean TTFT 981 ± 20 ms ≤ 1000; 230 failed: 1186 ± 21 ms",
        best_efficiency=BestEfficiency(1, 0.31),
        gain_line=GainLine(240, 228, 253),
        non_monotone=False,
        peak_throughput_rps=31.9,
        recommended_throughput_rps=28.1,
        levels=[
            *ladder,
            failed(8, 500, **EARLY),
            failed(9, 280, **EARLY),
            failed(10, 230, kind=LevelKind.BISECT),
            level(11, 220, kind=LevelKind.CONFIRM, requests=2200),
            level(12, 165, kind=LevelKind.CONFIRM, requests=1650),
        ],
        notes=["p99 of fewer than 100 requests is only the largest value: levels 1 to 10."],
    )


def troubled() -> RunVerdict:
    """INVALID, UNRESOLVED and early-stopped levels, failures, a reply without content, hostile text."""
    hostile = 'HTTP 500 from <script>alert("x")</script> & "friends"'
    return RunVerdict(
        measured_max_concurrency=20,
        recommended_concurrency=15,
        half_of_failing=100,
        binding="client",
        claim="20 held: n = 200; 40 could not be judged: the generator waited for a core",
        best_efficiency=BestEfficiency(2, 0.3),
        gain_line=None,
        non_monotone=True,
        peak_throughput_rps=6.1,
        sure=False,
        levels=[
            level(0, 1, server={}),
            level(1, 2, no_content=3),
            level(2, 10),
            level(3, 20, Verdict.UNRESOLVED, sure=False, success_rate=0.953, error_rate=0.047, failures={"refused": 6}),
            failed(4, 200, "success", **EARLY, failures={"http_error": 40, "timeout": 2}, p99_ttft_ms=None),
            level(5, 40, Verdict.INVALID, rule="client", reason=hostile, client=ClientFigures(8, 0.12, 3, 0.97, 0.6)),
        ],
        notes=[hostile],
    )


def single() -> RunVerdict:
    """One level only, nothing streamed: no TTFT, no ITL."""
    silent = {f"{stat}_{metric}_ms": None for stat in ("mean", "p50", "p95", "p99") for metric in ("ttft", "itl")}
    row = level(0, 36, ttft_low_ms=None, ttft_high_ms=None, **silent)
    return RunVerdict(
        measured_max_concurrency=36,
        recommended_concurrency=27,
        half_of_failing=None,
        binding="ladder",
        claim="36 held: n = 360, success 100 % [99.5–100]",
        best_efficiency=BestEfficiency(36, 0.27),
        gain_line=None,
        non_monotone=False,
        peak_throughput_rps=9.7,
        levels=[row],
    )


def nothing_passed() -> RunVerdict:
    """The first level fails at once."""
    return RunVerdict(
        measured_max_concurrency=None,
        recommended_concurrency=None,
        half_of_failing=1,
        binding="success",
        claim="",
        best_efficiency=None,
        gain_line=None,
        non_monotone=False,
        peak_throughput_rps=None,
        levels=[failed(0, 1, "success", **EARLY, success_rate=0.2, error_rate=0.8, failures={"refused": 48})],
    )


RUNS = {"vllm_like": vllm_like, "troubled": troubled, "single": single, "nothing_passed": nothing_passed}


def write_run(folder: Path, verdict: RunVerdict, facts: dict[str, object] = FACTS) -> Path:
    """A run folder with what the report reads."""
    folder.mkdir(parents=True)
    (folder / "verdict.json").write_bytes(msgspec.json.encode(verdict))
    (folder / "run.toml").write_text(tomli_w.dumps(facts))
    return folder
