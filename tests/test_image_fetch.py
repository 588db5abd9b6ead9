"""Images by URL: what arrives, and that a stranger's URL opens no connection to where it should not."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from loadstone.core.refusals import BadAskError
from loadstone.serve.addresses import parse_opened
from loadstone.serve.image_fetch import FetchSettings, ImageFetcher
from loadstone.wire.tls import client_context
from upstream_heard import Run
from wire_servers import serving, turns_until

FOLDER = Path(__file__).with_name("data") / "tls"
PICTURE = b"any bytes; what they are is decided elsewhere"


def reply(body: bytes, head: str = "") -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body


def redirect(url: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Elsewhere\r\nLocation: {url}\r\nContent-Length: 0\r\n\r\n".encode()


class Site:
    """Answers by path; keeps what it was asked. ``{port}`` in an answer is its own port."""

    def __init__(self, **answers: bytes) -> None:
        self.answers = answers
        self.heads: list[str] = []
        self.connections = 0
        self.port = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            name = head.split()[1].partition("?")[0].strip("/")
            writer.write(self.answers[name].replace(b"{port}", b"%d" % self.port))
            await writer.drain()


class Names:
    """A resolver that knows some names, and counts the questions. Others are unknown."""

    def __init__(self, **known: Sequence[str]) -> None:
        self.known = {name.replace("_", "."): addresses for name, addresses in known.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self.known:
            raise OSError("unknown")
        return self.known[host]


@contextlib.asynccontextmanager
async def fetching(
    site: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object] | Site,
    names: Names | None = None,
    *,
    opened: Sequence[str] = ("cdn.test",),
    tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
    **settings: float,
) -> AsyncIterator[tuple[ImageFetcher, int]]:
    """A fetcher beside a site, which ``cdn.test`` leads to; and the site's port."""
    server, client = tls or (None, None)
    names = names or Names(cdn_test=["127.0.0.1"])
    async with serving(site, server) as port:  # type: ignore[arg-type]
        if isinstance(site, Site):
            site.port = port
        fetcher = ImageFetcher(FetchSettings(opened=parse_opened(opened), **settings), names, client)  # type: ignore[arg-type]
        try:
            yield fetcher, port
        finally:
            await fetcher.close()


async def refusal(fetcher: ImageFetcher, url: object) -> str:
    with pytest.raises(BadAskError) as caught:
        await fetcher.fetch(url, "urls[1]")
    assert caught.value.param == "urls[1]"
    return str(caught.value)


def test_the_checked_address_is_the_one_connected_to(run: Run) -> None:
    async def main() -> None:
        site = Site(cat=reply(PICTURE, "Content-Type: text/html\r\n"))
        names = Names(cdn_test=["127.0.0.1"])
        async with fetching(site, names) as (fetcher, port):
            for _ in range(2):
                assert await fetcher.fetch(f"http://CDN.test.:{port}/cat?größe=1&x=%2F#part", "url") == PICTURE
            assert repr(fetcher) == "<ImageFetcher, 0 running>"
        assert names.asked == ["cdn.test"], "one look-up for a connection, and the connection is kept"
        assert site.connections == 1
        assert site.heads[0].startswith("GET /cat?gr%C3%B6%C3%9Fe=1&x=%2F HTTP/1.1\r\n")
        assert f"\r\nHost: cdn.test:{port}\r\n" in site.heads[0]

    run(main())


PRIVATE_URLS = [
    "http://127.0.0.1:{port}/cat",
    "http://[::1]:{port}/cat",
    "http://[::ffff:127.0.0.1]:{port}/cat",
    "http://localhost:{port}/cat",
    "http://2130706433:{port}/cat",
    "http://0x7f.1:{port}/cat",
    "http://0177.0.0.1:{port}/cat",
    "http://127.1:{port}/cat",
    "http://0:{port}/cat",
    "http://１２７.0.0.1:{port}/cat",
    "http://169.254.169.254/latest/meta-data/",
]


@pytest.mark.parametrize("url", PRIVATE_URLS)
def test_private_addresses_however_they_are_spelt(url: str) -> None:
    async def main() -> None:
        site = Site(cat=reply(PICTURE))
        async with serving(site) as port:
            fetcher = ImageFetcher(FetchSettings())
            message = await refusal(fetcher, url.format(port=port))
            await fetcher.close()
        assert message.endswith("is not on the public internet (--image-url-allow opens a host or network)")
        assert site.connections == 0

    asyncio.run(main())


