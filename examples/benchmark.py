#!/usr/bin/env python3
"""The embedding guide's load test, over ``loadstone bench``: one row of its results table.

    python benchmark.py --url http://localhost:8080 --concurrency 10 --requests 100

Asks ``/v1/embeddings`` for texts of 32 tokens. One command that tries all the levels, finds the line between them and
says which to run at: ./benchmark_find.sh
"""

import argparse
import json
import subprocess
import sys

INPUT_TOKENS = 32


def main() -> int:
    """Run one level and print it; the exit status is that of ``loadstone bench``."""
    parser = argparse.ArgumentParser(description="One level of load on an embedding service.")
    parser.add_argument("--url", default="http://localhost:8080", help="where the service is")
    parser.add_argument("--concurrency", type=int, default=10, help="requests in flight")
    parser.add_argument("--requests", type=int, default=100, help="requests in all")
    wanted = parser.parse_args()

    command = [sys.executable, "-m", "loadstone", "bench", "--backend", "openai-embeddings", "--base-url", wanted.url]
    command += ["--max-concurrency", str(wanted.concurrency), "--num-prompts", str(wanted.requests)]
    command += ["--random-input-len", str(INPUT_TOKENS), "--metric-percentiles", "95,99", "--json", "--quiet"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    if lines:
        print_table(wanted.concurrency, wanted.requests, json.loads(lines[-1]))
    return done.returncode


def print_table(concurrency: int, requests: int, result: dict[str, float]) -> None:
    print("| 并发数 | RPS | 平均延迟 | P95延迟 | P99延迟 | 错误率 |")
    print("|--------|-----|----------|---------|---------|--------|")
    latencies = " | ".join(f"{result[f'{stat}_e2el_ms']:.0f}ms" for stat in ("mean", "p95", "p99"))
    error_rate = 100 * result["failed"] / requests
    print(f"| {concurrency} | {result['request_throughput']:.0f} | {latencies} | {error_rate:.3g}% |")


if __name__ == "__main__":
    sys.exit(main())
