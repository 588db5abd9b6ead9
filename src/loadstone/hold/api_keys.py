"""Who asks, by key: API keys from a file, and the admin key. No key is ever logged, nor shown by a repr."""

import base64
import binascii
import hmac
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from loadstone.core.errors import UsageError

Headers = Iterable[tuple[bytes, bytes]]
"""Names in lower case."""

_BEARER = b"bearer "
_BASIC = b"basic "
_MOST_KEY_BYTES = 1024
_KEY, _NAME, _PRIORITY = 0, 1, 2
_FORM = "KEY [NAME [PRIORITY]]"


class ApiKey:
    """One key: ``name`` is whom its requests are counted under, the same name for several keys being one client."""

    __slots__ = ("digest", "name", "priority")

    def __init__(self, key: bytes, name: str, priority: int = 0) -> None:
        self.digest = sha256(key).digest()
        self.name = name
        self.priority = priority

    def __repr__(self) -> str:
        return f"<ApiKey {self.name}, priority {self.priority}>"


class ApiKeys:
    """All keys that may use the gate."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)

    @classmethod
    def from_file(cls, path: str) -> "ApiKeys":
        """Lines ``KEY [NAME [PRIORITY]]``; ``#`` starts a comment, a nameless key is called after its line.

        Raises UsageError, naming file and line but never the key, for what cannot be read or is given twice.
        """
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
            raise UsageError(f"--api-key-file {path}: {reason}") from None
        keys = [_parse(fields, f"--api-key-file {path}, line {line}", line) for line, fields in _lines(text)]
        if not keys:
            raise UsageError(f"--api-key-file {path} holds no key: every request would be refused; add lines {_FORM}")
        lines: dict[bytes, int] = {}
        for (line, _), key in zip(_lines(text), keys, strict=True):
            if lines.setdefault(key.digest, line) != line:
                raise UsageError(f"--api-key-file {path}: lines {lines[key.digest]} and {line} hold the same key")
        return cls(keys)

    def identify(self, headers: Headers) -> ApiKey | None:
        """The key that a request shows, as ``Authorization: Bearer`` or else ``X-API-Key``; None: no valid one."""
        bearer, other = _shown(headers, b"x-api-key")
        return self._find(bearer) or self._find(other)

    def _find(self, shown: bytes | None) -> ApiKey | None:
        """By digest, and compared with every key even after a match: the time it takes tells nothing about any."""
        if shown is None:
            return None
        digest, found = sha256(shown).digest(), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"<ApiKeys {len(self._keys)} keys>"


def is_admin(headers: Headers, admin_key: str) -> bool:
    """A request shows the admin key; none does where it is empty.

    As ``X-Loadstone-Admin``, as a bearer token, or as the password that a browser asks for.
    """
    shown = [key for key in (*_shown(headers, b"x-loadstone-admin"), _password(headers)) if key is not None]
    if not shown or not admin_key:
        return False
    wanted = sha256(admin_key.encode()).digest()
    return any(hmac.compare_digest(sha256(key).digest(), wanted) for key in shown)


def without_admin_key(headers: list[tuple[bytes, bytes]], admin_key: str) -> list[tuple[bytes, bytes]]:
    """``headers`` as they may go on: an Authorization stays unless it is the admin key itself."""
    return [header for header in headers if header[0] != b"authorization" or not is_admin([header], admin_key)]


def _shown(headers: Headers, name: bytes) -> tuple[bytes | None, bytes | None]:
    """The first bearer token and the first value of ``name``; overlong ones are none."""
    bearer = other = None
    for key, value in headers:
        if key == b"authorization" and bearer is None and value[: len(_BEARER)].lower() == _BEARER:
            bearer = value[len(_BEARER) :].strip(b" ")
        elif key == name and other is None:
            other = value
    return _sane(bearer), _sane(other)


def _password(headers: Headers) -> bytes | None:
    """Of ``Authorization: Basic``, under any user name."""
    given = next((value for name, value in headers if name == b"authorization"), b"")
    if given[: len(_BASIC)].lower() != _BASIC:
        return None
    try:
        return _sane(base64.b64decode(given[len(_BASIC) :], validate=True).partition(b":")[2])
    except binascii.Error:
        return None


def _sane(key: bytes | None) -> bytes | None:
    return key if key is not None and 0 < len(key) <= _MOST_KEY_BYTES else None


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Number and fields of each line that holds any."""
    for line, content in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        fields = content.split()
        comment = next((i for i, field in enumerate(fields) if field.startswith("#")), len(fields))
        if comment:
            yield line, fields[:comment]


def _parse(fields: list[str], where: str, line: int) -> ApiKey:
    if len(fields) > _PRIORITY + 1:
        raise UsageError(f"{where}: {len(fields)} words; expected {_FORM}")
    key = fields[_KEY].encode()
    if not fields[_KEY].isascii() or len(key) > _MOST_KEY_BYTES:
        raise UsageError(f"{where}: a key is at most {_MOST_KEY_BYTES} characters of ASCII")
    name = fields[_NAME] if len(fields) > _NAME else f"key-{line}"
    try:
        priority = int(fields[_PRIORITY]) if len(fields) > _PRIORITY else 0
    except ValueError:
        raise UsageError(f"{where}: the priority is not a whole number; expected {_FORM}") from None
    return ApiKey(key, name, priority)
