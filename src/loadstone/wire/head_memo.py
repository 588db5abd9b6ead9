"""Message heads that were read before: byte for byte the same head is not parsed again.

Theory of operation. A client on a kept connection sends one head over and over, and so does a server. What a parser
makes of a head that begins a message follows from its bytes alone; so the result of the first reading stands for all
others. Only heads of up to ``LONGEST_BYTES`` are kept that came, with a body of the length which they announce and
nothing else, in one read: then there is no doubt where the head ends. It is the first empty line that ends it, here and
in the parser, or it isn't kept. Whatever is not known, or comes in another shape, is the parser's.
"""

from typing import Generic, TypeVar

T = TypeVar("T")

LONGEST_BYTES = 2048
_MOST = 256
_END = b"\r\n\r\n"


class HeadMemo(Generic[T]):
    """What was read out of each of the last heads, at most 256 of them."""

    __slots__ = ("known",)

    def __init__(self) -> None:
        self.known: dict[bytes, T] = {}
        """By the bytes of the head, its empty line included."""

    def keep(self, message: bytes, body_bytes: int, read: T) -> None:
        """``message``, whole and alone, ends with a body of ``body_bytes``; ``read`` is what its head was read as."""
        end = len(message) - body_bytes
        if end > LONGEST_BYTES or message.find(_END) + len(_END) != end:
            return
        if len(self.known) >= _MOST:
            del self.known[next(iter(self.known))]
        self.known[message[:end]] = read

    def __repr__(self) -> str:
        return f"<HeadMemo of {len(self.known)}>"
