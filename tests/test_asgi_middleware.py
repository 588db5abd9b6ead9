"""The middleware itself: what it admits, where its limits come from, its loop, its start and its end."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from asgi_calls import (
    Call,
    Model,
    reply,
    slow,
)
from loadstone.asgi import AdmissionMiddleware
from loadstone.core.errors import UsageError
from loadstone.hold.asgi_messages import Message, Receive, Scope, Send


def gated(model: Model, **options: Any) -> AdmissionMiddleware:
    return AdmissionMiddleware(model, requests_per_minute=0, requests_per_hour=0, **options)


def test_by_default_reading_is_free_and_everything_else_is_admitted() -> None:
    async def main() -> None:
        model = Model()
        app = AdmissionMiddleware(model, requests_per_minute=2, stats_path="/stats")
        methods = ["POST", "PUT", "POST", "GET", "HEAD", "OPTIONS"]
        calls = [await Call(app, path="/rerank", method=method).done() for method in methods]
        assert [call.status for call in calls] == [200, 200, 429, 200, 200, 200]
        assert calls[3].headers == {"content-type": "application/json"}
        stats = json.loads((await Call(app, path="/stats", method="GET").done()).body)
        assert (stats["received"], stats["outcomes"]["ok"], stats["outcomes"]["rate_limited"]) == (3, 2, 1)
        assert (stats["limits"]["max_concurrency"], stats["upstreams"][0]["name"]) == (3, "app")

    asyncio.run(main())


def test_paths_choose_what_is_admitted() -> None:
    async def main() -> None:
        model = Model()
        app = gated(model, paths=["/v1/", "/embed"], max_concurrency=1, max_queue=0, stats_path="/stats")
        asked = [("POST", "/v1/x"), ("GET", "/v1/x"), ("GET", "/embed?"), ("OPTIONS", "/v1/x"), ("POST", "/other")]
        for method, path in asked:
            await Call(app, path=path, method=method).done()
        await Call(app, path="/api/v1/x", root_path="/api").done()
        stats = json.loads((await Call(app, path="/api/stats", root_path="/api", method="GET").done()).body)
        assert (stats["received"], len(model.asked)) == (4, 6)

    asyncio.run(main())


def test_the_admins_key_protects_the_figures() -> None:
    async def main() -> None:
        app = gated(Model(), stats_path="/stats", admin_key="secret")
        stranger = await Call(app, path="/stats", method="GET").done()
        assert (stranger.status, "www-authenticate" in stranger.headers) == (401, True)
        admin = await Call(app, path="/stats", method="GET", headers=[(b"x-loadstone-admin", b"secret")]).done()
        assert admin.status == 200

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_other_protocols_pass_untouched(kind: str) -> None:
    async def main() -> None:
        seen: list[Any] = []

        async def inner(*given: Any) -> None:
            seen.extend(given)

        async def receive() -> Message:
            raise AssertionError

        async def send(message: Message) -> None:
            raise AssertionError

        scope = {"type": kind}
        await gated(Model(inner))(scope, receive, send)
        assert seen == [scope, receive, send]
        assert seen[0] is scope

    asyncio.run(main())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_one_event_loop_at_a_time(run: Callable[..., None]) -> None:
    app = AdmissionMiddleware(Model(slow(0)), max_concurrency=1, max_queue=5, requests_per_minute=3)

    async def ask() -> None:
        calls = await asyncio.gather(*(Call(app).done() for _ in range(3)))
        assert [call.status for call in calls] == [200] * 3

    async def with_another() -> None:
        await ask()
        other = asyncio.new_event_loop()
        try:
            with pytest.raises(UsageError, match="another event loop; make one instance for each"):
                await asyncio.to_thread(other.run_until_complete, ask())
        finally:
            other.close()

    run(ask())
    run(with_another())  # the loop before has been closed, and with it ended what was counted there


def test_shutting_down_lets_go_and_the_next_start_begins_anew() -> None:
    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await reply(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def main() -> None:
        app = AdmissionMiddleware(Model(lifespan), requests_per_minute=1, stats_path="/stats")
        for _ in range(2):
            told: asyncio.Queue[Message] = asyncio.Queue()
            said: asyncio.Queue[Message] = asyncio.Queue()
            living = asyncio.create_task(app({"type": "lifespan"}, told.get, said.put))
            told.put_nowait({"type": "lifespan.startup"})
            assert (await said.get())["type"] == "lifespan.startup.complete"
            assert [(await Call(app).done()).status for _ in range(2)] == [200, 429]
            assert "not in use" not in repr(app)
            told.put_nowait({"type": "lifespan.shutdown"})
            await living
            assert repr(app) == "<AdmissionMiddleware not in use>"

    asyncio.run(main())


def _limits_file(folder: Path, text: str) -> Path:
    file = folder / "limits.toml"
    file.write_text(f"schema = 1\n{text}")
    return file


EVIDENCE = """
[evidence]
measured_max_concurrency = 4
headroom = 0.75
binding = "ttft"
claim = "4 held"
measured_at = "2026-11-20T10:00:00Z"
expires_at = "2999-12-20T10:00:00Z"
model = "m"
endpoint = "chat"
base_url = "http://127.0.0.1:1"
"""


def test_limits_come_from_the_file_and_keywords_beat_it(tmp_path: Path) -> None:
    upstream = '[[upstream]]\nurl = "http://elsewhere"\nmax_concurrency = 9\n'
    file = _limits_file(tmp_path, f"[limits]\nmax_concurrency = 3\nmax_queue = 7\n{upstream}{EVIDENCE}")

    async def main() -> None:
        app = AdmissionMiddleware(Model(), limits=file, max_queue=2, stats_path="/stats")
        stats = json.loads((await Call(app, path="/stats", method="GET").done()).body)
        assert (stats["limits"]["max_concurrency"], stats["limits"]["max_queue"]) == (3, 2)
        assert stats["limits"]["per_client"]["requests_per_minute"] is None
        assert stats["evidence"]["measured_max_concurrency"] == 4
        assert [upstream["limit"] for upstream in stats["upstreams"]] == [3]

    asyncio.run(main())


async def starting(app: AdmissionMiddleware) -> str:
    """Why it does not start; empty where the app itself is asked."""
    said: list[Message] = []

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        said.append(message)

    await app({"type": "lifespan"}, receive, send)
    assert [message["type"] for message in said] in ([], ["lifespan.startup.failed"])
    return said[0]["message"] if said else ""


async def _nothing(*_: Any) -> None:
    pass


def test_limits_above_the_measured_line_need_force(tmp_path: Path) -> None:
    file = _limits_file(tmp_path, f"[limits]\nmax_concurrency = 3\nmax_queue = 7\n{EVIDENCE}")

    async def main() -> None:
        problem = await starting(AdmissionMiddleware(_nothing, limits=file, max_concurrency=5))
        assert "above the measured line of 4" in problem
        assert await starting(AdmissionMiddleware(_nothing, limits=str(file), max_concurrency=5, force=True)) == ""

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"limits": "/nowhere/limits.toml"}, "limits /nowhere/limits.toml: No such file"),
        ({"max_concurrency": "3"}, "Expected `int | null`, got `str` - at `$.max_concurrency`"),
        ({"max_concurrency": 2.5}, "got `float`"),
        ({"max_queue": -1}, "at least 0"),
        ({"max_queu": 1}, "no option 'max_queu'; limits are max_concurrency, max_queue"),
        ({"paths": ["v1/"]}, "'v1/' must begin with a slash"),
        ({"trusted_proxies": ["x"]}, "give a network"),
    ],
)
def test_what_cannot_be_used_does_not_start(options: dict[str, Any], complaint: str) -> None:
    async def main() -> None:
        app = AdmissionMiddleware(Model(), **options)
        assert complaint in await starting(app)
        for method in ("POST", "GET"):
            (raised,) = await asyncio.gather(Call(app, method=method).task, return_exceptions=True)
            assert isinstance(raised, UsageError)

    asyncio.run(main())


def test_doubtful_limits_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    AdmissionMiddleware(Model(), max_queue=50)
    assert [record.name for record in caplog.records] == ["loadstone"]
    assert "a queue of 50" in caplog.text
