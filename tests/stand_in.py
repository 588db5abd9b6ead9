"""A stand-in for an engine: ``python stand_in.py PORT [WORD …]``. The words say how it misbehaves.

fail        writes a complaint about memory and ends with status 3 before it serves
deaf        never answers
foreign     does not watch its standard input
stubborn    neither that nor SIGTERM ends it
parent      starts a child that outlives it, in a session of its own
parent-here starts a child that outlives it, in its own group

``GET /crash`` makes it end like an engine without memory, ``GET /hang`` makes it answer no more, ``GET /children``
tells which processes it has started.
"""

import http.server
import os
import signal
import subprocess
import sys
import threading

OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.70 GiB."
_CHILD = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"


class Handler(http.server.BaseHTTPRequestHandler):
    hanging = threading.Event()
    children: tuple[int, ...] = ()

    def do_GET(self) -> None:
        if self.path == "/crash":
            print(OUT_OF_MEMORY, flush=True)
            os._exit(1)
        if self.path == "/hang":
            self.hanging.set()
        elif self.hanging.is_set():
            threading.Event().wait()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(" ".join(map(str, self.children)).encode())

    def log_message(self, *_: object) -> None:
        """Nothing: a line for each probe would hide what is looked for."""


def child(*, session: bool) -> int:
    """Started, deaf to SIGTERM, and left alone."""
    process = subprocess.Popen([sys.executable, "-c", _CHILD], stdout=subprocess.PIPE, start_new_session=session)
    assert process.stdout is not None
    process.stdout.readline()
    return process.pid


def main(port: int, words: frozenset[str]) -> None:
    if "fail" in words:
        print(OUT_OF_MEMORY, flush=True)
        sys.exit(3)
    if "stubborn" in words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if words & {"parent", "parent-here"}:
        Handler.children = (child(session="parent" in words),)
    if "deaf" not in words:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    if words & {"foreign", "stubborn"}:
        while True:
            signal.pause()
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), frozenset(sys.argv[2:]))
