"""The gate's live page in a real browser, in front of a made gate. Needs ``chromium``.

Run by itself: ``pytest tests/browser``; the ordinary suite leaves this folder out.
"""

import asyncio
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chromium import FLAGS
from loadstone.hold.api_keys import is_admin
from loadstone.hold.dashboard import page
from loadstone.wire.server import HttpServer, IncomingRequest, Response
from made_stats import HOSTILE, MadeGate

_FLAGS = (*FLAGS, "--window-size=1500,2400", "--virtual-time-budget=9000")
_JSON = (b"content-type", b"application/json")
_KEY = "s3cret"

_LISTEN = """
window.problems = [];
addEventListener("error", (event) => problems.push(event.message));
addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => problems.push(event.violatedDirective + " " + event.blockedURI));
console.error = console.warn = (...words) => problems.push(words.join(" "));
"""

# The page stands in a frame of the width asked for: a window of Chromium is never narrower than 500 pixels.
_FRAME = """<!doctype html><body style="margin:0">
<iframe src="/ui" style="border:0;height:2300px;width:{width}px"></iframe>
<script>
const page = document.querySelector("iframe");
const seen = (id) => {{
  const node = page.contentDocument.getElementById(id);
  return node.closest("[hidden]") ? null : node.innerText;
}};
setTimeout(() => {{
  const inside = page.contentDocument, root = inside.documentElement;
  document.documentElement.dataset.found = JSON.stringify({{
    problems: page.contentWindow.problems,
    overflow: root.scrollWidth - page.clientWidth,
    text: inside.body.innerText,
    images: inside.images.length,
    state: seen("state"), notice: seen("notice"),
    inFlight: seen("in-flight"), figures: seen("figures"),
    thresholds: [...inside.querySelectorAll(".threshold")].map((tile) => tile.classList[1] ?? ""),
    charts: [...inside.querySelectorAll("figure path")].map((path) => path.getAttribute("d")),
  }});
}}, 7500);
</script>"""


class Fake:
    """Serves the page, and ``/stats`` of a made gate; ``answers``: after so many it gives 502s; ``key``: wanted."""

    def __init__(self, scene: str, width: int, *, answers: int = 1000, key: str = "") -> None:
        self.gate = MadeGate(scene)
        self.frame = _FRAME.format(width=width).encode()
        self.answers = answers
        self.key = key

    def handle(self, request: IncomingRequest, response: Response) -> None:
        if self.key and not is_admin(request.headers, self.key):
            response.reply(401, [(b"www-authenticate", b'Basic realm="loadstone"')], b"")
        elif request.path == "/stats":
            self.stats(response)
        elif request.path == "/frame":
            response.reply(200, [(b"content-type", b"text/html; charset=utf-8")], self.frame)
        elif request.path == "/listen.js":
            response.reply(200, [(b"content-type", b"text/javascript")], _LISTEN.encode())
        elif (found := page(request.path)) is not None:
            kind, body = found
            body = body.replace(b"<title>", b'<script src="/listen.js"></script><title>', 1)
            response.reply(200, [(b"content-type", kind)], body)
        else:
            response.reply(404, [], b"")

    def stats(self, response: Response) -> None:
        self.answers -= 1
        if self.answers < 0:
            response.reply(502, [], b"")
        else:
            response.reply(200, [_JSON], msgspec.json.encode(self.gate.stats()))


def look(fake: Fake, profile: Path) -> dict[str, Any]:
    """What the page says of itself after seven seconds."""
    browser = shutil.which("chromium")
    assert browser, "chromium is not installed: apt-get install chromium"

    async def main() -> str:
        server = HttpServer(fake.handle)
        port = await server.start("127.0.0.1", 0)
        command = [*_FLAGS, f"--user-data-dir={profile}", f"http://admin:{fake.key}@127.0.0.1:{port}/frame"]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(browser, *command, stdout=pipe, stderr=pipe)
        try:
            out, _ = await asyncio.wait_for(process.communicate(), 120)
        finally:
            await server.stop()
        return out.decode()

    match = re.search(r'data-found="([^"]*)"', asyncio.run(main()))
    assert match, "the page never finished"
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    return found


@pytest.mark.parametrize("width", [1400, 420])
@pytest.mark.parametrize("scene", ["empty", "busy", "troubled"])
def test_the_page_shows_a_gate_without_an_error(scene: str, width: int, tmp_path: Path) -> None:
    found = look(Fake(scene, width), tmp_path)
    assert found["problems"] == []
    assert found["overflow"] <= 0
    assert found["notice"] is None
    assert found["inFlight"] == {"empty": "0 of 3", "busy": "3 of 3", "troubled": "0 of 1"}[scene]
    assert found["state"] == ("1 of 2 upstreams up" if scene == "troubled" else "live")
    assert len(found["charts"]) == 10
    assert found["charts"][0].count("L") >= 4


def test_the_four_thresholds(tmp_path: Path) -> None:
    assert look(Fake("empty", 1400), tmp_path / "a")["thresholds"] == ["", "good", "", ""]
    assert look(Fake("troubled", 1400), tmp_path / "b")["thresholds"] == ["warn", "good", "warn", "warn"]


def test_names_from_clients_are_text(tmp_path: Path) -> None:
    found = look(Fake("troubled", 1400), tmp_path)
    assert found["text"].count(HOSTILE) == 3, "as a client, in a reason and in a warning"
    assert found["images"] == 0


def test_a_gate_that_stops_answering(tmp_path: Path) -> None:
    found = look(Fake("busy", 1400, answers=2), tmp_path)
    assert found["state"] == "no answer"
    assert "The gate has not answered for" in found["notice"]
    assert "status 502" in found["notice"]
    assert found["inFlight"] == "3 of 3", "the last figures stay, dimmed"


def test_a_gate_that_wants_its_key(tmp_path: Path) -> None:
    """The browser asks for it, and gives it as the password from then on."""
    found = look(Fake("busy", 1400, key=_KEY), tmp_path)
    assert found["problems"] == []
    assert (found["state"], found["inFlight"]) == ("live", "3 of 3")
