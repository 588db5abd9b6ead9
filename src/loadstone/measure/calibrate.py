"""How many words make a prompt of n tokens? The server's own ``usage`` says: two lengths give the line, a third checks.

The count is the server's, so the chat template and special tokens are in it: a prompt of 512 tokens is one that the
server reports as 512.
"""

from dataclasses import dataclass, replace

from loadstone.core.api.endpoint import BodyOptions, Endpoint, Prompt
from loadstone.core.errors import RefusedError
from loadstone.core.records import Outcome
from loadstone.core.target import Request
from loadstone.measure.probe import Send, probe_prompt, send_with_retries
from loadstone.measure.texts import PROBES, Sizing, WordTexts, sizing_through

FEW_WORDS = 8
MANY_WORDS = 40
_CORRECTIONS = 2
_TOO_LONG = (400, 413, 422)
"""How servers say, among other things, that a prompt does not fit."""


@dataclass(frozen=True)
class Calibration:
    texts: WordTexts
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Gauge:
    """Asks the server for the length of a prompt: one token is generated, unstreamed, as usage is there always."""

    send: Send
    endpoint: Endpoint
    path: str
    options: BodyOptions

    async def tokens(self, prompt: Prompt) -> int | None:
        """None where the server reports no usage. Raises RefusedError where it refuses the prompt."""
        body = self.endpoint.build(prompt, 1, replace(self.options, stream=False))
        request = Request(path=self.path, body=body, index=0)
        exchange, reply = await send_with_retries(self.send, self.endpoint, request)
        if reply.outcome is not Outcome.OK:
            remedy = "; a shorter one?" if exchange.status in _TOO_LONG else ""
            raise RefusedError(f"the server fails a prompt of {_words(prompt)} words: {reply.error}{remedy}")
        return reply.input_tokens


def _words(prompt: Prompt) -> int:
    return sum(text.count(" ") + 1 for text in prompt.texts)


async def calibrate(
    send: Send, endpoint: Endpoint, path: str, options: BodyOptions, seed: int, input_len: int, prefix_len: int = 0
) -> Calibration:
    """Texts that the server counts as ``input_len`` tokens (and ``prefix_len`` more where a prefix is shared)."""
    gauge = _Gauge(send, endpoint, path, options)
    few = await gauge.tokens(probe_prompt(endpoint, FEW_WORDS, 1))
    many = await gauge.tokens(probe_prompt(endpoint, MANY_WORDS, 2))
    if few is None or many is None:
        note = "the server reports no usage: a word is taken for a token (--tokenizer gives exact lengths)"
        return Calibration(WordTexts(Sizing(), seed, prefix_len), (note,))
    sizing = sizing_through((FEW_WORDS, few), (MANY_WORDS, many))
    if endpoint.name == "rerank":
        # A document's length is its own: what the query and the template add is not taken off it.
        return Calibration(WordTexts(replace(sizing, overhead=0.0), seed, prefix_len))
    return await _verify(gauge, sizing, seed, input_len, prefix_len)


async def _verify(gauge: _Gauge, sizing: Sizing, seed: int, input_len: int, prefix_len: int) -> Calibration:
    wanted = prefix_len + input_len
    for _ in range(_CORRECTIONS + 1):
        texts = WordTexts(sizing, seed, prefix_len)
        counted = await gauge.tokens(Prompt((texts.text(PROBES, 3, input_len),)))
        if counted is None or counted == wanted:
            return Calibration(texts)
        if counted > wanted and sizing.words_for(wanted) == (1, 0):
            break
        sizing = replace(sizing, overhead=sizing.overhead + counted - wanted)
    return Calibration(texts, (f"a prompt asked for as {wanted} tokens is {counted} by the server's count",))
