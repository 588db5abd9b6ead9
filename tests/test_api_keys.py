"""Who asks, by key: the file, the headers, and that no key is ever shown."""

from pathlib import Path

import pytest

from loadstone.core.errors import UsageError
from loadstone.hold.api_keys import ApiKeys, is_admin

FILE = """\
# who may use the gate
sk-alice alice 5
sk-alice-new alice 5   # the same client under a new key
  sk-bob\tbob\t-1

sk-nameless # for a friend
sk-#hash odd
"""


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    path = tmp_path / "keys"
    path.write_text(FILE)
    return ApiKeys.from_file(str(path))


@pytest.mark.parametrize(
    ("headers", "who"),
    [
        ([(b"authorization", b"Bearer sk-alice")], ("alice", 5)),
        ([(b"authorization", b"bearer  sk-alice-new ")], ("alice", 5)),
        ([(b"host", b"x"), (b"x-api-key", b"sk-bob")], ("bob", -1)),
        ([(b"x-api-key", b"sk-nameless")], ("key-6", 0)),
        ([(b"x-api-key", b"sk-#hash")], ("odd", 0)),
        ([(b"authorization", b"Bearer wrong"), (b"x-api-key", b"sk-bob")], ("bob", -1)),
        ([(b"authorization", b"Basic abc"), (b"authorization", b"Bearer sk-bob")], ("bob", -1)),
        ([], None),
        ([(b"authorization", b"sk-alice")], None),
        ([(b"authorization", b"Basic sk-alice")], None),
        ([(b"authorization", b"Bearer ")], None),
        ([(b"authorization", b"Bearer")], None),
        ([(b"authorization", b"Bearer sk-alic")], None),
        ([(b"authorization", b"Bearer sk-alicee")], None),
        ([(b"authorization", b"Bearer SK-ALICE")], None),
        ([(b"authorization", b"Bearer alice")], None),
        ([(b"authorization", b"Bearer \xff\x00")], None),
        ([(b"authorization", b"Bearer " + b"x" * 60_000)], None),
        ([(b"x-api-key", b"#")], None),
        # Guessing by the hundred in one request: the first counts.
        ([(b"authorization", b"Bearer no"), (b"authorization", b"Bearer sk-alice")], None),
        ([(b"x-api-key", b"no"), (b"x-api-key", b"sk-alice")], None),
    ],
)
def test_a_request_is_known_by_its_key(
    keys: ApiKeys, headers: list[tuple[bytes, bytes]], who: tuple[str, int] | None
) -> None:
    key = keys.identify(headers)
    assert (key and (key.name, key.priority)) == who


def test_no_key_is_shown(keys: ApiKeys) -> None:
    key = keys.identify([(b"x-api-key", b"sk-bob")])
    assert (repr(keys), repr(key)) == ("<ApiKeys 5 keys>", "<ApiKey bob, priority -1>")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no key"),
        (b"# nothing\n\n", "holds no key"),
        (b"sk-secret a b c\n", "line 1: 4 words"),
        (b"ok\nsk-secret name high\n", "line 2: the priority is not a whole number"),
        (b"sk-secret\n# x\nsk-secret other\n", "lines 1 and 3 hold the same key"),
        ("sk-secrét\n".encode(), "line 1: a key is at most 1024 characters of ASCII"),
        (b"sk-secret" * 200, "line 1: a key is at most 1024 characters of ASCII"),
        (b"\xff\xfe sk-secret", "not text in UTF-8"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_without_its_keys(
    tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        ApiKeys.from_file(str(path))
    message = str(caught.value)
    assert message.startswith(f"--api-key-file {path}")
    assert complaint in message
    assert "secr" not in message


@pytest.mark.parametrize(
    ("headers", "admin_key", "admin"),
    [
        ([(b"x-loadstone-admin", b"root")], "root", True),
        ([(b"authorization", b"Bearer root")], "root", True),
        ([(b"authorization", b"Bearer sk-alice"), (b"x-loadstone-admin", b"root")], "root", True),
        ([(b"x-loadstone-admin", "schlüssel".encode())], "schlüssel", True),
        ([(b"x-loadstone-admin", b"roo")], "root", False),
        ([(b"x-loadstone-admin", b"Bearer root")], "root", False),
        ([(b"x-api-key", b"root")], "root", False),
        ([], "root", False),
        ([], "", False),
        ([(b"x-loadstone-admin", b"")], "", False),
        ([(b"authorization", b"Bearer ")], "", False),
    ],
)
def test_the_admin_key_opens_and_an_empty_one_opens_nothing(
    headers: list[tuple[bytes, bytes]], admin_key: str, admin: bool
) -> None:
    assert is_admin(headers, admin_key) is admin