def test_one_private_address_among_public_ones_condemns_the_host(run: Run) -> None:
    async def main() -> None:
        site = Site(cat=reply(PICTURE))
        names = Names(two_test=["8.8.8.8", "127.0.0.1"], none_test=[])
        async with fetching(site, names) as (fetcher, _):
            assert (await refusal(fetcher, "http://two.test/cat")).startswith(
                "the image URL: the host two.test is not on the public internet"
            )
            assert await refusal(fetcher, "http://none.test/") == "the image URL: the host none.test has no address"
            assert await refusal(fetcher, "http://who.test/") == "the image URL: the host who.test is unknown"
        assert site.connections == 0

    run(main())


def test_a_public_host_is_asked_on_the_usual_ports_only(run: Run) -> None:
    async def main() -> None:
        async with fetching(Site(), Names(mail_test=["8.8.8.8"])) as (fetcher, _):
            assert "is asked for on port 25, not 80 or 443" in await refusal(fetcher, "http://mail.test:25/")

    run(main())


def test_a_redirect_is_followed_and_checked_like_the_first_url(run: Run) -> None:
    async def main() -> None:
        site = Site(
            relative=redirect("cat", 301),
            absolute=redirect("//cdn.test:{port}/relative", 307),
            inside=redirect("http://rebound.test:{port}/cat"),
            file=redirect("file:///etc/passwd"),
            secret=redirect("http://a:b@cdn.test:{port}/cat"),
            round=redirect("/round", 308),
            cat=reply(PICTURE),
        )
        names = Names(cdn_test=["127.0.0.1"], rebound_test=["127.0.0.1"])
        async with fetching(site, names) as (fetcher, port):
            root = f"http://cdn.test:{port}"
            assert await fetcher.fetch(f"{root}/absolute", "url") == PICTURE
            asked = len(site.heads)
            assert "rebound.test is not on the public internet" in await refusal(fetcher, f"{root}/inside")
            assert "does not begin with http:// or https://" in await refusal(fetcher, f"{root}/file")
            assert "has a user or password in it" in await refusal(fetcher, f"{root}/secret")
            assert await refusal(fetcher, f"{root}/round") == "the image URL: more than 3 redirects"
            assert len(site.heads) == asked + 3 + 4

    run(main())


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (None, "not a string"),
        (7, "not a string"),
        ("", "does not begin with http:// or https://"),
        ("cat.png", "does not begin with http:// or https://"),
        ("file:///etc/passwd", "does not begin with http:// or https://"),
        ("gopher://cdn.test/", "does not begin with http:// or https://"),
        ("http:///cat", "has no host"),
        ("http:cdn.test/cat", "has no host"),
        ("http://:80/", "has no host"),
        ("http://cdn.test:0/", "has port 0"),
        ("http://cdn.test:x/", "is not a URL"),
        ("http://cdn.test:99999/", "is not a URL"),
        ("http://[::1/", "is not a URL"),
        ("http://cdn.test:80:80/", "is not a URL"),
        ("http://user@cdn.test/", "has a user or password in it"),
        ("http://@cdn.test/", "has a user or password in it"),
        ("http://cdn.test\\@127.0.0.1/", "has a blank, a backslash or a control character in it"),
        ("http://cdn.test/a b", "has a blank, a backslash or a control character in it"),
        ("http://cdn.test/\r\nX: y", "has a blank, a backslash or a control character in it"),
        ("http://cdn.test/\ud800", "has a blank, a backslash or a control character in it"),
        ("http://" + "a" * 64 + ".test/", "its host is no host name"),
        ("http://cdn..test/", "its host is no host name"),
        ("http://cdn.test/" + "a" * 9000, "longer than 8192 characters"),
    ],
)
def test_urls_that_cannot_be_used(url: object, says: str) -> None:
    async def main() -> None:
        names = Names()
        async with fetching(Site(), names) as (fetcher, _):
            assert await refusal(fetcher, url) == f"the image URL: {says}"
        assert names.asked == []

    asyncio.run(main())


