"""One request's way through the admission: what it wants, where it stands, and how it ended."""

import enum
from collections import OrderedDict

import msgspec

from loadstone.core.placement import Upstream


class Refusal(enum.Enum):
    """Why a request is not admitted; the values are the codes of the API."""

    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    """Waited for longer than the queue's bound, or too long to be served before its deadline."""
    EXPECTED_WAIT = "expected_wait"
    """Refused at once: it would have come to a QUEUE_TIMEOUT or REQUEST_TIMEOUT."""
    NO_UPSTREAM = "no_upstream"
    """No upstream that could take it is up."""
    OVER_BUDGET = "over_budget"
    """Dearer than the whole token budget of every upstream."""
    REQUEST_TIMEOUT = "request_timeout"
    """Its deadline passed before it was granted."""


class State(enum.Enum):
    """QUEUED → GRANTED → ENDED; REFUSED from QUEUED; GRANTED → QUEUED by a move."""

    QUEUED = "queued"
    GRANTED = "granted"
    REFUSED = "refused"
    ENDED = "ended"


class Want(msgspec.Struct, frozen=True, gc=False):
    """What a request asks for."""

    client: str
    deadline_ns: int
    """Monotonic: when the whole request must have ended."""
    tokens: int = 0
    """Prompt and max output together."""
    priority: int = 0
    """Higher goes first."""
    affinity: int | None = None
    """Hash of the prompt's prefix; equal ones prefer one upstream."""
    unlimited: bool = False
    """Granted at once wherever anything is up, and against no limit: for a measuring client."""


class Share:
    """A client's standing within one priority: what it was served, and its waiting tickets, first come first."""

    __slots__ = ("client", "counter", "running", "waiting")

    def __init__(self, client: str) -> None:
        self.client = client
        self.counter = 0
        self.running = 0
        self.waiting: OrderedDict[Ticket, None] | None = None
        """Made at the first wait: most clients never do."""

    def __repr__(self) -> str:
        return f"<Share of {self.client}: {self.counter}, {self.running} running, {len(self.waiting or ())} waiting>"


class Ticket(msgspec.Struct, eq=False, gc=False):
    """One request; compared by identity. Read it; only ``Admission`` changes it."""

    want: Want
    offered_ns: int
    tokens: int
    """What it takes of the budget while GRANTED."""
    state: State = State.QUEUED
    refusal: Refusal | None = None
    """Why, while REFUSED."""
    granted_ns: int | None = None
    """When it was last granted."""
    place: Upstream | None = None
    share: Share | None = None
    """Set once it has been charged for."""
    charge: int = 0
    queued_ns: int = 0
    """Since when it waits; anew after a move."""
    number: int = 0
    """Its order in the queue."""
    avoid: frozenset[str] | None = None
    """While it waits after a move: where it may not go."""

    @property
    def upstream(self) -> str | None:
        """Where it runs, while GRANTED."""
        return None if self.place is None else self.place.name

    def __repr__(self) -> str:
        detail = f" at {self.upstream}" if self.place else f" {self.refusal.value}" if self.refusal else ""
        return f"<Ticket of {self.want.client} {self.state.value}{detail}, {self.tokens} tokens>"
