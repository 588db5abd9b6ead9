"""What the gate is compared with: nginx as a plain proxy, and a minimal proxy on aiohttp.

Run as ``gate_peers.py UPSTREAM_PORT`` it is the aiohttp one: all that streaming both ways needs and nothing else, on
uvloop, in one process. It prints ``ready on URL`` and serves until it is terminated.
"""

import asyncio
import os
import sys
from pathlib import Path

import aiohttp
import uvloop
from aiohttp import web

from loadstone.wire.process import raise_open_files

_HOP_BY_HOP = frozenset(
    ("connection", "host", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade")
)
_SESSION = web.AppKey("session", aiohttp.ClientSession)

_NGINX = """
daemon off;
worker_processes 1;
worker_rlimit_nofile 16384;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log warn;
{user}
events {{ worker_connections 8192; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream mock {{
        server 127.0.0.1:{upstream_port};
        keepalive {keepalive};
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://mock;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering {buffering};
        }}
    }}
}}
"""


def write_nginx_conf(folder: Path, port: int, upstream_port: int, *, keepalive: int, streams: bool) -> Path:
    """A plain proxy with kept upstream connections; where it streams, what it reads goes on at once."""
    path = folder / "nginx.conf"
    text = _NGINX.format(
        folder=folder,
        user="user root;" if os.geteuid() == 0 else "",
        port=port,
        upstream_port=upstream_port,
        keepalive=keepalive,
        buffering="off" if streams else "on",
    )
    path.write_text(text, encoding="utf-8")
    return path


def aiohttp_proxy(upstream: str) -> web.Application:
    """Bytes through as they come; hop-by-hop headers dropped."""

    async def open_session(app: web.Application) -> None:
        app[_SESSION] = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=75),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )

    async def close_session(app: web.Application) -> None:
        await app[_SESSION].close()

    async def relay(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        call = request.app[_SESSION].request(
            request.method, upstream + request.raw_path, headers=_end_to_end(request.headers), data=body
        )
        async with call as reply:
            if reply.content_length is not None:
                return web.Response(
                    status=reply.status, headers=_end_to_end(reply.headers), body=await reply.content.read()
                )
            response = web.StreamResponse(status=reply.status, headers=_end_to_end(reply.headers))
            await response.prepare(request)
            async for piece in reply.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    app = web.Application(client_max_size=1 << 26)
    app.on_startup.append(open_session)
    app.on_cleanup.append(close_session)
    app.router.add_route("*", "/{path:.*}", relay)
    return app


def _end_to_end(headers: "aiohttp.typedefs.CIMultiDictProxy[str]") -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers.items() if name.lower() not in _HOP_BY_HOP]


async def _serve(upstream: str) -> None:
    runner = web.AppRunner(aiohttp_proxy(upstream), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    host, port = runner.addresses[0][:2]
    print(f"ready on http://{host}:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    raise_open_files()
    uvloop.run(_serve(f"http://127.0.0.1:{sys.argv[1]}"))
