"""``loadstone gate`` as a process: how it starts, what it refuses, how it is reloaded, and how it goes."""

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from gates import (
    PATIENCE_S,
    REPLY,
    STREAM,
    Client,
    Reply,
    Server,
    answers,
    event,
    http,
    run,
    serving,
    until,
)
from loadstone.cli.main import main as loadstone

LOADSTONE = Path(sys.executable).with_name("loadstone")
OPEN = ("--requests-per-minute", "0", "--requests-per-hour", "0")
EVIDENCE = """
[evidence]
measured_max_concurrency = 4
headroom = 0.75
binding = "ttft"
claim = "4 held; 5 failed"
measured_at = "2026-11-01T00:00:00Z"
expires_at = "2099-01-01T00:00:00Z"
model = "m"
endpoint = "chat"
base_url = "http://127.0.0.1:1"
"""


def limits_toml(concurrency: int, queue: int = 9, more: str = "") -> str:
    return f"schema = 1\n[limits]\nmax_concurrency = {concurrency}\nmax_queue = {queue}\n{more}"


class Process:
    """A gate that runs; ``said`` is what it has written to standard error."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port
        self.said = ""
        self._clients: list[Client] = []

    async def asking(self, data: bytes | None = None) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self._clients.append(client)
        client.send(http() if data is None else data)
        return client

    async def once(self, data: bytes | None = None) -> Reply:
        client = await self.asking(data)
        reply = await client.reply()
        client.close()
        return reply

    async def get(self, path: str) -> Reply:
        return await self.once(http("GET", path, b""))

    async def shows(self, **figures: object) -> None:
        """Ask ``/stats`` until it shows these figures."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                stats = (await self.get("/stats")).document
                if {key: stats[key] for key in figures} == figures:
                    return

    async def says(self, text: str) -> None:
        await until(lambda: text in self.said)

    async def listen(self) -> None:
        assert self.process.stderr is not None
        while data := await self.process.stderr.read(4096):
            self.said += data.decode()

    def hang_up(self) -> None:
        for client in self._clients:
            client.close()

    async def ends(self) -> int:
        return await asyncio.wait_for(self.process.wait(), PATIENCE_S)


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Without settings of the caller's own."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("LOADSTONE_", "MAX_"))} | more


@asynccontextmanager
async def gate(*words: object, **more: str) -> AsyncIterator[Process]:
    """A gate on a free port. Whatever happens to it, it leaves no traceback."""
    process = await asyncio.create_subprocess_exec(
        LOADSTONE,
        "gate",
        "--port",
        "0",
        *map(str, words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(more),
    )
    assert process.stdout is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)).decode()
        ready = re.fullmatch(r"loadstone: ready on http://127\.0\.0\.1:(\d+)\n", line)
        assert ready, line
        running = Process(process, int(ready[1]))
        listening = asyncio.create_task(running.listen())
        try:
            yield running
        finally:
            running.hang_up()
        if process.returncode is None:
            process.terminate()
            assert await running.ends() == 0, running.said
        await listening
        assert "Traceback" not in running.said, running.said
        assert await process.stdout.read() == b"", "standard output is for the one line"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


# -- reload


def test_limits_are_read_again_on_sighup_and_whatever_is_wrong_with_them_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(limits_toml(1))

    async def main() -> None:
        async with serving(None) as [server], gate("--upstream", server.url, "--limits", file) as one:
            clients = [await one.asking() for _ in range(4)]
            await one.shows(in_flight=1, queued=3)
            file.write_text(limits_toml(3))
            one.process.send_signal(signal.SIGHUP)
            await until(lambda: len(server.running) == 3)
            await one.says("limits read again: 3 at http://127.0.0.1")
            for wrong, complaint in (
                ("[limits", "is not TOML"),
                ("schema = 1\n[limits]\nmax_concurency = 3", "max_concurency"),
                ("schema = 1\n[limits]\nmax_concurrency = 0", "max_concurrency"),
                ("schema = 2\n", "schema"),
                (limits_toml(5, more=EVIDENCE), "above the measured line"),
            ):
                file.write_text(wrong)
                one.process.send_signal(signal.SIGHUP)
                await one.says(complaint)
                [warning] = (await one.get("/health")).document["warnings"]
                assert warning.startswith("the limits in force stay, the file cannot be used: ")
                await one.shows(in_flight=3, queued=1, capacity=3)
            file.write_text(limits_toml(4))
            one.process.send_signal(signal.SIGHUP)
            await one.shows(in_flight=4, queued=0, capacity=4, warnings=[])
            for _ in range(4):
                (await server.next()).answer()
            assert {(await client.reply()).status for client in clients} == {200}

    run(main())


