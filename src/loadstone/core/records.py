"""What is kept of each request: one line of ``records.jsonl.zst``."""

import enum

import msgspec


class Outcome(enum.StrEnum):
    """How a request ended. Everything but ``OK`` and ``CUT`` is a failure, and a failure is data."""

    OK = "ok"
    REFUSED = "refused"
    """Connection refused, or HTTP 429 or 503: the server declined the work."""
    HTTP_ERROR = "http_error"
    TIMEOUT = "timeout"
    DISCONNECT = "disconnect"
    MALFORMED = "malformed"
    """A complete response that cannot be read: HTML, half an event, an error event inside the stream."""
    TLS = "tls"
    CLIENT = "client"
    """Our own machine failed (open files, ports, unread bytes): voids the level, says nothing of the server."""
    CUT = "cut"
    """We stopped it: neither success nor failure."""


class RequestRecord(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One request. Times in seconds since the level's t0; durations count from the actual send."""

    index: int
    slot: int
    planned_s: float
    sent_s: float
    end_s: float
    """Last byte received, or the moment of failure."""
    outcome: Outcome
    status: int = 0
    error: str = ""
    ttft_s: float | None = None
    """First chunk that carries content, reasoning or a tool call; None where nothing streamed or nothing came."""
    first_choice_s: float | None = None
    """First chunk with a non-empty ``choices`` (vLLM's TTFT)."""
    last_choice_s: float | None = None
    """Last chunk with a non-empty ``choices`` (vLLM's E2EL)."""
    itls_s: list[float] = []
    """Gaps between consecutive choices-chunks."""
    chunks: int = 0
    """Chunks that carried content, reasoning or a tool call: what tokens are counted by where nothing else tells."""
    input_tokens: int | None = None
    output_tokens: int | None = None
    sequences: int = 1
    turnaround_s: float | None = None
    """Write minus the last byte of the slot's previous request: the client's own delay. None after a pause."""
    lag_s: float = 0.0
    """Largest delay between a kernel stamp and its read."""
    retry_after_s: float | None = None
    reason: str = ""
    """``X-Loadstone-Reason`` of a refusal by a gate."""
    text: str = ""
    """The generated text; kept only where asked for."""

    @property
    def e2el_s(self) -> float:
        """From the actual send to the last byte."""
        return self.end_s - self.sent_s

    @property
    def late_s(self) -> float:
        """Actual minus planned send."""
        return self.sent_s - self.planned_s

    @property
    def ok(self) -> bool:
        return self.outcome is Outcome.OK
