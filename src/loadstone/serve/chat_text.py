"""One reply as it grows: tokens in, text out that is never taken back. Pure.

Theory of operation. Tokens pass two stages, and each holds back what later tokens could still change. The *detokeniser*
holds the bytes of a character that is not whole yet; a token is decoded together with those before it, because
tokenizers write a piece differently at the beginning of a text. The *stop finder* holds the longest end of the text
that could become a stop string. What passes both is final. A reply ends on an end token, on a stop string (whose own
text is never given out) or at its full length; the first of them wins, and the tokens counted are those up to and with
the one that ended it, whatever the engine has generated beyond.
"""

from collections.abc import Callable, Collection, Sequence

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, without the text of special tokens."""

_BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no character (yet)."""
_HOPELESS = 12
"""So many in a row are not the beginning of a character (decoders write one for each byte of it, or of its run)."""


class Detokeniser:
    """Tokens to whole characters. It keeps the tokens of the last piece given out, as the context of the next."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._context = 0
        """Tokens whose text is given out: the first of ``_tokens``."""
        self._given = 0
        """Characters given out of the text of ``_tokens``."""

    def push(self, token: int) -> str:
        """The text that ``token`` makes whole; empty while a character is unfinished."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        whole = text.rstrip(_BROKEN)
        if len(text) - len(whole) > _HOPELESS:
            piece = text[self._given :]
            self._restart([])
            return piece
        piece = whole[self._given :]
        self._given += len(piece)
        if piece and whole == text:
            self._restart(self._tokens[self._context :])
        return piece

    def flush(self) -> str:
        """What is held back, at the end of the reply: nothing where that is a character never finished."""
        piece = self._decode(self._tokens).rstrip(_BROKEN)[self._given :]
        self._restart([])
        return piece

    def _restart(self, context: list[int]) -> None:
        self._tokens = context
        self._context = len(context)
        self._given = len(self._decode(context)) if context else 0

    def __repr__(self) -> str:
        return f"<Detokeniser {len(self._tokens) - self._context} tokens held back>"


class StopFinder:
    """Text up to the first stop string, whatever the pieces it comes in."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that can be given out now; nothing more after ``found``."""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is held back, at the end of the reply."""
        held, self._held = self._held, ""
        return held

    def __repr__(self) -> str:
        return f"<StopFinder {'found' if self.found else f'{len(self._held)} characters held back'}>"


class Reply:
    """One reply: ``extend`` it by its tokens until ``finish_reason`` is set."""

    def __init__(self, decode: Decode, *, max_tokens: int, stops: Sequence[str], end_tokens: Collection[int]) -> None:
        self._detokeniser = Detokeniser(decode)
        self._stop_finder = StopFinder(stops)
        self._end_tokens = end_tokens
        self.max_tokens = max_tokens
        self.tokens = 0
        """Completion tokens so far, the one that ends the reply included."""
        self.finish_reason: str | None = None
        """stop | length, once the reply has ended."""

    def extend(self, tokens: Sequence[int]) -> str:
        """The text that ``tokens`` make final; those after the one that ends the reply count for nothing."""
        texts = []
        for token in tokens:
            if self.finish_reason is not None:
                break
            texts.append(self._push(token))
        return "".join(texts)

    def _push(self, token: int) -> str:
        self.tokens += 1
        if token in self._end_tokens:
            return self._end("", "stop")
        text = self._stop_finder.push(self._detokeniser.push(token))
        if self._stop_finder.found:
            self.finish_reason = "stop"
            return text
        return self._end(text, "length") if self.tokens == self.max_tokens else text

    def _end(self, text: str, reason: str) -> str:
        text += self._stop_finder.push(self._detokeniser.flush())
        self.finish_reason = "stop" if self._stop_finder.found else reason
        return text + self._stop_finder.flush()

    def __repr__(self) -> str:
        return f"<Reply {self.tokens} of {self.max_tokens} tokens, {self.finish_reason or 'unfinished'}>"


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that a proper beginning of ``stop`` is."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