def test_a_file_that_changes_is_noticed_also_when_it_is_replaced(tmp_path: Path) -> None:
    file, other = tmp_path / "limits.toml", tmp_path / "other.toml"
    file.write_text(limits_toml(1))

    async def main() -> None:
        async with serving(answers) as [server], gate("--upstream", server.url, "--limits", file) as one:
            await server.told_model.wait()
            other.write_text(limits_toml(2))
            other.replace(file)
            await one.says("limits changed: 2 at http://127.0.0.1")
            await one.shows(capacity=2)
            file.unlink()
            one.process.send_signal(signal.SIGHUP)
            await one.says("cannot be read: No such file")
            await one.shows(capacity=2)
            assert (await one.once()).status == 200

    run(main())


def test_a_reload_may_exchange_the_upstreams_while_one_streams(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"

    async def main() -> None:
        async with serving(None, answers) as [old, new]:
            file.write_text(limits_toml(1, more=f'[[upstream]]\nurl = "{old.url}"\n'))
            async with gate("--limits", file) as one:
                client = await one.asking(http(body=STREAM))
                asked = await old.next()
                asked.stream()
                await client.head()
                file.write_text(limits_toml(1, more=f'[[upstream]]\nurl = "{new.url}"\n'))
                one.process.send_signal(signal.SIGHUP)
                await one.says(f"1 at {new.url}")
                assert (await one.once()).body == REPLY
                asked.end(event("last"))
                assert [await client.chunk(), await client.chunk()] == [event("last"), b""]
                assert (old.total, new.total) == (1, 1)

    run(main())


# -- the way down


def test_sigterm_finishes_what_runs_and_waits_and_then_exits_with_0() -> None:
    async def main() -> None:
        async with serving(None) as [server], gate("--upstream", server.url, "--max-concurrency", 1, *OPEN) as one:
            client = await one.asking(http(body=STREAM))
            asked = await server.next()
            asked.stream()
            asked.say(event("a"))
            await client.head()
            waits = await one.asking()
            await one.shows(queued=1)
            one.process.terminate()
            await one.says("draining: 2 requests run or wait")
            health = await one.get("/health")
            assert (health.status, health.document["status"]) == (503, "draining")
            refused = await one.once()
            assert (refused.status, refused.error["code"]) == (503, "draining")
            asked.end(event("b"))
            assert [await client.chunk() for _ in range(3)] == [event("a"), event("b"), b""]
            (await server.next()).answer()
            assert (await waits.reply()).status == 200
            one.hang_up()
            assert await one.ends() == 0

    run(main())


def test_an_idle_gate_leaves_at_once_whoever_is_connected() -> None:
    async def main() -> None:
        async with serving(answers) as [server], gate("--upstream", server.url) as one:
            client = await one.asking()
            assert (await client.reply()).status == 200
            one.process.terminate()
            assert await client.rest() == b""
            assert await one.ends() == 0

    run(main())


def test_a_drain_has_an_end_and_a_second_signal_is_one() -> None:
    async def main() -> None:
        async with (
            serving(None) as [server],
            gate("--upstream", server.url, "--drain-timeout-s", 0.05) as short,
            gate("--upstream", server.url) as patient,
        ):
            await short.asking()
            asked = await server.next()
            short.process.terminate()
            await asyncio.wait_for(asked.left.wait(), PATIENCE_S)
            assert await short.ends() == 0
            assert "1 requests were cut" in short.said
            await patient.asking()
            await server.next()
            patient.process.terminate()
            await patient.says("draining: 1 requests")
            patient.process.terminate()
            assert await patient.ends() == -signal.SIGTERM

    run(main())


# -- what it is told


def test_every_way_to_set_a_limit(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(limits_toml(2, more=EVIDENCE.replace("2099", "2026").replace('"m"', '"measured"')))
    keys = tmp_path / "keys"
    keys.write_text("alpha-key alpha\n")
    log = tmp_path / "access.log"

    async def main() -> None:
        async with (
            serving(answers) as [server],
            gate(
                "--upstream", server.url, "--max-queue", 3, MAX_CONCURRENT="2", LOADSTONE_REQUESTS_PER_MINUTE="1"
            ) as one,
            gate(
                *("--upstream", server.url, "--limits", file, "--max-concurrency", 9, "--force"),
                *("--api-key-file", keys, "--access-log", log),
                LOADSTONE_ADMIN_KEY="sesame",
                LOADSTONE_MAX_CONCURRENCY="5",
            ) as other,
        ):
            health = (await one.get("/health")).document
            assert (health["capacity"], health["limits"]["max_queue"]) == (2, 3)
            assert [(await one.once()).status for _ in range(2)] == [200, 429]
            assert (await one.get("/health")).document["limits"]["per_client"]["requests_per_hour"] == 100
            health = (await other.get("/health")).document
            assert health["capacity"] == 9
            assert "expired" in health["warnings"][0]
            await other.says("were measured for measured, but http://127.0.0.1")
            assert (await other.get("/stats")).status == 401
            assert (await other.once()).status == 401
            assert (await other.once(http(headers=[(b"authorization", b"Bearer alpha-key")]))).status == 200
            assert log.read_text().count('"outcome"') == 2
            assert "alpha-key" not in log.read_text() + other.said

    run(main())


def test_a_gate_before_a_gate_keeps_who_asked_and_what_was_asked(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            serving(None) as [server],
            gate(
                "--upstream", server.url, "--trusted-proxy", "127.0.0.1", "--max-concurrency", 1, "--max-queue", 0
            ) as inner,
            gate("--upstream", f"http://127.0.0.1:{inner.port}", "--max-concurrency", 9, "--max-queue", 0) as outer,
        ):
            asked = await server.next()
            assert asked.request.path == "/v1/models", "the outer gate compares models too"
            asked.answer()
            client = await outer.asking(http(headers=[(b"x-request-id", b"call-1")]))
            asked = await server.next()
            assert asked.header(b"x-request-id") == b"call-1"
            assert asked.header(b"via") == b"1.1 loadstone, 1.1 loadstone"
            assert asked.header(b"x-forwarded-for") == b"127.0.0.1, 127.0.0.1"
            refused = await outer.once()
            assert (refused.status, refused.error["code"]) == (503, "queue_full")
            assert refused.headers["x-loadstone-reason"] == "upstream_busy"
            assert int(refused.headers["retry-after"]) >= 1
            asked.answer()
            assert (await client.reply()).headers["via"] == "1.1 loadstone"

    run(main())


# -- what it refuses


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the gate says before it exits with 2, in one line."""
    assert loadstone(["gate", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("loadstone: ")
    return line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no upstream"),
        (["--upstream", "127.0.0.1:1"], "--upstream"),
        (["--upstream", "http://h", "--limits", "absent.toml"], "absent.toml cannot be read"),
        (["--upstream", "http://h", "--max-queue", "-1"], "--max-queue"),
        (["--upstream", "http://h", "--trusted-proxy", "10.0.0.0/99"], "--trusted-proxy"),
        (["--upstream", "http://h", "--api-key-file", "absent"], "--api-key-file absent"),
        (["--upstream", "http://h", "--access-log", "/proc/none/log"], "--access-log"),
        (["--upstream", "http://h", "--max-body-mb", "0"], "--max-body-mb"),
        (["--upstream", "https://h", "--upstream-ca", "absent.pem"], "--upstream-ca absent.pem"),
    ],
)
def test_what_it_cannot_use_is_named(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert says in refusal(capsys, *words)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[limits", "is not TOML"),
        ("[limits]\nmax_concurrency = 1", "has no schema"),
        (limits_toml(1, more="nonsense = 1"), "nonsense"),
        (limits_toml(-1), "max_concurrency"),
        (limits_toml(5, more=EVIDENCE), "above the measured line of 4"),
        ("schema = 1\n" + EVIDENCE, "no bound is above the measured line of 4"),
    ],
)
def test_limits_that_it_cannot_hold_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, says: str
) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(text)
    assert says in refusal(capsys, "--upstream", "http://127.0.0.1:1", "--limits", file)


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        said = refusal(capsys, "--upstream", "http://127.0.0.1:1", "--port", port)
        assert f"cannot listen on 127.0.0.1:{port}" in said
        assert "--port" in said


def test_two_gates_share_a_server_and_not_a_port() -> None:
    async def both(server: Server) -> None:
        async with gate("--upstream", server.url) as one, gate("--upstream", server.url) as other:
            assert [(await it.once()).status for it in (one, other)] == [200, 200]
            again = await asyncio.create_subprocess_exec(
                *(LOADSTONE, "gate", "--upstream", server.url, "--port", str(one.port)),
                stderr=asyncio.subprocess.PIPE,
                env=environment({}),
            )
            _out, said = await asyncio.wait_for(again.communicate(), PATIENCE_S)
            assert again.returncode == 2
            assert f"cannot listen on 127.0.0.1:{one.port}" in said.decode()

    async def main() -> None:
        async with serving(answers) as [server]:
            await both(server)

    run(main())