def test_answers_that_are_no_image(run: Run) -> None:
    async def main() -> None:
        chunks = b"%x\r\n%b\r\n" % (600, bytes(600)) * 2
        site = Site(
            missing=b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
            nowhere=b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
            announced=b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n",
            endless=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks,
            nonsense=b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
            fits=reply(bytes(1000)),
        )
        async with fetching(site, max_bytes=1000) as (fetcher, port):
            root = f"http://cdn.test:{port}"
            assert await refusal(fetcher, f"{root}/missing") == "the image URL: cdn.test answered 404, not 200"
            assert await refusal(fetcher, f"{root}/nowhere") == "the image URL: cdn.test answered 302, not 200"
            for name in ("announced", "endless"):
                assert "what cdn.test sends is larger than" in await refusal(fetcher, f"{root}/{name}")
            assert (await refusal(fetcher, f"{root}/nonsense")).startswith("the image cannot be fetched: ")
            assert await fetcher.fetch(f"{root}/fits", "url") == bytes(1000)

    run(main())


def test_an_answer_cut_short(run: Run) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        await writer.drain()

    async def main() -> None:
        async with fetching(half) as (fetcher, port):
            assert (await refusal(fetcher, f"http://cdn.test:{port}/")).startswith("the image cannot be fetched: ")

    run(main())


def test_the_deadline_covers_a_body_that_trickles(run: Run) -> None:
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + bytes(50))
        await reader.read()

    async def main() -> None:
        async with fetching(trickle, timeout_s=0.05) as (fetcher, port):
            message = await refusal(fetcher, f"http://cdn.test:{port}/")
            assert message == "the image did not arrive within 0.05 s"

    run(main())


def test_the_next_address_is_tried_where_one_refuses(run: Run) -> None:
    async def main() -> None:
        names = Names(cdn_test=["127.0.0.2", "127.0.0.1"], gone_test=["127.0.0.2"])
        async with fetching(Site(cat=reply(PICTURE)), names, opened=["127.0.0.0/8"]) as (fetcher, port):
            assert await fetcher.fetch(f"http://cdn.test:{port}/cat", "url") == PICTURE
            message = await refusal(fetcher, f"http://gone.test:{port}/cat")
            assert message.startswith("the image cannot be fetched: ")

    run(main())


def test_a_caller_that_leaves_takes_its_connection_along(run: Run) -> None:
    async def main() -> None:
        arrived, left = asyncio.Event(), asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            arrived.set()
            await reader.read()
            left.set()

        async with fetching(silent) as (fetcher, port):
            task = asyncio.create_task(fetcher.fetch(f"http://cdn.test:{port}/", "url"))
            await arrived.wait()
            assert repr(fetcher) == "<ImageFetcher, 1 running>"
            task.cancel()
            await turns_until(task.done)
            assert task.cancelled()
            await left.wait()

    run(main())


def test_failures_leave_nothing_behind_that_later_fetches_wait_for(run: Run) -> None:
    async def main() -> None:
        site = Site(cat=reply(PICTURE), missing=b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        names = Names(cdn_test=["127.0.0.1"], inside_test=["10.0.0.1"], gone_test=["127.0.0.2"])
        async with fetching(site, names, opened=["cdn.test", "gone.test"]) as (fetcher, port):
            bad = (f"http://cdn.test:{port}/missing", "http://inside.test/", f"http://gone.test:{port}/")
            await asyncio.gather(*(refusal(fetcher, url) for url in bad * 70))
            good = [fetcher.fetch(f"http://cdn.test:{port}/cat", "url") for _ in range(70)]
            assert await asyncio.gather(*good) == [PICTURE] * 70

    run(main())


def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), client_context()
    server.load_cert_chain(FOLDER / "server.crt", FOLDER / "server.key")
    client.load_verify_locations(FOLDER / "server.crt")
    return server, client


def test_tls_is_verified_against_the_name_though_the_address_is_connected_to(run: Run) -> None:
    async def main() -> None:
        names = Names(localhost=["127.0.0.1"], cdn_test=["127.0.0.1"])
        site = Site(cat=reply(PICTURE))
        async with fetching(site, names, opened=["localhost", "cdn.test"], tls=contexts()) as (fetcher, port):
            assert await fetcher.fetch(f"https://localhost:{port}/cat", "url") == PICTURE
            message = await refusal(fetcher, f"https://cdn.test:{port}/cat")
            assert "certificate verify failed: Hostname mismatch" in message

    run(main())


def test_the_environments_proxies_are_not_used(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def main() -> None:
        async with fetching(Site(cat=reply(PICTURE))) as (fetcher, port):
            assert await fetcher.fetch(f"http://cdn.test:{port}/cat", "url") == PICTURE

    run(main())
